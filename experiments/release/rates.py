"""Whether a rate that somebody states agrees with itself: its value and bounds with its counts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from framework.evaluation.rates import wilson_interval

__all__ = ["RATE_PARTS", "mean_problem", "rate_problem"]

RATE_PARTS = ("value", "numerator", "denominator", "low", "high")
EXACT = 1e-9
"""What floating-point sums of two machines may differ by; a rate has no other reason to."""
ROUNDED = 0.005
"""What a person loses who writes down whole per cent."""


def rate_problem(rate: Mapping[str, Any], *, is_ours: bool) -> str:
    """Return how a rate contradicts itself, the end of a sentence about it; empty if it does not.

    Every rate over prompts that Seawall writes has the Wilson 95 % interval of its counts. (An attack's rates over
    several replies to a request have another one; none of them stands in a bundle.) Other people may have computed
    another interval and rounded, which is theirs to choose.

    Args:
        rate: with value, counts and bounds.
        is_ours: whether Seawall computed it.

    Example:
        >>> rate_problem({"value": 0.0, "numerator": 9, "denominator": 10, "low": 0.0, "high": 1.0}, is_ours=False)
        'has the value 0, but its counts 9/10 give 0.9'
    """
    lacking = [part for part in RATE_PARTS if not _is_number(rate.get(part))]
    if lacking:
        return f"has no number as {' and '.join(lacking)}"
    value, hits, total, low, high = (float(rate[part]) for part in RATE_PARTS)
    allowed = EXACT if is_ours else ROUNDED
    if total < 1 or not 0 <= hits <= total:
        return f"counts {hits:g} of {total:g}"
    if abs(value - hits / total) > allowed:
        return f"has the value {value:.6g}, but its counts {hits:g}/{total:g} give {hits / total:.6g}"
    if not (0 <= low <= value + allowed and value - allowed <= high <= 1):
        return f"has the bounds {low:.6g} to {high:.6g}, which are none of its value {value:.6g}"
    wanted = wilson_interval(hits, total)
    if is_ours and max(abs(low - wanted.low), abs(high - wanted.high)) > allowed:
        return (
            f"has the bounds {low:.6g} to {high:.6g}, but the Wilson interval of its counts {hits:g}/{total:g} is "
            f"{wanted.low:.6g} to {wanted.high:.6g}"
        )
    return ""


def mean_problem(mean: Mapping[str, Any]) -> str:
    """Return how a mean contradicts itself, as ``rate_problem`` does; one without an interval cannot.

    Example:
        >>> mean_problem({"value": 2.0, "low": 2.5, "high": 3.0})
        'has the bounds 2.5 to 3, which are none of its value 2'
    """
    value, low, high = mean.get("value"), mean.get("low"), mean.get("high")
    stated = [number for number in (value, low, high) if number is not None]
    if not all(_is_number(number) for number in stated):
        return "has a value or bound that is no number"
    if len(stated) < 3 or low <= value <= high:  # type: ignore[operator]
        return ""
    return f"has the bounds {low:.6g} to {high:.6g}, which are none of its value {value:.6g}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
