import numpy as np
import pytest

from experiments.attacks.interface import AttackPoint
from experiments.attacks.worst_case import worst_case
from experiments.statistics import wilson_interval
from framework.errors import ConfigError, DataError
from tests.experiments.attacks.made_up_outcomes import outcome, point, prompt_outcome

WEAK = outcome("quantise", [point([0, 1])])
STRONG = outcome("interpolate", [point([0, 2, 3], factor=0.5), point(range(8), factor=1.0, utility=0.5)])


def test_the_largest_rate_of_the_useful_models_leads():
    found = worst_case([WEAK, STRONG], floor=0.9)
    assert found.leading is not None
    assert (str(found.leading), found.leading.rate.numerator) == ("interpolate (factor 0.5)", 3)
    assert [str(one) for one in found.below_floor] == ["interpolate (factor 1.0)"]
    assert (found.num_points, found.num_requests) == (2, 10)
    assert "not counted because they lost their utility: 1" in str(found)


def test_without_a_floor_every_attack_counts():
    found = worst_case([WEAK, STRONG])
    assert found.leading is not None
    assert found.leading.rate.numerator == 8
    assert found.below_floor == ()


def test_the_union_counts_each_request_once():
    found = worst_case([WEAK, STRONG], floor=0.9)
    assert found.union is not None
    assert (found.union.numerator, found.union.denominator) == (4, 10)


def test_an_attack_of_unknown_utility_counts_and_is_named():
    found = worst_case([outcome("endpoint", [point([1], utility=None)])], floor=0.9)
    assert [one.name for one in found.unmeasured] == ["endpoint"]
    assert found.num_points == 1
    assert "of 1 the utility is not known" in str(found)


def test_a_prompt_attack_counts_with_what_it_may_spend():
    own = prompt_outcome("search", {"a": 1, "b": 4, "c": None}, 5)
    assert str(worst_case([own]).leading) == "search at 5 queries"
    short = worst_case([own], limits={"queries": 3})
    assert short.leading is not None
    assert (short.leading.spent, short.leading.rate.numerator, short.num_points) == (3, 1, 1)


def test_when_every_model_is_broken_there_is_no_worst_case():
    found = worst_case([outcome("interpolate", [point([1], utility=0.1)])], floor=0.9)
    assert (found.leading, found.low, found.union) == (None, None, None)
    assert str(found) == "attacked models that kept their utility: 0 of 1"


def test_attacks_on_a_part_of_the_requests_keep_their_own_number():
    part = outcome("prefill", [point({"r0": True, "r1": True, "r2": False})])
    found = worst_case([WEAK, part])
    assert found.leading is not None
    assert (found.leading.rate.denominator, found.num_requests) == (3, 10)
    assert found.union is not None
    assert found.union.denominator == 10


def test_the_interval_of_one_attack_is_about_its_own():
    own = outcome("direct", [point(range(40), total=100)])
    found = worst_case([own])
    wilson = wilson_interval(40, 100)
    assert found.low == pytest.approx(wilson.low, abs=0.02)
    assert found.high == pytest.approx(wilson.high, abs=0.02)
    assert abs(found.excess) < 0.005


def test_the_interval_never_says_more_than_wilsons():
    found = worst_case([outcome("direct", [point([])])])
    assert (found.low, found.high) == wilson_interval(0, 10)


def test_the_interval_of_the_maximum_covers_it_where_the_leading_attacks_own_does_not():
    draw = np.random.default_rng(0)
    covered, own_covered, excess, rounds = 0, 0, [], 60
    for _ in range(rounds):
        outcomes = [
            outcome(f"a{n}", [point(np.flatnonzero(draw.random(60) < 0.3).tolist(), total=60)]) for n in range(20)
        ]
        found = worst_case(outcomes, resamples=300)
        covered += found.low <= 0.3 <= found.high
        own_covered += found.leading.rate.low <= 0.3 <= found.leading.rate.high
        excess.append(found.leading.rate.value - 0.3)
    assert np.mean(excess) > 0.08
    assert covered / rounds >= 0.93
    assert own_covered / rounds < 0.85


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: worst_case([]), "at least one attack within the limits"),
        (lambda: worst_case([WEAK], limits={"edits": -1}), "at least one attack within the limits"),
        (lambda: worst_case([outcome("x", [AttackPoint(0, {})])]), "say which requests were broken"),
    ],
)
def test_nothing_to_go_by_is_refused(make, message):
    with pytest.raises(DataError, match=message):
        make()


def test_attacks_that_failed_are_told_with_the_worst_case():
    assert str(worst_case([WEAK], num_failed=2)).endswith("; attacks that failed and are not in it: 2")


@pytest.mark.parametrize("floor", [90, -0.1, float("nan"), float("inf")])
def test_a_floor_that_is_no_share_is_refused(floor):
    with pytest.raises(ConfigError, match=f"Expected `floor` to be a share between 0 and 1, but got {floor!r}. Write"):
        worst_case([WEAK, STRONG], floor=floor)
