"""Statistics against scipy and statsmodels, by hand-made cases, and small simulations of what they promise."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower
from statsmodels.stats.proportion import proportion_confint

from experiments.power import detectable_difference, detectable_seed_difference
from experiments.statistics import (
    Interval,
    compare_pair,
    decide,
    hierarchical_interval,
    holm,
    mark_winner,
    mcnemar_exact,
    paired_interval,
    pooled_interval,
    seed_interval,
    seed_p_value,
    wilson_interval,
)
from framework.errors import DataError

DRAW = np.random.default_rng(0)


def outcomes(rate: float, shape: tuple[int, ...] = (3, 80)) -> np.ndarray:
    return (DRAW.random(shape) < rate).astype(float)


def test_wilson_equals_statsmodels() -> None:
    for hits, total in ((0, 80), (1, 3), (40, 80), (80, 80), (17, 233)):
        expected = proportion_confint(hits, total, alpha=0.05, method="wilson")
        assert wilson_interval(hits, total) == pytest.approx(expected, abs=1e-12)


def test_mcnemar_equals_statsmodels() -> None:
    for _ in range(20):
        first, second = outcomes(0.4, (60,)), outcomes(0.5, (60,))
        table = [[int(((first == a) & (second == b)).sum()) for b in (1, 0)] for a in (1, 0)]
        found = mcnemar_exact(first, second)
        assert (found.only_baseline, found.only_candidate) == (table[0][1], table[1][0])
        assert found.p_value == pytest.approx(mcnemar(table, exact=True).pvalue, abs=1e-12)


def test_a_prompt_counts_once_however_many_seeds_say_the_same() -> None:
    first = np.zeros((3, 80))
    second = first.copy()
    second[:, :3] = 1.0
    assert mcnemar_exact(first, second) == mcnemar_exact(first[0], second[0]) == (0, 3, 0.25)
    second[0, 3], first[1, 3] = 1.0, 1.0  # one seed for each side: the prompt says nothing
    assert mcnemar_exact(first, second) == (0, 3, 0.25)


def test_the_pooled_interval_lies_between_one_seed_and_independent_replies() -> None:
    one = outcomes(0.3, (80,))
    hits = int(one.sum())
    assert pooled_interval(one) == pytest.approx(wilson_interval(hits, 80), abs=1e-12)
    assert pooled_interval(np.tile(one, (3, 1))) == pytest.approx(wilson_interval(hits, 80), abs=1e-12)
    spread_out = np.zeros((2, 80))
    spread_out[0, :20], spread_out[1, 20:40] = 1.0, 1.0  # no prompt twice
    assert pooled_interval(spread_out) == pytest.approx(wilson_interval(40, 160), abs=1e-12)
    assert pooled_interval(np.zeros((3, 80))) == pytest.approx(wilson_interval(0, 80), abs=1e-12)


def test_mcnemar_of_equal_outcomes_says_nothing() -> None:
    assert mcnemar_exact([1, 0, 1], [1, 0, 1]) == (0, 0, 1.0)


def test_tests_and_intervals_over_seeds_equal_scipy() -> None:
    first, second = [0.5, 0.6, 0.65], [0.3, 0.45, 0.5]
    assert seed_p_value(first, second) == pytest.approx(stats.ttest_rel(first, second).pvalue, abs=1e-12)
    expected = stats.t.interval(0.95, 2, loc=np.mean(first), scale=stats.sem(first))
    assert seed_interval(first) == pytest.approx(expected, abs=1e-12)


def test_holm_equals_statsmodels() -> None:
    p_values = [0.01, 0.04, 0.03, 0.5]
    assert holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1], abs=1e-12)
    assert holm(p_values) == pytest.approx([0.04, 0.09, 0.09, 0.5])


def test_below_three_seeds_there_is_nothing_over_seeds() -> None:
    assert seed_interval([0.1, 0.2]) is None
    assert seed_p_value([0.1, 0.2], [0.3, 0.4]) is None
    assert hierarchical_interval(outcomes(0.5, (2, 10))) is None
    assert detectable_seed_difference([0.1, 0.2]) is None
    found = compare_pair(outcomes(0.9, (2, 80)), outcomes(0.1, (2, 80)), resamples=99)
    assert (found.seed_low, found.seed_high, found.seed_p, found.p_value) == (None, None, None, None)
    assert found.mcnemar_p < 1e-6
    assert mark_winner({"a": outcomes(0.9, (2, 80)), "b": outcomes(0.1, (2, 80))}, higher_is_better=True) is None


def test_seeds_without_spread_do_not_make_a_point() -> None:
    assert seed_interval([0.0, 0.0, 0.0]) == (0.0, 0.0)
    assert seed_interval([0.0, 0.0, 0.0], floor=wilson_interval(0, 240)) == wilson_interval(0, 240)
    assert seed_interval([0.4, 0.5, 0.6], floor=Interval(0.49, 0.51)) == seed_interval([0.4, 0.5, 0.6])
    assert seed_p_value([0.5] * 3, [0.5] * 3) == 1.0
    assert seed_p_value([0.5] * 3, [0.4] * 3) == 0.0


def test_the_bootstrap_keeps_pairs_together() -> None:
    first = outcomes(0.5, (200,))
    shifted = np.maximum(first, outcomes(0.2, (200,)))
    low, high = paired_interval(first, shifted, resamples=999)
    assert 0 < low < (shifted - first).mean() < high
    assert paired_interval(first, first) == (0.0, 0.0)
    unpaired = DRAW.permutation(shifted)
    wide = paired_interval(first, unpaired, resamples=999)
    assert wide.high - wide.low > 1.5 * (high - low)


def test_the_bootstrap_is_that_of_scipy() -> None:
    first, second = outcomes(0.5, (3, 150)), outcomes(0.6, (3, 150))
    differences = (second - first).mean(axis=0)
    expected = stats.bootstrap(
        (differences,), np.mean, n_resamples=9999, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    assert paired_interval(first, second) == pytest.approx((expected.low, expected.high), abs=0.006)


def test_the_hierarchical_interval_is_wider_when_seeds_differ() -> None:
    same = np.tile(outcomes(0.5, (1, 100)), (3, 1))
    apart = np.concatenate([outcomes(rate, (1, 100)) for rate in (0.2, 0.5, 0.8)])
    widths = [high - low for low, high in (hierarchical_interval(x, resamples=999) for x in (same, apart))]
    assert widths[1] > 2 * widths[0]


def test_detectable_differences() -> None:
    assert detectable_difference(80, 0.2) > detectable_difference(800, 0.2)
    assert detectable_difference(1, 0.0) == 1.0
    delta, pairs = detectable_difference(400, 0.3), 400
    found = 0
    for _ in range(200):
        kinds = DRAW.choice(3, size=pairs, p=[(0.3 + delta) / 2, (0.3 - delta) / 2, 0.7])
        gained, lost = (kinds == 0).sum(), (kinds == 1).sum()
        found += stats.binomtest(int(gained), int(gained + lost)).pvalue < 0.05
    assert 0.70 < found / 200 < 0.89
    effect = TTestPower().solve_power(nobs=4, alpha=0.05, power=0.8)
    spread = [0.1, 0.2, 0.3, 0.4]
    assert detectable_seed_difference(spread) == pytest.approx(effect * np.std(spread, ddof=1), abs=1e-12)


def test_a_clear_winner_is_marked_and_a_tie_is_not() -> None:
    good, poor, poorer = outcomes(0.02), outcomes(0.6), outcomes(0.8)
    assert mark_winner({"poor": poor, "good": good, "poorer": poorer}, higher_is_better=False) == "good"
    assert mark_winner({"good": good, "same": good, "poor": poor}, higher_is_better=False) is None
    assert mark_winner({"good": good}, higher_is_better=False) is None


def test_equal_methods_win_at_most_one_time_in_twenty() -> None:
    draw, wins, rounds = np.random.default_rng(1), 0, 100
    for _ in range(rounds):
        rates = draw.beta(2, 2, size=60)
        tables = {}
        for name in "ab":
            shift = draw.normal(0, 0.05, size=(3, 1))
            tables[name] = (draw.random((3, 60)) < np.clip(rates + shift, 0, 1)).astype(float)
        wins += mark_winner(tables, higher_is_better=True) is not None
    assert wins / rounds <= 0.05


def test_verdicts() -> None:
    assert decide(0.01, -0.2, higher_is_better=False) == "better"
    assert decide(0.01, -0.2, higher_is_better=True) == "worse"
    assert decide(0.06, -0.2, higher_is_better=True) == "unclear"
    assert decide(0.0, 0.0, higher_is_better=True) == "unclear"
    assert decide(None, -0.2, higher_is_better=True) is None


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: mcnemar_exact([1, 0], [1]), r"Expected outcomes of equal shape, but got \(1, 2\) and \(1, 1\)"),
        (lambda: mcnemar_exact([], []), "Expected at least one pair of outcomes, but got none"),
        (lambda: mcnemar_exact([0.5], [1]), "Expected every outcome to be 0 or 1, but got others"),
        (lambda: seed_interval([0.1, float("nan"), 0.2]), "Expected `means` to be finite numbers, but got"),
        (lambda: hierarchical_interval([1, 0]), r"Expected `outcomes` to be \(seeds, prompts\), but got the shape"),
        (lambda: holm([]), "Expected `p_values` to be one or more numbers from 0 to 1, but got"),
        (lambda: holm([1.5]), r"but got \[1.5\]"),
        (lambda: detectable_difference(0, 0.5), "Expected `num_pairs` >= 1 and `discordant` from 0 to 1, but got 0"),
    ],
)
def test_bad_numbers_are_refused(call, expected) -> None:
    with pytest.raises(DataError, match=expected):
        call()
