"""Statistics of a comparison: intervals of rates, paired tests per prompt, spread over seeds, correction, winners.

Outcomes are 0 or 1 per prompt; those of several seeds are ``(seeds, prompts)``, the same prompts in the same order for
both methods. What scipy or statsmodels have is taken from them. Two kinds of noise are kept apart: *prompts* (would
other prompts give the same answer for these trained models?) and *seeds* (would training again?). A verdict needs both
to be outside the noise, so a method is never called better on less than ``MIN_SEEDS`` seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from experiments.power import ALPHA, MIN_SEEDS, detectable_difference
from framework.errors import DataError
from framework.evaluation.rates import Interval, wilson_interval

__all__ = [
    "MIN_SEEDS",
    "Comparison",
    "Interval",
    "McNemar",
    "compare_pair",
    "hierarchical_interval",
    "holm",
    "mark_winner",
    "mcnemar_exact",
    "paired_interval",
    "paired_outcomes",
    "pooled_interval",
    "seed_interval",
    "wilson_interval",
]

RESAMPLES = 9999

Verdict = Literal["better", "worse", "unclear"]


class McNemar(NamedTuple):
    """The exact McNemar test of paired outcomes, every prompt counted once."""

    only_baseline: int
    """Prompts for which the baseline is more often 1."""
    only_candidate: int
    p_value: float
    """Two-sided."""


@dataclass(frozen=True)
class Comparison:
    """A candidate against a baseline on the same prompts, differences as candidate minus baseline."""

    num_prompts: int
    num_seeds: int
    baseline: float
    """Rate over all seeds."""
    candidate: float
    difference: float
    low: float
    """Paired bootstrap over prompts, 95 %."""
    high: float
    only_baseline: int
    """Prompts for which the baseline is 1 in more seeds."""
    only_candidate: int
    mcnemar_p: float
    """Exact and two-sided over prompts, each counted once: about these trained models."""
    seed_low: float | None
    """t interval of the difference over paired seeds, 95 %; None below ``MIN_SEEDS``."""
    seed_high: float | None
    seed_p: float | None
    """Paired t test over seeds; None below ``MIN_SEEDS``."""
    hierarchical_low: float | None
    """Bootstrap over seeds and prompts, 95 %, a second view; None below ``MIN_SEEDS`` or not asked for."""
    hierarchical_high: float | None
    detectable: float
    """Smallest difference that as many prompts, differing as often, show with 80 % power at 5 %."""

    @property
    def p_value(self) -> float | None:
        """The larger of both p-values, which a verdict goes by; None below ``MIN_SEEDS``."""
        return None if self.seed_p is None else max(self.mcnemar_p, self.seed_p)


def mcnemar_exact(baseline: ArrayLike, candidate: ArrayLike) -> McNemar:
    """Return the exact (binomial) McNemar test over prompts.

    With several seeds a prompt counts once, for the side that is ahead over its seeds: the seeds of one prompt are no
    independent witnesses, and counting each would find differences where a few prompts flip every time.

    Args:
        baseline: ``(prompts,)`` or ``(seeds, prompts)``.
        candidate: of the same shape.

    Raises:
        DataError: the shapes differ, there are no pairs, or an outcome is neither 0 nor 1.
    """
    first, second = paired_outcomes(baseline, candidate)
    ahead = (second - first).sum(axis=0)
    only_baseline, only_candidate = int((ahead < 0).sum()), int((ahead > 0).sum())
    changed = only_baseline + only_candidate
    p_value = float(stats.binomtest(only_baseline, changed, 0.5).pvalue) if changed else 1.0
    return McNemar(only_baseline, only_candidate, p_value)


def pooled_interval(outcomes: ArrayLike, *, confidence: float = 0.95) -> Interval:
    """Return the Wilson interval of a rate over the replies of several seeds.

    Replies of several models to one prompt are alike, so they count as fewer: the number of replies is divided by the
    design effect, seeds times the variance of the prompts' means over ``rate (1 - rate)``, between 1 and the number of
    seeds (Kish, Survey Sampling, 1965). One seed gives the plain interval.

    Args:
        outcomes: 0 or 1, ``(seeds, prompts)``.
        confidence: coverage in (0, 1).

    Raises:
        DataError: as ``mcnemar_exact``.

    Example:
        >>> alike = pooled_interval([[1, 0, 0, 0]] * 3)
        >>> alike == pooled_interval([[1, 0, 0, 0]])
        True
    """
    values, _ = paired_outcomes(outcomes, outcomes)
    seeds = values.shape[0]
    rate = float(values.mean())
    independent = rate * (1 - rate) / seeds
    ratio = float(values.mean(axis=0).var()) / independent if independent else seeds
    effective = values.size / min(max(ratio, 1.0), float(seeds))
    return wilson_interval(rate * effective, effective, confidence=confidence)


def paired_interval(
    baseline: ArrayLike, candidate: ArrayLike, *, confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Return the percentile bootstrap interval of the difference of rates; prompts are drawn, seeds kept together.

    Args:
        baseline: ``(prompts,)`` or ``(seeds, prompts)``.
        candidate: of the same shape.
        confidence: coverage in (0, 1).
        resamples: draws.
        seed: of the draws.

    Raises:
        DataError: as ``mcnemar_exact``.
    """
    first, second = paired_outcomes(baseline, candidate)
    # Seeds stay together, so only a prompt's sum over them counts: far fewer kinds of prompts than rows of outcomes.
    sums = (second - first).sum(axis=0, keepdims=True)
    kinds, shares = _resample(sums, np.random.default_rng(seed), resamples)
    return _quantiles(shares @ kinds[0] / first.shape[0], confidence)


def seed_interval(
    means: Sequence[float], *, confidence: float = 0.95, floor: Interval | None = None
) -> Interval | None:
    """Return the t interval of the mean over seeds, or None with fewer than ``MIN_SEEDS``.

    Args:
        means: one per seed.
        confidence: coverage in (0, 1).
        floor: an interval the result never lies inside of, such as the Wilson interval of all replies: three seeds
            that happen to give the same rate have no spread, and their t interval would be a point.

    Raises:
        DataError: a mean is not finite.
    """
    values = np.asarray(means, dtype=float)
    if not np.isfinite(values).all():
        raise DataError(f"Expected `means` to be finite numbers, but got {list(means)!r}.")
    if len(values) < MIN_SEEDS:
        return None
    mean, error = float(values.mean()), float(stats.sem(values))
    low = high = mean
    if error > 0:
        low, high = map(float, stats.t.interval(confidence, len(values) - 1, loc=mean, scale=error))
    return Interval(low, high) if floor is None else Interval(min(low, floor.low), max(high, floor.high))


def hierarchical_interval(
    outcomes: ArrayLike, *, confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Interval | None:
    """Return the percentile bootstrap interval of a mean with seeds drawn first and prompts second.

    Args:
        outcomes: ``(seeds, prompts)``; outcomes of one method, or differences of two.
        confidence: coverage in (0, 1).
        resamples: draws.
        seed: of the draws.

    Returns:
        The interval, or None with fewer than ``MIN_SEEDS`` seeds.

    Raises:
        DataError: not two axes, or an empty one.
    """
    values = np.asarray(outcomes, dtype=float)
    if values.ndim != 2 or not values.size:
        raise DataError(f"Expected `outcomes` to be (seeds, prompts), but got the shape {values.shape}.")
    num_seeds = values.shape[0]
    if num_seeds < MIN_SEEDS:
        return None
    draw = np.random.default_rng(seed)
    seeds = draw.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size=resamples) / num_seeds
    kinds, shares = _resample(values, draw, resamples)
    return _quantiles(((seeds @ kinds) * shares).sum(axis=1), confidence)


def seed_p_value(baseline: Sequence[float], candidate: Sequence[float]) -> float | None:
    """Return the p-value of the paired t test over seeds, or None with fewer than ``MIN_SEEDS``.

    Seeds that all show the same difference have no spread: the p-value is 0, or 1 if that difference is 0.
    """
    differences = np.asarray(candidate, dtype=float) - np.asarray(baseline, dtype=float)
    if len(differences) < MIN_SEEDS:
        return None
    if np.ptp(differences) < 1e-12:
        return 1.0 if abs(differences[0]) < 1e-12 else 0.0
    return float(stats.ttest_rel(candidate, baseline).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values corrected by Holm's step-down procedure, in their order.

    Raises:
        DataError: none, or one outside 0 to 1.
    """
    values = np.asarray(p_values, dtype=float)
    if not values.size or not ((values >= 0) & (values <= 1)).all():
        raise DataError(f"Expected `p_values` to be one or more numbers from 0 to 1, but got {list(p_values)!r}.")
    # statsmodels has it too, but collects garbage at every call, which takes a quarter of a second.
    order = np.argsort(values, kind="stable")
    steps = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1))
    corrected = np.empty_like(values)
    corrected[order] = np.minimum(steps, 1.0)
    return [float(p) for p in corrected]


def compare_pair(
    baseline: ArrayLike,
    candidate: ArrayLike,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    with_hierarchical: bool = True,
) -> Comparison:
    """Return everything about two methods' outcomes on the same prompts and seeds.

    Args:
        baseline: 0 or 1, ``(seeds, prompts)``; ``(prompts,)`` is one seed.
        candidate: of the same shape.
        resamples: draws of each bootstrap.
        seed: of the draws.
        with_hierarchical: False leaves out the second view, half of the time this takes.

    Raises:
        DataError: as ``mcnemar_exact``.
    """
    first, second = paired_outcomes(baseline, candidate)
    test, interval = mcnemar_exact(first, second), paired_interval(first, second, resamples=resamples, seed=seed)
    means = first.mean(axis=1), second.mean(axis=1)
    over_seeds = seed_interval(list(means[1] - means[0]))
    nested = hierarchical_interval(second - first, resamples=resamples, seed=seed) if with_hierarchical else None
    return Comparison(
        num_prompts=first.shape[1],
        num_seeds=first.shape[0],
        baseline=float(first.mean()),
        candidate=float(second.mean()),
        difference=float((second - first).mean()),
        low=interval.low,
        high=interval.high,
        only_baseline=test.only_baseline,
        only_candidate=test.only_candidate,
        mcnemar_p=test.p_value,
        seed_low=over_seeds.low if over_seeds else None,
        seed_high=over_seeds.high if over_seeds else None,
        seed_p=seed_p_value(list(means[0]), list(means[1])),
        hierarchical_low=nested.low if nested else None,
        hierarchical_high=nested.high if nested else None,
        detectable=detectable_difference(first.shape[1], (test.only_baseline + test.only_candidate) / first.shape[1]),
    )


def decide(p_value: float | None, difference: float, *, higher_is_better: bool, alpha: float = ALPHA) -> Verdict | None:
    """Return how a candidate stands to its baseline by a corrected p-value; None where there is none."""
    if p_value is None:
        return None
    if p_value > alpha or difference == 0:
        return "unclear"
    return "better" if (difference > 0) == higher_is_better else "worse"


def mark_winner(outcomes: Mapping[str, ArrayLike], *, higher_is_better: bool, alpha: float = ALPHA) -> str | None:
    """Return the method that is outside the noise of every other one, or None.

    It has the best mean, and against each of the others both tests (McNemar over prompts, t over seeds) stay below
    ``alpha`` after Holm's correction.

    Args:
        outcomes: method to outcomes ``(seeds, prompts)``, the same prompts and seeds for all.
        higher_is_better: whether 1 is the wished-for outcome.
        alpha: level.

    Raises:
        DataError: as ``mcnemar_exact``.
    """
    if len(outcomes) < 2:
        return None
    tables = {name: np.atleast_2d(np.asarray(table, dtype=float)) for name, table in outcomes.items()}
    sign = 1 if higher_is_better else -1
    best = max(tables, key=lambda name: sign * float(tables[name].mean()))
    p_values = [_decisive_p(tables[name], tables[best]) for name in tables if name != best]
    known = [p for p in p_values if p is not None]
    if len(known) < len(p_values) or max(holm(known)) > alpha:
        return None
    return best


def _decisive_p(baseline: NDArray[Any], candidate: NDArray[Any]) -> float | None:
    first, second = paired_outcomes(baseline, candidate)
    over_seeds = seed_p_value(list(first.mean(axis=1)), list(second.mean(axis=1)))
    return None if over_seeds is None else max(over_seeds, mcnemar_exact(first, second).p_value)


def _resample(values: NDArray[Any], draw: np.random.Generator, resamples: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the different columns of ``(seeds, prompts)``, and the share of each in every resample of the prompts.

    Prompts with equal outcomes in all seeds are interchangeable, so drawing how often each kind occurs is drawing
    prompts, and some hundred times faster than scipy's bootstrap.
    """
    columns, counts = np.unique(values, axis=1, return_counts=True)
    total = values.shape[1]
    return columns, draw.multinomial(total, counts / total, size=resamples) / total


def _quantiles(means: NDArray[Any], confidence: float) -> Interval:
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(low), float(high))


def paired_outcomes(baseline: ArrayLike, candidate: ArrayLike) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return both as float arrays ``(seeds, prompts)``.

    Raises:
        DataError: the shapes differ, there are no pairs, or an outcome is neither 0 nor 1.
    """
    first, second = (np.atleast_2d(np.asarray(values, dtype=float)) for values in (baseline, candidate))
    if first.shape != second.shape:
        raise DataError(f"Expected outcomes of equal shape, but got {first.shape} and {second.shape}.")
    if not first.size:
        raise DataError("Expected at least one pair of outcomes, but got none.")
    for values in (first, second):
        if not np.isin(values, (0.0, 1.0)).all():
            raise DataError("Expected every outcome to be 0 or 1, but got others.")
    return first, second
