import math

import pytest
from scipy.stats import binomtest

from experiments.attacks.budget_curves import (
    Held,
    LogRank,
    budget_curves,
    held_in_attempts,
    held_in_points,
    log_rank,
    success_at,
    survival_of,
)
from experiments.attacks.interface import AttackPoint
from framework.errors import DataError
from tests.experiments.attacks.made_up_outcomes import attempts_of, outcome, point, prompt_outcome

HELD = [
    Held("a", 1, True),
    Held("b", 2, True),
    Held("c", 2, True),
    Held("d", 3, False),
    Held("e", 5, True),
    Held("f", 5, False),
]


def test_survival_is_what_one_computes_by_hand():
    found = survival_of(HELD)
    assert (found.times, found.at_risk, found.events) == ((1, 2, 5), (6, 5, 2), (1, 2, 1))
    assert found.survival == pytest.approx((5 / 6, 5 / 6 * 3 / 5, 1 / 4))
    assert (found.num_requests, found.num_broken, found.median) == (6, 4, 2)


def test_the_interval_is_greenwoods_on_the_log_log_scale():
    error = 0.5 * math.sqrt(1 / (6 * 5) + 2 / (5 * 3))
    width = 1.959964 * error / (0.5 * math.log(2))
    found = survival_of(HELD)
    assert found.low[1] == pytest.approx(0.5 ** math.exp(width), abs=1e-6)
    assert found.high[1] == pytest.approx(0.5 ** math.exp(-width), abs=1e-6)
    assert (round(found.low[1], 3), round(found.high[1], 3)) == (0.111, 0.804)


def test_the_median_has_the_interval_of_brookmeyer_and_crowley():
    found = survival_of(HELD)
    assert found.low[0] == pytest.approx(0.273, abs=1e-3)
    assert (found.median_low, found.median_high) == (1, None)
    assert found.median_text() == "2 (1 to not reached)"


def test_a_median_that_is_not_reached_is_said_so():
    assert survival_of([Held("a", 4, True), Held("b", 9, False), Held("c", 9, False)]).median_text() == "not reached"


def test_nothing_broken_and_all_broken_are_no_exception():
    none = survival_of([Held("a", 5, False), Held("b", 5, False)])
    assert (none.times, none.median, none.num_broken) == ((), None, 0)
    every = survival_of([Held("a", 1, True), Held("b", 1, True)])
    assert (every.survival, every.low, every.median) == ((0.0,), (0.0,), 1)
    at_once = survival_of([Held("a", 0, True), Held("b", 50, False)])
    assert at_once.times == (0,)


def broken_at(*spent):
    return [Held(f"r{n}", at, True) for n, at in enumerate(spent)]


def test_when_every_request_is_broken_the_share_that_holds_is_still_uncertain():
    two = survival_of(broken_at(1, 1))
    assert two.high == pytest.approx((binomtest(0, 2).proportion_ci(0.95, "exact").high,))
    assert two.median_text() == "1 (1 to not reached)"
    # That all of six break where half of them would hold has a chance of 1 in 64, below 2.5 %.
    assert [survival_of(broken_at(*[1] * n)).median_text() for n in (5, 6)] == ["1 (1 to not reached)", "1 (1 to 1)"]


def test_of_requests_broken_one_after_another_all_count_for_the_upper_end():
    found = survival_of(broken_at(*range(1, 11)))
    assert found.high[-1] == pytest.approx(1 - 0.025 ** (1 / 10))
    assert list(found.high) == sorted(found.high, reverse=True)
    assert found.low[-1] == 0.0
    assert found.median == 5


def test_where_some_were_censored_only_those_at_risk_count_for_the_upper_end():
    found = survival_of([*broken_at(4, 4, 4), *(Held(f"c{n}", 3, False) for n in range(40))])
    assert (found.at_risk, found.survival) == ((3,), (0.0,))
    assert found.high == pytest.approx((1 - 0.025 ** (1 / 3),))
    late = survival_of([*broken_at(*[1] * 30, 5), Held("c", 3, False)])
    assert late.survival[-1] == 0.0
    # One request alone would say next to nothing, but no more hold than held before.
    assert late.high[-1] == late.high[0] < 0.3


def test_the_log_rank_test_is_what_one_computes_by_hand():
    first = [Held("a", 1, True), Held("b", 2, True), Held("c", 3, False)]
    second = [Held("d", 2, False), Held("e", 4, True), Held("f", 5, False)]
    found = log_rank(first, second)
    assert found is not None
    # observed 2, expected 1/2 + 2/5, variance 1/4 + 6/25
    assert found.statistic == pytest.approx((2 - 0.9) ** 2 / 0.49)
    assert found.p_value == pytest.approx(0.1161, abs=1e-4)


def test_a_log_rank_test_without_anything_to_tell():
    held = [Held("a", 3, False), Held("b", 3, False)]
    assert log_rank(held, held) is None
    broken = [Held("a", 1, True)]
    assert log_rank(broken, broken) == LogRank(0.0, 1.0)


def test_success_counts_all_requests():
    assert [success_at(HELD, k).numerator for k in (0, 1, 2, 40)] == [0, 1, 3, 4]
    rate = success_at(HELD, 2, num_requests=12)
    assert (rate.name, rate.denominator) == ("attack_success@2", 12)
    assert rate.low == pytest.approx(0.0889, abs=1e-3)


def test_requests_are_censored_after_their_last_query():
    found = held_in_attempts(attempts_of({"a": 3, "b": None}, 7))
    assert found == [Held("a", 3, True), Held("b", 7, False)]


def test_a_request_counts_as_broken_at_the_first_point_at_which_it_is():
    points = [point([2], total=3, spent=50), point([], total=3, spent=0), point([1], total=3, spent=20)]
    assert held_in_points(points) == [Held("r0", 50, False), Held("r1", 20, True), Held("r2", 50, True)]


def test_a_prompt_attack_has_one_curve_the_same_from_points_and_transcript():
    breaks = {"a": 1, "b": 3, "c": None, "d": 3}
    own = prompt_outcome("adaptive", breaks, 5)
    (from_points,) = budget_curves(own)
    (from_attempts,) = budget_curves(own, attempts=attempts_of(breaks, 5))
    assert from_points == from_attempts
    assert [rate.numerator for rate in from_points.rates] == [1, 1, 3, 3, 3]
    assert from_points.title == "adaptive"


def test_fine_tuning_has_a_curve_for_each_setting_with_the_rate_of_each_step():
    points = [
        point(broken, spent=spent, learning_rate=rate, facts={"loss": spent})
        for rate, broken, spent in ((1e-4, [], 0), (1e-4, [1, 2], 10), (1e-4, [1], 20), (1e-3, [], 0), (1e-3, [5], 10))
    ]
    slow, fast = budget_curves(outcome("harmful", points, unit="steps"))
    assert (slow.title, fast.title) == ("harmful (learning_rate 0.0001)", "harmful (learning_rate 0.001)")
    assert slow.spent == (0, 10, 20)
    assert [rate.numerator for rate in slow.rates] == [0, 2, 1]
    assert slow.survival.num_broken == 2


def test_an_edit_has_no_curve():
    assert budget_curves(outcome("quantise", [point([1])])) == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: survival_of([]), "at least one attacked request"),
        (lambda: success_at([], 1), "at least one attacked request"),
        (lambda: held_in_attempts([]), "at least one attempt"),
        (lambda: held_in_points([AttackPoint(1, {})]), "say which requests"),
        (lambda: log_rank([], HELD), "both models to have attacked requests"),
    ],
)
def test_empty_sets_are_refused(make, message):
    with pytest.raises(DataError, match=message):
        make()
