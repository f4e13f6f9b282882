from __future__ import annotations

import pytest

from callbacks.guard_decisions import Decision, decide, next_weight, violations
from framework.errors import TrainingError
from framework.guard_settings import GuardSettings

VALUES = {"refusal_margin": 0.2, "direction_cosine": 0.9, "direction_auroc": 1.0, "kl_to_start": 0.3}


def made(values=VALUES, *, roll_backs=0, weight=None, low=None, **settings):
    return decide(GuardSettings(**settings), values, roll_backs=roll_backs, weight=weight, low=low)


def test_a_violation_counts_from_the_side_of_its_bound():
    found = violations(GuardSettings(min_refusal_margin=0.5, min_direction_cosine=0.8, max_kl=0.1), VALUES)
    assert found == pytest.approx({"refusal_margin": 0.3, "direction_cosine": -0.1, "kl_to_start": 0.2})


def test_the_reason_names_every_threshold_that_is_crossed():
    found = made(min_refusal_margin=0.5, min_direction_auroc=0.9, max_kl=0.1)
    assert found == Decision("stop", "refusal_margin 0.2 is below 0.5; kl_to_start 0.3 is above 0.1")


@pytest.mark.parametrize("action", ["watch", "stop", "roll_back"])
def test_nothing_is_done_while_thresholds_hold(action):
    assert made(action=action, min_refusal_margin=0.2) == Decision("hold", "every threshold holds")


def test_a_guard_that_watches_only_holds():
    assert made(action="watch", min_refusal_margin=0.5).kind == "hold"


def test_the_number_of_roll_backs_is_bounded():
    settings = {"action": "roll_back", "min_refusal_margin": 0.5, "max_roll_backs": 2}
    assert made(roll_backs=1, **settings).kind == "roll_back"
    assert made(roll_backs=2, **settings) == Decision(
        "stop", "refusal_margin 0.2 is below 0.5; 2 roll backs were made before"
    )


def test_the_weight_follows_the_constraint_that_is_worst_off():
    settings = {"action": "raise_weight", "method": "x", "weight_step": 2.0, "max_weight": 3.0}
    up = made(weight=1.0, low=1.0, min_refusal_margin=0.5, max_kl=0.5, **settings)
    assert (up.kind, up.weight) == ("set_weight", pytest.approx(1.6))
    down = made(weight=1.6, low=1.0, min_refusal_margin=0.0, **settings)
    assert (down.kind, down.weight) == ("set_weight", pytest.approx(1.2))
    assert made(weight=1.0, low=1.0, min_refusal_margin=0.0, **settings) == Decision("hold", "every threshold holds", 1)
    assert made(weight=3.0, low=1.0, min_refusal_margin=9.0, **settings).kind == "at_max_weight"


def test_the_weight_stays_in_its_bounds():
    assert [next_weight(1.0, v, step=10.0, low=0.5, high=2.0) for v in (-1.0, 0.01, 1.0)] == [0.5, 1.1, 2.0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_has_crossed_its_threshold(value):
    values = {**VALUES, "refusal_margin": value}
    assert made(values, min_refusal_margin=0.0) == Decision("stop", f"refusal_margin is {value}, not finite")
    assert made(values, action="watch", min_refusal_margin=0.0).reason == f"refusal_margin is {value}, not finite"
    settings = {"action": "raise_weight", "method": "x", "weight": 1.0, "low": 1.0}
    with pytest.raises(TrainingError, match=r"every guarded value to be finite, but got: refusal_margin is"):
        made(values, min_refusal_margin=0.0, **settings)
    assert made(values, max_kl=0.5, **settings).kind == "hold"
