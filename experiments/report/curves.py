"""Curves over training: what each stage logged at each step, and the refusal margin from model to model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from experiments.report.collecting import CollectedRun
from experiments.report.entries import POINTS, Variant

__all__ = ["Curve", "loss_curves", "margin_over_points", "margin_over_steps", "term_curves"]

MAX_POINTS = 60
"""Of a drawn line; more cannot be told apart in print."""
WINDOW = 5
"""Steps of the running mean that is drawn: single batches are noise."""
LOSSES = {"train/loss": "loss", "train/task_loss": "task loss"}


class Curve(NamedTuple):
    """One line: the mean over a variant's seeds."""

    name: str
    """Of the variant, or of the variant's method."""
    variant: str
    steps: NDArray[Any]
    """``(points,)``"""
    mean: NDArray[Any]
    low: NDArray[Any]
    """Lowest and highest seed."""
    high: NDArray[Any]


def loss_curves(variants: Sequence[Variant], *, key: str = "train/loss") -> list[Curve]:
    """Return one curve per variant over the last stage that trained."""
    found = []
    for variant in variants:
        series = [_series(_last_trained(entry.run), key) for entry in variant.entries]
        curve = _curve(variant.title, variant.title, series)
        if curve is not None:
            found.append(curve)
    return found


def term_curves(variants: Sequence[Variant]) -> list[Curve]:
    """Return one curve for each variant and method that added a loss term, before weighting."""
    found = []
    for variant in variants:
        for method in variant.methods:
            key = f"train/{method}/term"
            series = [
                _series(stage, key)
                for entry in variant.entries
                for stage in _trained(entry.run)
                if method in stage["methods"]
            ]
            name = variant.title if method.lower() in variant.title.lower() else f"{variant.title}: {method}"
            curve = _curve(name, variant.title, series)
            if curve is not None:
                found.append(curve)
    return found


def margin_over_steps(variants: Sequence[Variant]) -> list[Curve]:
    """Return the refusal margin where it was probed while training; no running mean, it is exact."""
    found = []
    for variant in variants:
        series = [_probe(_last_trained(entry.run)) for entry in variant.entries]
        curve = _curve(variant.title, variant.title, series, window=1)
        if curve is not None:
            found.append(curve)
    return found


def margin_over_points(variants: Sequence[Variant]) -> dict[str, dict[str, float]]:
    """Return by variant the mean refusal margin (nats) of the model at each point of the chain."""
    found: dict[str, dict[str, float]] = {}
    for variant in variants:
        values: dict[str, list[float]] = {}
        for entry in variant.entries:
            for row in entry.run.results["rows"]:
                margin = (row["metrics"].get("refusal_margin") or {}).get("value")
                if margin is not None:
                    values.setdefault(str(row.get("point")), []).append(float(margin))
        if len(values) > 1:
            found[variant.title] = {point: float(np.mean(values[point])) for point in POINTS if point in values}
    return found


def _trained(run: CollectedRun) -> list[Mapping[str, Any]]:
    return [stage for stage in run.results["stages"] if stage.get("curves")]


def _last_trained(run: CollectedRun) -> Mapping[str, Any] | None:
    trained = _trained(run)
    return trained[-1] if trained else None


def _series(stage: Mapping[str, Any] | None, key: str) -> list[tuple[float, float]]:
    curves = (stage or {}).get("curves") or {}
    pairs = zip(curves.get("step", []), curves.get(key, []), strict=False)
    return [(float(step), float(value)) for step, value in pairs if value is not None]


def _probe(stage: Mapping[str, Any] | None) -> list[tuple[float, float]]:
    histories = (stage or {}).get("probes") or []
    return [(float(step), float(value)) for step, value in (histories[0] if histories else [])]


def _curve(
    name: str, variant: str, series: Iterable[Sequence[tuple[float, float]]], *, window: int = WINDOW
) -> Curve | None:
    """Return the mean of several seeds at the steps all of them reached."""
    known = [np.asarray(pairs, dtype=float) for pairs in series if len(pairs) > 1]
    if not known:
        return None
    start, end = max(pairs[0, 0] for pairs in known), min(pairs[-1, 0] for pairs in known)
    longest = max(len(pairs) for pairs in known)
    steps = np.linspace(start, end, min(MAX_POINTS, longest))
    values = np.stack([np.interp(steps, pairs[:, 0], _smooth(pairs[:, 1], window)) for pairs in known])
    return Curve(name, variant, steps, values.mean(axis=0), values.min(axis=0), values.max(axis=0))


def _smooth(values: NDArray[Any], window: int) -> NDArray[Any]:
    """Return the mean of each value and those before it, as far back as ``window`` reaches."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return np.asarray((sums[ends] - sums[starts]) / (ends - starts))
