"""Is a candidate at most a margin worse than a baseline? Score intervals of the difference of paired rates.

A test that finds no difference does not show that there is none: with few prompts it finds nothing. Here the question
is turned round: the whole interval of the difference must lie on the near side of the margin.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from numpy.typing import ArrayLike
from scipy import optimize, stats

from experiments.statistics import Interval, paired_outcomes
from framework.errors import DataError

__all__ = ["NonInferiority", "non_inferiority", "paired_score_interval", "pairs_needed"]

Decision = Literal["pass", "worse", "unclear"]


class NonInferiority(NamedTuple):
    """What is known about a loss against a margin; losses above 0 are bad."""

    decision: Decision
    """pass: the loss is below the margin; worse: it is above; unclear: the interval holds the margin."""
    num_pairs: int
    baseline: float
    candidate: float
    loss: float
    low: float
    """Lower end of the interval of the loss."""
    high: float
    margin: float
    p_value: float
    """One-sided, of a loss at least as small if the true loss were the margin."""


def non_inferiority(
    baseline: ArrayLike, candidate: ArrayLike, *, margin: float, higher_is_better: bool, alpha: float = 0.05
) -> NonInferiority:
    """Return whether the candidate loses less than ``margin`` on the same prompts.

    Args:
        baseline: 0 or 1, ``(prompts,)``.
        candidate: of the same shape.
        margin: largest loss accepted, a share in (0, 1).
        higher_is_better: whether 1 is the wished-for outcome.
        alpha: one-sided level; the interval shown covers ``1 - 2 alpha``.

    Raises:
        DataError: outcomes that do not pair up, or a margin out of range.
    """
    if not 0 < margin < 1:
        raise DataError(f"Expected `margin` to be a share between 0 and 1, but got {margin!r}.")
    first, second = paired_outcomes(baseline, candidate)
    rates = float(first.mean()), float(second.mean())
    if higher_is_better:
        first, second = second, first
    low, high = paired_score_interval(first, second, confidence=1 - 2 * alpha)
    loss = float((second - first).mean())
    gained, lost = int((second > first).sum()), int((first > second).sum())
    p_value = float(stats.norm.cdf(_tango_score(gained, lost, first.size, margin)))
    decision: Decision = "pass" if high < margin else "worse" if low > margin else "unclear"
    return NonInferiority(decision, first.size, rates[0], rates[1], loss, low, high, margin, p_value)


def pairs_needed(margin: float, *, alpha: float = 0.05) -> int:
    """Return how many pairs that never differ are needed before a loss of ``margin`` is excluded.

    Example:
        >>> pairs_needed(0.02)
        133
    """
    squared = float(stats.norm.ppf(1 - alpha)) ** 2
    return math.floor(squared * (1 - margin) / margin) + 1


def paired_score_interval(baseline: ArrayLike, candidate: ArrayLike, *, confidence: float = 0.95) -> Interval:
    """Return Tango's score interval of the difference of paired rates (Statistics in Medicine 17, 1998).

    Unlike the bootstrap it keeps its coverage for few prompts and for none that changed: ``n`` equal pairs still leave
    room for z^2 / (n + z^2) on either side.

    Args:
        baseline: ``(prompts,)``.
        candidate: of the same shape.
        confidence: coverage in (0, 1), two-sided.

    Raises:
        DataError: outcomes that do not pair up.
    """
    first, second = paired_outcomes(baseline, candidate)
    gained, lost, count = int((second > first).sum()), int((first > second).sum()), first.size
    z, difference = float(stats.norm.ppf((1 + confidence) / 2)), (gained - lost) / count

    def beyond(delta: float) -> float:
        return _tango_score(gained, lost, count, delta)

    edge = 1 - 1e-12
    low = -1.0 if beyond(-edge) <= z else optimize.brentq(lambda d: beyond(d) - z, -edge, difference, xtol=1e-12)
    high = 1.0 if beyond(edge) >= -z else optimize.brentq(lambda d: beyond(d) + z, difference, edge, xtol=1e-12)
    return Interval(float(low), float(high))


def _tango_score(gained: int, lost: int, count: int, delta: float) -> float:
    """Return the score statistic of the difference ``delta`` at its restricted maximum likelihood estimate."""
    a = 2 * count
    b = -gained - lost + (2 * count - gained + lost) * delta
    c = -lost * delta * (1 - delta)
    share = (math.sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a)
    variance = count * (2 * share + delta * (1 - delta))
    distance = gained - lost - count * delta
    if variance <= 0:
        return 0.0 if abs(distance) < 1e-9 else math.copysign(math.inf, distance)
    return distance / math.sqrt(variance)
