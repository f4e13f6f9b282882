"""How far judges agree with each other and with people: kappa, alpha, F1, AUROC, calibration, with 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats

from framework.errors import DataError
from framework.evaluation.rates import CONFIDENCE, Interval

__all__ = [
    "Bin",
    "Confusion",
    "Estimate",
    "accuracy",
    "auroc",
    "bootstrap_interval",
    "calibration_bins",
    "calibration_error",
    "cohen_kappa",
    "f1_score",
    "krippendorff_alpha",
]

RESAMPLES = 2000
Counts = npt.NDArray[np.float64]


class Estimate(NamedTuple):
    """A figure with its 95 % interval, or the reason why there is none."""

    value: float | None
    low: float | None = None
    high: float | None = None
    reason: str = ""
    """Why ``value`` is None."""


class Confusion(NamedTuple):
    """Counts of two yes-or-no opinions."""

    both: int
    """Yes by both."""
    first_only: int
    second_only: int
    neither: int

    @classmethod
    def of(cls, first: Sequence[bool], second: Sequence[bool]) -> Confusion:
        """Return the counts of two equally long sequences.

        Raises:
            DataError: the lengths differ, or nothing was judged.
        """
        if len(first) != len(second) or not first:
            raise DataError(
                f"Expected two equally long, non-empty sequences of opinions, but got {len(first)} and {len(second)}."
            )
        a, b = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
        counts = (a & b, a & ~b, ~a & b, ~a & ~b)
        return cls(*(int(count.sum()) for count in counts))

    @property
    def total(self) -> int:
        """How many were judged."""
        return sum(self)


def accuracy(confusion: Confusion) -> float:
    """Return the share on which both say the same."""
    return (confusion.both + confusion.neither) / confusion.total


def cohen_kappa(confusion: Confusion) -> Estimate:
    """Return Cohen's kappa: agreement beyond what the two would reach by chance.

    kappa = (p_o - p_e) / (1 - p_e). The interval is a parametric bootstrap over the four counts.

    Example:
        >>> round(cohen_kappa(Confusion(20, 5, 10, 15)).value, 3)
        0.4
    """
    value = float(_kappa(np.asarray([confusion], dtype=float))[0])
    if math.isnan(value):
        return Estimate(None, reason="both say the same of every reply, so chance agreement is certain")
    return Estimate(value, *bootstrap_interval(confusion, _kappa))


def f1_score(confusion: Confusion) -> Estimate:
    """Return the F1 of the first opinion, taken as the truth, by the second: 2 TP / (2 TP + FP + FN).

    Example:
        >>> round(f1_score(Confusion(20, 5, 10, 15)).value, 3)
        0.727
    """
    value = float(_f1(np.asarray([confusion], dtype=float))[0])
    if math.isnan(value):
        return Estimate(None, reason="nobody says yes of any reply")
    return Estimate(value, *bootstrap_interval(confusion, _f1))


def _kappa(counts: Counts) -> Counts:
    """Return kappa of counts ``(resamples, 4)``; NaN where it is not defined."""
    share = counts / counts.sum(axis=1, keepdims=True)
    both, first, second, neither = share.T
    chance = (both + first) * (both + second) + (neither + first) * (neither + second)
    # Rounding leaves 1e-16 of what should be nothing.
    rest = np.where(1 - chance > 1e-12, 1 - chance, np.nan)
    return (both + neither - chance) / rest


def _f1(counts: Counts) -> Counts:
    both, first, second, _ = counts.T
    size = 2 * both + first + second
    return 2 * both / np.where(size > 0, size, np.nan)


def bootstrap_interval(confusion: Confusion, figure: Callable[[Counts], Counts], *, seed: int = 0) -> Interval:
    """Return the percentile interval of a figure of the four counts, over resampled replies.

    Resampling replies with replacement makes the counts multinomial, so the counts are drawn and not the replies.

    Args:
        confusion: the counts.
        figure: counts ``(resamples, 4)`` to values ``(resamples,)``; NaN where undefined, which is left out.
        seed: of the draws.
    """
    draws = np.random.default_rng(seed).multinomial(confusion.total, np.asarray(confusion) / confusion.total, RESAMPLES)
    values = figure(draws.astype(float))
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.nanpercentile(values, [tail, 100 - tail])
    return Interval(float(low), float(high))


def auroc(labels: Sequence[bool], scores: Sequence[float]) -> Estimate:
    """Return how often a positive scores above a negative, ties counted half, with DeLong's interval.

    The interval is taken on the logit scale, so that it stays inside (0, 1).

    Ref: DeLong, DeLong and Clarke-Pearson 1988; placement values by midranks.

    Args:
        labels: truth, one per score.
        scores: higher for positive.

    Returns:
        The area; None with the reason if one class is missing.

    Example:
        >>> auroc([False, True, False, True], [0.1, 0.4, 0.35, 0.8]).value
        1.0
    """
    truth, values = np.asarray(labels, dtype=bool), np.asarray(scores, dtype=float)
    if len(truth) != len(values) or not len(truth):
        raise DataError(f"Expected as many scores as labels, at least one, but got {len(values)} and {len(truth)}.")
    positive, negative = values[truth], values[~truth]
    if not len(positive) or not len(negative):
        held = "positive" if len(positive) else "negative"
        return Estimate(None, reason=f"all {len(truth)} labels are {held}; AUROC needs both classes")
    ranks = stats.rankdata(np.concatenate([positive, negative]))
    m, n = len(positive), len(negative)
    above = (ranks[:m] - stats.rankdata(positive)) / n
    below = 1 - (ranks[m:] - stats.rankdata(negative)) / m
    area = float(above.mean())
    if m < 2 or n < 2:
        return Estimate(area)
    error = math.sqrt(float(above.var(ddof=1)) / m + float(below.var(ddof=1)) / n)
    if area in (0.0, 1.0) or error == 0:
        # No spread was seen: the rule of three on the smaller class bounds what was not seen.
        slack = min(1.0, 3 / min(m, n))
        return Estimate(area, max(0.0, area - slack), min(1.0, area + slack))
    z = float(stats.norm.ppf((1 + CONFIDENCE) / 2))
    centre, half = math.log(area / (1 - area)), z * error / (area * (1 - area))
    low, high = (1 / (1 + math.exp(-edge)) for edge in (centre - half, centre + half))
    return Estimate(area, low, high)


def krippendorff_alpha(ratings: Sequence[Sequence[bool | None]]) -> float | None:
    """Return Krippendorff's alpha for nominal ratings with missing values.

    alpha = 1 - (n - 1) * (sum of off-diagonal coincidences) / (sum over c != k of n_c n_k).

    Args:
        ratings: one row per judge, one column per reply; None where the judge does not know.

    Returns:
        1 for perfect agreement, 0 for chance; None if no reply was rated twice or all ratings are the same.

    Raises:
        DataError: the rows differ in length.

    Example:
        >>> krippendorff_alpha([[True, False, None], [True, False, True]])
        1.0
    """
    if len({len(row) for row in ratings}) > 1:
        raise DataError("Expected every judge to rate the same replies, but got rows of different lengths.")
    yes_no = [0.0, 0.0]
    disagreement = 0.0
    for column in zip(*ratings, strict=True):
        known = [bool(value) for value in column if value is not None]
        if len(known) < 2:
            continue
        yes = sum(known)
        no = len(known) - yes
        disagreement += 2 * yes * no / (len(known) - 1)
        yes_no[0] += yes
        yes_no[1] += no
    chance = 2 * yes_no[0] * yes_no[1]
    return 1 - (sum(yes_no) - 1) * disagreement / chance if chance else None


class Bin(NamedTuple):
    """Replies whose score falls in one range."""

    low: float
    high: float
    size: int
    mean_score: float
    positives: int


def calibration_bins(labels: Sequence[bool], scores: Sequence[float], *, num_bins: int = 10) -> list[Bin]:
    """Return equally wide bins of the scores with how many are positive; empty bins are left out.

    Args:
        labels: truth, one per score.
        scores: probabilities.
        num_bins: over [0, 1]; a score of 1 belongs to the last.

    Example:
        >>> [(b.size, b.positives) for b in calibration_bins([False, True, True], [0.05, 0.95, 1.0])]
        [(1, 0), (2, 2)]
    """
    truth, values = np.asarray(labels, dtype=bool), np.asarray(scores, dtype=float)
    index = np.minimum((values * num_bins).astype(int), num_bins - 1)
    found = []
    for number in range(num_bins):
        inside = index == number
        if inside.any():
            mean = float(values[inside].mean())
            edges = number / num_bins, (number + 1) / num_bins
            found.append(Bin(*edges, int(inside.sum()), mean, int(truth[inside].sum())))
    return found


def calibration_error(bins: Sequence[Bin]) -> float:
    """Return the expected calibration error: mean over replies of |mean score - share of positives| of their bin."""
    total = sum(item.size for item in bins)
    return sum(abs(item.mean_score * item.size - item.positives) for item in bins) / total
