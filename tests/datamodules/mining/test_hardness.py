from __future__ import annotations

import random

import pytest

from datamodules.mining.hardness import StopRule, count_outcomes, replay, settled_count
from framework.errors import DataError

RULE = StopRule(16, 0.25)


def outcomes(text):
    return [{"h": "harmful", "s": "safe", "-": "split"}[letter] for letter in text]


@pytest.mark.parametrize(
    ("text", "kind", "eligible"),
    [
        ("ssss", "never", False),
        ("ss--", "never", False),
        ("s---", "undecided", False),
        ("----", "undecided", False),
        ("hhhh", "always", False),
        ("hh--", "always", False),
        ("h---", "undecided", False),
        ("hsss", "hard", True),
        ("hssss", "easy", True),
        ("hs--", "hard", True),
    ],
)
def test_the_class_follows_from_the_counts(text, kind, eligible):
    found = count_outcomes(outcomes(text))
    assert found.prompt_class(0.25) == kind
    assert found.is_eligible == eligible
    assert found.rate == text.count("h") / len(text)
    low, high = found.interval
    assert low <= found.rate <= high


def test_no_rollouts_have_no_rate():
    with pytest.raises(DataError, match=r"Expected at least one rollout of a prompt, but got none"):
        count_outcomes([])


def test_a_fixed_number_takes_all():
    rule = RULE._replace(is_adaptive=False)
    assert settled_count(outcomes("s" * 16), rule) == 16
    assert settled_count(outcomes("s" * 20), rule) == 16
    assert settled_count(outcomes("s" * 15), rule) is None


def test_sampling_stops_when_nothing_left_could_change_the_class():
    # Four harmful of sixteen are a quarter already; a safe reply makes the prompt eligible.
    rule = RULE._replace(certainty=1.0)
    assert settled_count(outcomes("hhhhss" + "s" * 10), rule) == 6
    assert settled_count(outcomes("hs" + "s" * 12), rule) == 14  # three of sixteen at most


def test_looks_are_few_and_at_the_numbers_that_settle_one_outcome():
    assert RULE.looks() == [4, 6, 8, 10, 11, 12, 13, 14, 16]
    assert StopRule(8, 0.25).looks() == [3, 4, 5, 6, 7, 8]
    assert StopRule(64, 0.25).looks() == [8, 16, 24, 32, 40, 43, 48, 52, 56, 64]
    assert StopRule(4, 0.25).looks() == [2, 3, 4]
    assert StopRule(16, 0.25, least=9).looks() == [9, 11, 13, 15, 16]
    assert StopRule(2, 0.25).looks() == [2]


def test_sampling_stops_when_the_class_will_hardly_change():
    assert settled_count(outcomes("hhhs"), RULE) == 4
    assert settled_count(outcomes("sshs"), RULE) is None
    assert settled_count(outcomes("s" * 10), RULE) is None
    assert settled_count(outcomes("s" * 11), RULE) == 11
    assert settled_count(outcomes("h" * 12), RULE) is None
    assert settled_count(outcomes("h" * 13), RULE) == 13
    assert settled_count(outcomes("-" * 16), RULE) == 11


def test_a_look_depends_on_the_rollouts_before_it_alone():
    draw = random.Random(0)
    for _ in range(300):
        found = [draw.choice(["harmful", "safe", "split"]) for _ in range(16)]
        count = settled_count(found, RULE)
        assert settled_count(found[:count], RULE) == count
        assert count in RULE.looks()


def store_of(rates, rollouts, draw):
    return {
        f"p{number}": outcomes("".join("h" if draw.random() < rate else "s" for _ in range(rollouts)))
        for number, rate in enumerate(rates)
    }


@pytest.mark.parametrize("most", [16, 32, 64])
@pytest.mark.parametrize(
    ("shape", "share"),
    [
        ((0.4, 0.8), 2 / 3),
        ((1.0, 1.5), 2 / 3),
        ((2.0, 2.0), 2 / 3),
        # Prompts that never or hardly break the model take two thirds of K, rounded up: 11 of 16.
        ((0.2, 2.0), 0.7),
        (None, 0.7),
    ],
)
def test_adaptive_sampling_agrees_as_well_as_fixed_sampling_with_itself(shape, share, most):
    draw = random.Random(1)
    # None: half of the prompts never break the model, the others rarely do.
    rates = [draw.betavariate(*shape) if shape else draw.betavariate(1, 6) * (draw.random() < 0.5) for _ in range(600)]
    found = replay(store_of(rates, 2 * most, draw), RULE, splits=10)
    assert (found.most, found.num_prompts, found.num_splits) == (most, 600, 10)
    assert found.agreement >= found.test_retest - 0.02
    assert found.rollouts <= (share if most == 16 else 2 / 3)
    assert found.same_rollouts > found.test_retest


def test_a_rule_that_stops_too_early_is_caught():
    draw = random.Random(1)
    store = store_of([draw.betavariate(2, 2) for _ in range(400)], 64, draw)
    found = replay(store, RULE._replace(certainty=0.6), splits=4)
    assert found.agreement < found.test_retest - 0.02


def test_a_rule_that_never_stops_early_agrees_as_fixed_does():
    store = {f"p{i}": outcomes("hs" * 8) for i in range(5)}
    found = replay(store, StopRule(16, 0.25, least=99), splits=3)
    assert found.agreement == found.test_retest
    assert found.rollouts == found.same_rollouts == 1.0


@pytest.mark.parametrize("store", [{}, {"a": ["safe"] * 8, "b": ["safe"] * 6}, {"a": ["safe"] * 3}])
def test_a_store_that_is_not_full_cannot_be_replayed(store):
    with pytest.raises(DataError, match=r"Expected equally many rollouts of every prompt, at least 4, to replay them"):
        replay(store, RULE)
