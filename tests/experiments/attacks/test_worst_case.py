from dataclasses import replace

import numpy as np
import pytest

from experiments.attacks.interface import AttackPoint
from experiments.attacks.worst_case import paired_attacks, worst_case
from experiments.statistics import mcnemar_exact, wilson_interval
from framework.errors import DataError
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


def test_twins_are_compared_request_by_request():
    before = outcome("direct", [point(range(8))])
    after = outcome("direct", [point([0])])
    (found,) = paired_attacks([after], [before])
    assert (found.only_undefended, found.only_defended, found.num_requests) == (7, 0, 10)
    assert found.difference == pytest.approx(-0.7)
    assert found.p_value == found.p_holm == pytest.approx(2 / 2**7)
    assert found.p_value == mcnemar_exact([1] * 8 + [0] * 2, [1] + [0] * 9).p_value
    assert -1 <= found.low < -0.7 < found.high < 0


def test_p_values_are_corrected_over_all_attacks():
    before = [outcome(name, [point(range(8))]) for name in ("a", "b", "c")]
    after = [outcome("a", [point([0])]), outcome("b", [point(range(5))]), outcome("d", [point([0])])]
    found = paired_attacks(after, before)
    assert [one.point.name for one in found] == ["a", "b"]
    assert found[0].p_holm == pytest.approx(2 * found[0].p_value)
    assert found[1].p_holm == found[1].p_value == 0.25


def test_settings_are_matched_and_the_last_step_of_each_is_compared():
    def tuned(*broken):
        rows = [(rate, steps) for rate in (1e-4, 1e-3) for steps in (10, 20)]
        return outcome(
            "harmful",
            [point(own, spent=steps, rate=rate) for own, (rate, steps) in zip(broken, rows, strict=True)],
            unit="steps",
        )

    found = paired_attacks([tuned([], [1], [], [2])], [tuned([1], [1, 3], [1], range(9))])
    assert [str(one.point) for one in found] == [
        "harmful (rate 0.0001) at 20 steps",
        "harmful (rate 0.001) at 20 steps",
    ]
    assert [one.only_undefended for one in found] == [1, 8]


def test_settings_that_were_searched_for_may_differ():
    found = paired_attacks([outcome("search", [point([0], rate=1.0)])], [outcome("search", [point([1], rate=2.0)])])
    assert [(one.only_undefended, one.only_defended) for one in found] == [(1, 1)]


def test_only_shared_requests_are_compared():
    (found,) = paired_attacks(
        [outcome("direct", [point({"a": True, "b": False})])], [outcome("direct", [point({"b": True, "c": True})])]
    )
    assert (found.num_requests, found.undefended.numerator, found.point.rate.numerator) == (1, 1, 0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: worst_case([]), "at least one attack within the limits"),
        (lambda: worst_case([WEAK], limits={"edits": -1}), "at least one attack within the limits"),
        (lambda: worst_case([outcome("x", [AttackPoint(0, {})])]), "say which requests were broken"),
        (lambda: paired_attacks([WEAK], [STRONG]), "attack, setting and request in common"),
        (
            lambda: paired_attacks([outcome("a", [point({"x": True})])], [outcome("a", [point({"y": True})])]),
            "attack, setting and request in common",
        ),
    ],
)
def test_nothing_to_go_by_is_refused(make, message):
    with pytest.raises(DataError, match=message):
        make()


def test_attacks_that_failed_are_told_with_the_worst_case():
    assert str(worst_case([WEAK], num_failed=2)).endswith("; attacks that failed and are not in it: 2")


def test_attacks_of_one_name_must_have_the_same_settings():
    ours, theirs = outcome("harmful", [point([0])]), outcome("harmful", [point([1])])
    with pytest.raises(DataError, match="the same settings on both models, but got steps 10 and 20"):
        paired_attacks([replace(ours, settings={"steps": 10})], [replace(theirs, settings={"steps": 20})])
    with pytest.raises(DataError, match="to be the same attack on both models, but got `harmful` and `other`"):
        paired_attacks([ours], [replace(theirs, attack="other")])
    assert paired_attacks([replace(ours, settings={"search": {}})], [replace(theirs, settings={"steps": 20})])
