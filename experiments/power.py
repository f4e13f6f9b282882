"""What a comparison of this size could have seen: the smallest difference it shows with 80 % power."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
from scipy import optimize, stats

from framework.errors import DataError

__all__ = ["ALPHA", "MIN_SEEDS", "POWER", "detectable_difference", "detectable_seed_difference"]

MIN_SEEDS = 3
"""Fewest seeds over which an interval is given or a winner named."""
ALPHA = 0.05
POWER = 0.8


def detectable_difference(num_pairs: int, discordant: float, *, alpha: float = ALPHA, power: float = POWER) -> float:
    """Return the smallest difference of paired rates that McNemar's test finds with the given power.

    Solves delta sqrt(n) = z(1 - alpha/2) sqrt(psi) + z(power) sqrt(psi - delta^2) (Connor, Biometrics 43, 1987), where
    psi is the share of pairs that differ, at least delta.

    Args:
        num_pairs: at least 1.
        discordant: share of pairs that differ, 0 to 1.
        alpha: two-sided level.
        power: chance to find it.

    Returns:
        A share, at most 1.

    Raises:
        DataError: a number out of range.

    Example:
        >>> round(detectable_difference(80, 0.2), 3)
        0.138
    """
    if num_pairs < 1 or not 0 <= discordant <= 1:
        raise DataError(f"Expected `num_pairs` >= 1 and `discordant` from 0 to 1, but got {num_pairs}, {discordant}.")
    level, chance = float(stats.norm.ppf(1 - alpha / 2)), float(stats.norm.ppf(power))

    def missing(delta: float) -> float:
        share = max(discordant, delta)
        return level * math.sqrt(share) + chance * math.sqrt(max(0.0, share - delta**2)) - delta * math.sqrt(num_pairs)

    return 1.0 if missing(1.0) >= 0 else float(optimize.brentq(missing, 1e-12, 1.0))


def detectable_seed_difference(
    differences: Sequence[float], *, alpha: float = ALPHA, power: float = POWER
) -> float | None:
    """Return the smallest mean difference that as many seeds with this spread show; None below ``MIN_SEEDS``.

    Args:
        differences: one per seed.
        alpha: two-sided level of the paired t test.
        power: chance to find it.
    """
    if len(differences) < MIN_SEEDS:
        return None
    spread = float(np.std(np.asarray(differences, dtype=float), ddof=1))
    return _detectable_effect(len(differences), alpha, power) * spread


@functools.cache  # a study asks for the same few numbers of seeds a hundred times, at 8 ms each
def _detectable_effect(num_seeds: int, alpha: float, power: float) -> float:
    """Return the mean difference, in standard deviations, that a paired t test over so many seeds finds."""
    from statsmodels.stats.power import TTestPower

    effect = TTestPower().solve_power(nobs=num_seeds, alpha=alpha, power=power, alternative="two-sided")
    return float(np.squeeze(effect))
