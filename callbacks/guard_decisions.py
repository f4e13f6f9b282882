"""What a guard decides from one measurement: pure functions of settings, values and what it did before."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from framework.errors import TrainingError
from framework.guard_settings import GuardSettings, Threshold

__all__ = ["Decision", "decide", "next_weight", "violations"]


@dataclass(frozen=True)
class Decision:
    """What follows from a measurement."""

    kind: str
    """hold, stop, roll_back, set_weight, or at_max_weight: a threshold is crossed and the weight rises no further."""
    reason: str
    """Says which thresholds are crossed and by what values; that all hold, when they do."""
    weight: float | None = None
    """The new weight of the guarded method, for set_weight."""


def violations(settings: GuardSettings, values: Mapping[str, float]) -> dict[str, float]:
    """Return how far each guarded metric is on the wrong side of its bound; below 0 on the right one.

    Args:
        settings: of the guard.
        values: every metric by name.
    """
    return {bound.metric: bound.violation(values[bound.metric]) for bound in settings.thresholds}


def next_weight(weight: float, violation: float, *, step: float, low: float, high: float) -> float:
    """Return the weight after one step of projected dual ascent: ``weight + step x violation``, kept in bounds.

    Args:
        weight: so far.
        violation: of the constraint; below 0 where it holds, which lowers the weight again.
        step: weight per unit of violation.
        low: least weight.
        high: largest weight.

    Example:
        >>> [next_weight(1.0, v, step=2.0, low=1.0, high=3.0) for v in (0.5, 4.0, -4.0)]
        [2.0, 3.0, 1.0]
    """
    return min(high, max(low, weight + step * violation))


def decide(
    settings: GuardSettings, values: Mapping[str, float], *, roll_backs: int, weight: float | None, low: float | None
) -> Decision:
    """Return what follows from ``values``; one that is not finite has crossed its threshold.

    Args:
        settings: of the guard.
        values: every metric by name.
        roll_backs: made so far.
        weight: of the guarded method, for ``raise_weight``.
        low: least weight of it.

    Raises:
        TrainingError: a guarded value is not finite, and no weight follows from it.
    """
    found = violations(settings, values)
    crossed = [bound for bound in settings.thresholds if _is_crossed(bound, values[bound.metric])]
    reason = "; ".join(_reason(bound, values[bound.metric]) for bound in crossed) or "every threshold holds"
    if settings.action == "raise_weight" and weight is not None and low is not None and found:
        if not all(map(math.isfinite, found.values())):
            raise TrainingError(
                f"Expected every guarded value to be finite, but got: {reason}. Lower the learning rate, or lower "
                "`weight_step` or `max_weight` of the guard."
            )
        # The constraint that is worst off decides: the units of the metrics differ and are not added up.
        new = next_weight(
            weight, max(found.values()), step=settings.weight_step, low=low, high=max(low, settings.max_weight)
        )
        kind = "set_weight" if new != weight else "at_max_weight" if crossed and new >= settings.max_weight else "hold"
        return Decision(kind, reason, new)
    if not crossed or not settings.acts:
        return Decision("hold", reason)
    if settings.action == "roll_back" and roll_backs < settings.max_roll_backs:
        return Decision("roll_back", reason)
    if settings.action == "roll_back":
        reason += f"; {roll_backs} roll backs were made before"
    return Decision("stop", reason)


def _is_crossed(bound: Threshold, value: float) -> bool:
    # A model that answers with NaN compares as false with any bound; it is not safe for that.
    return not math.isfinite(value) or bound.violation(value) > 0


def _reason(bound: Threshold, value: float) -> str:
    if not math.isfinite(value):
        return f"{bound.metric} is {value}, not finite"
    return f"{bound.metric} {value:.4g} is {'below' if bound.is_lower else 'above'} {bound.bound:g}"
