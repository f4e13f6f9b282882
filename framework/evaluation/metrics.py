"""Rates and means over tokens as torchmetrics classes, which add up over batches and processes."""

from __future__ import annotations

import math

import torch
from scipy import stats
from torchmetrics import Metric

from framework.errors import DataError
from framework.evaluation.rates import CONFIDENCE, Interval, Mean, Rate, rates_from_records, wilson_interval

__all__ = [
    "Interval",
    "Mean",
    "MeanMetricWithInterval",
    "Rate",
    "RateMetric",
    "rates_from_records",
    "wilson_interval",
]


class RateMetric(Metric):
    """Share of hits; counts are summed over batches and processes."""

    full_state_update = False
    higher_is_better = None
    numerator: torch.Tensor
    denominator: torch.Tensor

    def __init__(self) -> None:
        """Start at 0 of 0."""
        super().__init__()
        self.add_state("numerator", default=torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("denominator", default=torch.tensor(0), dist_reduce_fx="sum")

    def update(self, hits: torch.Tensor) -> None:
        """Count ``hits``, bool ``(batch,)``."""
        self.numerator += hits.bool().sum()
        self.denominator += hits.numel()

    def compute(self) -> torch.Tensor:
        """Return the rate, scalar.

        Raises:
            DataError: nothing was counted.
        """
        if not int(self.denominator):
            raise DataError("Expected at least one counted item, but got a rate of 0 of 0.")
        return self.numerator / self.denominator

    def rate(self, name: str) -> Rate:
        """Return counts and interval, summed over processes (every process must call it)."""
        with self.sync_context():
            return Rate.of(name, int(self.numerator), int(self.denominator))


class MeanMetricWithInterval(Metric):
    """Mean of values that come in groups, for example of token losses in replies.

    value = sum of sums / sum of counts. The interval treats groups as independent and the values inside a group as not:
    variance = n / (n - 1) * sum over groups of (sum_i - value * count_i)^2 / (sum of counts)^2, t-distributed with
    n - 1 degrees of freedom. With groups of one value this is the ordinary t interval of a mean.
    """

    full_state_update = False
    higher_is_better = None
    moments: torch.Tensor

    def __init__(self) -> None:
        """Start empty."""
        super().__init__()
        # Groups, sums, counts, sums^2, sums*counts, counts^2: in float64, for the variance is a difference.
        self.add_state("moments", default=torch.zeros(6, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, sums: torch.Tensor, counts: torch.Tensor) -> None:
        """Add groups by their ``sums`` and ``counts`` of values, both ``(groups,)``."""
        s, t = sums.detach().double(), counts.detach().double()
        terms = [torch.ones_like(s), s, t, s * s, s * t, t * t]
        self.moments += torch.stack([term.sum() for term in terms]).to(self.moments.device)

    def compute(self) -> torch.Tensor:
        """Return the mean, scalar.

        Raises:
            DataError: no values.
        """
        if not float(self.moments[2]):
            raise DataError("Expected at least one value, but got a mean of none.")
        return self.moments[1] / self.moments[2]

    def mean(self, name: str, *, is_shared: bool = True) -> Mean:
        """Return mean, counts and interval.

        Args:
            name: of the quantity, for errors and tables.
            is_shared: over all processes, every one of which must call it; False takes this process's values alone.

        Raises:
            DataError: no values.
        """
        with self.sync_context(should_sync=is_shared):
            groups, sums, counts, ss, st, tt = self.moments.tolist()
        if not counts:
            raise DataError(f"Expected `{name}` to be over at least one value, but got none.")
        value, num_groups = sums / counts, int(groups)
        if num_groups < 2:
            return Mean(name, value, counts, num_groups, None, None)
        residual = max(0.0, ss - 2 * value * st + value * value * tt)
        error = math.sqrt(num_groups / (num_groups - 1) * residual) / counts
        half = float(stats.t.ppf((1 + CONFIDENCE) / 2, num_groups - 1)) * error
        return Mean(name, value, counts, num_groups, value - half, value + half)
