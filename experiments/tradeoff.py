"""Trade-offs between safety, usefulness and cost: Pareto front, hypervolume, knee, safety tax.

Points are ``(points, objectives)``; ``maximise`` says per objective whether more is better. All functions are pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from framework.errors import DataError

__all__ = [
    "OBJECTIVES",
    "Objective",
    "Tradeoff",
    "TradeoffPoint",
    "analyse_tradeoff",
    "dominators",
    "hypervolume",
    "knee",
    "pareto_front",
    "safety_tax",
]


class Objective(NamedTuple):
    """One axis of a trade-off."""

    key: str
    """Of the metric, or of the cost as ``cost/<key>``."""
    title: str
    higher_is_better: bool
    worst: float | None = None
    """Coordinate of the hypervolume's reference point; None takes the worst value seen."""
    best: float | None = None
    """Coordinate of the ideal point; None takes the best value seen."""


OBJECTIVES = (
    Objective("attack_success", "attack success", False, 1.0, 0.0),
    Objective("over_refusal", "over-refusal", False, 1.0, 0.0),
    Objective("task_accuracy", "task accuracy", True, 0.0, 1.0),
    Objective("cost/fit_seconds", "preparing and training", False),
)
"""What methods are weighed on; those that were not measured are left out."""


@dataclass(frozen=True)
class TradeoffPoint:
    """One method in the trade-off."""

    name: str
    values: dict[str, float]
    """By objective."""
    dominated_by: tuple[str, ...]
    """Methods at least as good in everything and better in something; empty on the front."""
    is_knee: bool
    safety_tax: float | None
    """Points of utility lost per point of attack success avoided against the baseline; None where none is avoided."""

    @property
    def is_dominated(self) -> bool:
        """Whether some other method is better and nowhere worse."""
        return bool(self.dominated_by)


@dataclass(frozen=True)
class Tradeoff:
    """All methods of a comparison, weighed."""

    objectives: tuple[Objective, ...]
    points: tuple[TradeoffPoint, ...]
    hypervolume: float
    """Share of the box between the reference and the ideal point that the front dominates, 0 to 1."""
    left_out: dict[str, tuple[str, ...]]
    """Methods that lack an objective the others have, with what they lack."""


def analyse_tradeoff(
    values: Mapping[str, Mapping[str, float | None]],
    *,
    reference: str,
    objectives: Sequence[Objective] = OBJECTIVES,
    safety: str = "attack_success",
    utility: str = "task_accuracy",
) -> Tradeoff:
    """Return who dominates whom, the knee, the hypervolume and everyone's safety tax.

    Args:
        values: method to objective to value; a value that was not measured is None or absent.
        reference: method the safety tax is against.
        objectives: axes; one that no method has is left out.
        safety: objective that safety tax avoids, lower is better.
        utility: objective that it pays with, higher is better.

    Raises:
        DataError: no method, or none that has every objective the others have.
    """
    used = tuple(o for o in objectives if any(_known(row.get(o.key)) for row in values.values()))
    left_out = {
        name: missing
        for name, row in values.items()
        if (missing := tuple(o.key for o in used if not _known(row.get(o.key))))
    }
    names = [name for name in values if name not in left_out]
    if not names or not used:
        raise DataError(f"Expected a method with every objective, but got {left_out or 'none'}.")
    table = np.array([[values[name][o.key] for o in used] for name in names], dtype=float)
    maximise = [o.higher_is_better for o in used]
    beaten = dominators(table, maximise=maximise)
    at_knee = knee(table, maximise=maximise)
    base = values.get(reference, {})
    points = tuple(
        TradeoffPoint(
            name,
            {o.key: float(value) for o, value in zip(used, row, strict=True)},
            tuple(names[other] for other in beaten[number]),
            number == at_knee,
            _tax(base, values[name], safety, utility) if name != reference else None,
        )
        for number, (name, row) in enumerate(zip(names, table, strict=True))
    )
    return Tradeoff(used, points, _share_dominated(table, used), left_out)


def dominators(points: ArrayLike, *, maximise: Sequence[bool]) -> list[tuple[int, ...]]:
    """Return for each point the indices of those at least as good everywhere and better somewhere.

    Raises:
        DataError: the shape does not fit ``maximise``, or a value is not finite.

    Example:
        >>> dominators([[0.1, 0.8], [0.2, 0.7]], maximise=[False, True])
        [(), (0,)]
    """
    costs = _costs(points, maximise)
    as_good = (costs[:, None, :] <= costs[None, :, :]).all(axis=-1)
    better = (costs[:, None, :] < costs[None, :, :]).any(axis=-1)
    beats: NDArray[Any] = np.asarray(as_good & better)
    return [tuple(int(i) for i in np.flatnonzero(beats[:, number])) for number in range(len(costs))]


def pareto_front(points: ArrayLike, *, maximise: Sequence[bool]) -> list[bool]:
    """Return for each point whether no other dominates it; equal points are all on the front.

    Raises:
        DataError: as ``dominators``.
    """
    return [not beaten for beaten in dominators(points, maximise=maximise)]


def hypervolume(points: ArrayLike, reference: Sequence[float], *, maximise: Sequence[bool]) -> float:
    """Return the volume dominated by ``points`` and bounded by the reference point; exact, by slicing.

    Args:
        points: ``(points, objectives)``; those not better than the reference everywhere add nothing.
        reference: one worst value per objective.
        maximise: per objective.

    Raises:
        DataError: as ``dominators``.

    Example:
        >>> hypervolume([[0.5, 0.5]], [1.0, 0.0], maximise=[False, True])
        0.25
    """
    costs = _costs(points, maximise)
    worst = _costs([reference], maximise)[0]
    return _volume(costs[(costs < worst).all(axis=1)], worst)


def _volume(costs: NDArray[Any], worst: NDArray[Any]) -> float:
    if not len(costs):
        return 0.0
    if costs.shape[1] == 1:
        return float(worst[0] - costs.min())
    order = costs[np.argsort(costs[:, -1], kind="stable")]
    ends = np.append(order[1:, -1], worst[-1])
    total = 0.0
    for number, (start, end) in enumerate(zip(order[:, -1], ends, strict=True), start=1):
        if end > start:  # between two heights the slice is the same
            total += float(end - start) * _volume(order[:number, :-1], worst[:-1])
    return total


def knee(points: ArrayLike, *, maximise: Sequence[bool]) -> int | None:
    """Return the point of the front that bulges most beyond the plane through its extremes.

    Objectives are scaled to 0..1 over the front; in two dimensions this is the largest distance from the line between
    the two ends. None with fewer than three different points on the front, or when nothing bulges.

    Raises:
        DataError: as ``dominators``.
    """
    costs = _costs(points, maximise)
    front = np.flatnonzero(pareto_front(points, maximise=maximise))
    if len(np.unique(costs[front], axis=0)) < 3:
        return None
    span = np.ptp(costs[front], axis=0)
    varying = span > 0
    scaled = (costs[front][:, varying] - costs[front][:, varying].min(axis=0)) / span[varying]
    # The plane through the ends sums to 1 when one objective is worst and the others best; smaller sums lie beyond it.
    sums = scaled.sum(axis=1)
    best = int(np.argmin(sums))
    return int(front[best]) if sums[best] < 1 - 1e-12 else None


def safety_tax(*, utility_lost: float, attack_success_avoided: float) -> float | None:
    """Return the points of utility lost per point of attack success avoided; below 0 both got better.

    None where no attack success is avoided: there is nothing the tax was paid for.

    Example:
        >>> safety_tax(utility_lost=0.125, attack_success_avoided=0.5)
        0.25
    """
    return utility_lost / attack_success_avoided if attack_success_avoided > 0 else None


def _tax(base: Mapping[str, float | None], row: Mapping[str, float | None], safety: str, utility: str) -> float | None:
    before, after = (base.get(safety), base.get(utility)), (row.get(safety), row.get(utility))
    if before[0] is None or before[1] is None or after[0] is None or after[1] is None:
        return None
    return safety_tax(utility_lost=before[1] - after[1], attack_success_avoided=before[0] - after[0])


def _share_dominated(table: NDArray[Any], objectives: Sequence[Objective]) -> float:
    """Return the hypervolume in units of the box between reference and ideal; a flat axis counts as fully dominated."""
    worst, scaled = [], []
    for column, objective in zip(table.T, objectives, strict=True):
        sign = -1.0 if objective.higher_is_better else 1.0
        costs = sign * column
        far = sign * objective.worst if objective.worst is not None else float(costs.max())
        near = sign * objective.best if objective.best is not None else float(costs.min())
        if far > near:
            scaled.append((costs - near) / (far - near))
            worst.append(1.0)
    if not scaled:
        return 1.0
    return hypervolume(np.stack(scaled, axis=1), worst, maximise=[False] * len(worst))


def _known(value: float | None) -> bool:
    return value is not None and bool(np.isfinite(value))


def _costs(points: ArrayLike, maximise: Sequence[bool]) -> NDArray[Any]:
    """Return the points with every objective turned so that less is better."""
    values = np.asarray(points, dtype=float)
    if values.ndim != 2 or not values.size or values.shape[1] != len(maximise):
        raise DataError(f"Expected `points` to be (points, {len(maximise)}), but got the shape {values.shape}.")
    if not np.isfinite(values).all():
        raise DataError("Expected every value of `points` to be finite, but got others.")
    return np.where(np.asarray(maximise), -values, values)
