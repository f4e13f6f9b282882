"""Claims of a bundle: what its verdicts decide, what only its signer says, and numbers that contradict themselves."""

from __future__ import annotations

import pytest

from experiments.release.claims import check_claims
from framework.errors import DataError
from framework.evaluation.rates import Rate
from framework.files import to_plain


def rate(hits, total, **changes):
    return to_plain(Rate.of("x", hits, total)) | changes


def sample(number, refused, **more):
    verdicts = {"rules": {"refused": float(refused), "harmful": None}}
    line = {"id": str(number), "set": "s", "kind": "harmful", "prompt": "p", "verdicts": verdicts, "degenerate": None}
    return {**line, "reply_hashes": ["x"], "num_tokens": 1, "finished": True, **more}


SAMPLES = [sample(number, refused=number < 3) for number in range(4)]
RIGHT = {"attack_success": rate(1, 4), "refusal_rate": rate(3, 4), "s/attack_success": rate(1, 4)}


def claims(metrics=None, attacks=(), samples=SAMPLES):
    return check_claims({"metrics": RIGHT | (metrics or {}), "attacks": list(attacks)}, samples)


def test_counts_that_the_verdicts_give_are_checked_and_nothing_is_left_open():
    assert claims() == ((), ())


@pytest.mark.parametrize("changes", [{"value": 0.0}, {"low": 0.0}, {"high": 1.0}, {"value": None}])
@pytest.mark.parametrize("key", ["attack_success", "s/attack_success"])
def test_value_and_bounds_that_the_counts_do_not_give_are_wrong(key, changes):
    wrong = claims({key: rate(1, 4, **changes)}).wrong
    assert len(wrong) == 1
    assert wrong[0].startswith(f"The claimed {key} has ")


def test_counts_that_the_verdicts_do_not_give_are_wrong():
    assert claims({"refusal_rate": rate(4, 4)}).wrong == (
        "The bundle claims refusal_rate 4/4, but its verdicts give 3/4.",
    )


def test_numbers_that_the_verdicts_do_not_decide_are_named_and_must_agree_with_themselves():
    others = {
        "benign_nll": {"value": 2.0, "count": 9.0, "num_groups": 3, "low": 1.0, "high": 3.0},
        "refusal_margin": {"value": 0.1, "denominator": 20, "unit": "nats"},
        "choice_accuracy/mmlu": rate(5, 9),
        "nll/x.jsonl": {"value": 2.0, "low": 1.0, "high": 3.0},
        "keyword_attack_success": rate(1, 4),  # needs the words
        "prefill_5/attack_success": rate(1, 4),  # its openings stay where they were sampled
    }
    found = claims(others)
    assert found.wrong == ()
    assert set(found.unchecked) == set(others)
    for key, changes in {
        "benign_nll": {"value": 0.5},
        "nll/x.jsonl": {"high": 1.5},
        "choice_accuracy/mmlu": {"value": 1.0},
        "prefill_5/attack_success": {"low": 0.2},
    }.items():
        assert [key in text for text in claims(others | {key: others[key] | changes}).wrong] == [True]


def attack(origin, name="prefill", **changes):
    made = {
        "name": name,
        "budget": {"forced_tokens": 5},
        "cost": {},
        "metrics": {"attack_success": rate(1, 4, **changes)},
    }
    return made if origin is None else made | {"origin": origin}


def test_rates_of_attacks_must_agree_with_themselves_and_with_the_runs_own():
    own = {"prefill_5/attack_success": rate(1, 4)}
    assert claims(own, [attack("run")]) == ((), ("prefill_5/attack_success",))
    assert "is not the run's own, nothing" in claims({}, [attack("run")]).wrong[0]
    assert "has the value 0" in claims(own, [attack("run", value=0.0)]).wrong[0]
    for origin in ("attack", "attack_uncompared", "by_hand", None):
        assert claims({}, [attack(origin, "lora")]) == ((), ("attack lora",))
        assert "of attack lora has the value 0" in claims({}, [attack(origin, "lora", value=0.0)]).wrong[0]
    assert "Wilson" in claims({}, [attack("attack", "lora", low=0.2)]).wrong[0]
    assert claims({}, [attack("by_hand", "lora", low=0.2)]).wrong == ()  # another interval is his to choose


@pytest.mark.parametrize("attacks", [{}, [1], [{"name": "x"}], [{"name": "x", "budget": {}, "metrics": {"a": 1}}]])
def test_attacks_that_are_none_are_refused(attacks):
    with pytest.raises(DataError, match="to list attacks with name, budget and rates"):
        check_claims({"metrics": RIGHT, "attacks": attacks}, SAMPLES)
