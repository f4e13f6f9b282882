"""The pictures of one cell, and the tables behind them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments.report.entries import Variant
from experiments.report.figures import Picture, Style
from experiments.report.plot_bars import category_picture, cost_picture
from experiments.report.plot_curves import curves_picture
from experiments.report.plot_tradeoff import Dot, tradeoff_picture
from experiments.report.replies import Count, Reply, category_counts, template_counts
from experiments.report.summary import Cell, phase_costs
from experiments.statistics import wilson_interval

__all__ = ["KINDS_OF_PICTURES", "category_tables", "cell_pictures"]

KINDS_OF_PICTURES = ("tradeoff", "categories", "curves", "cost")
KIND_TITLES = {
    "harmful": "attack success by category",
    "benign": "over-refusal by category",
    "task": "task accuracy by class",
}
TEMPLATE_TITLES = {"harmful": "attack success by jailbreak template", "benign": "over-refusal by jailbreak template"}
Counter = Callable[[Sequence[Reply]], dict[str, dict[str, Count]]]
_RATES = ("attack_success", "over_refusal", "task_accuracy")


def cell_pictures(
    cell: Cell, styles: Mapping[str, Style], replies: Mapping[str, Sequence[Reply]]
) -> dict[str, Picture]:
    """Return the pictures of a cell by kind, those with data."""
    counts = {v.title: found for v in cell.variants if (found := _counts(v, replies))}
    costs = {variant.title: phase_costs(variant) for variant in cell.variants}
    drawn = {
        "tradeoff": tradeoff_picture(f"{cell.id}-tradeoff", f"Trade-off, {cell.title}", _dots(cell), styles),
        "categories": category_picture(f"{cell.id}-categories", f"By category, {cell.title}", counts, styles),
        "curves": curves_picture(f"{cell.id}-curves", f"Training, {cell.title}", cell.variants, styles),
        "cost": cost_picture(f"{cell.id}-cost", f"Cost, {cell.title}", costs),
    }
    return {kind: picture for kind, picture in drawn.items() if picture is not None}


def category_tables(cell: Cell, replies: Mapping[str, Sequence[Reply]]) -> list[dict[str, Any]]:
    """Return the counts behind the bars, one table a kind of prompt, and by template, for all variants of a cell."""
    return [
        *_count_tables(cell, replies, category_counts, KIND_TITLES, "category"),
        *_count_tables(cell, replies, template_counts, TEMPLATE_TITLES, "template"),
    ]


def _count_tables(
    cell: Cell, replies: Mapping[str, Sequence[Reply]], count: Counter, titles: Mapping[str, str], heading: str
) -> list[dict[str, Any]]:
    counts = {v.title: found for v in cell.variants if (found := _counts(v, replies, count))}
    tables = []
    for kind, title in titles.items():
        names = list(dict.fromkeys(name for found in counts.values() for name in found.get(kind, {})))
        if len(names) > 1:
            rows = [
                {
                    "name": name.replace("_", " "),
                    "cells": [_count_cell(found.get(kind, {}).get(name)) for found in counts.values()],
                }
                for name in names
            ]
            tables.append({"title": title, "heading": heading, "variants": list(counts), "rows": rows})
    return tables


def _counts(
    variant: Variant, replies: Mapping[str, Sequence[Reply]], count: Counter = category_counts
) -> dict[str, dict[str, Count]]:
    """Return the counts of all seeds together."""
    return count([reply for entry in variant.entries for reply in replies.get(entry.id, ())])


def _count_cell(count: Count | None) -> dict[str, str]:
    if count is None:
        return {"text": "\u2013", "sort": ""}
    low, high = wilson_interval(count.hits, count.total)
    value = count.hits / count.total
    text = f"{100 * value:.0f} % ({count.hits}/{count.total}; {100 * low:.0f}\u2013{100 * high:.0f})"
    return {"text": text, "sort": f"{value:.6g}"}


def _dots(cell: Cell) -> list[Dot]:
    found = []
    for variant in cell.variants:
        row = cell.methods[variant.title]
        values = {key: _bounded(row["metrics"][key]) for key in _RATES if key in row["metrics"]}
        if row["cost"].get("train_seconds"):
            values["fit_minutes"] = (_fit_minutes(row["cost"]), None, None)
        seeds = []
        for entry in variant.entries:
            own = {key: 100 * float(entry.metrics[key]["value"]) for key in _RATES if key in entry.metrics}
            if entry.cost.get("train_seconds"):
                own["fit_minutes"] = _fit_minutes(entry.cost)
            seeds.append(own)
        found.append(
            Dot(
                id=variant.id,
                name=variant.title,
                values=values,
                seeds=seeds,
                is_dominated=cell.is_dominated(variant.title),
                is_reference=variant is cell.reference and len(cell.variants) > 1,
            )
        )
    return found


def _fit_minutes(cost: Mapping[str, Any]) -> float:
    """Return the minutes of the last stage, with what a method does before its first step."""
    return (float(cost["train_seconds"]) + float(cost.get("prepare_seconds") or 0.0)) / 60


def _bounded(metric: Mapping[str, Any]) -> tuple[float, float | None, float | None]:
    """Return a rate in per cent with its interval: over seeds where there is one, else over prompts."""
    is_seeds = metric.get("seed_low") is not None
    low, high = (
        (metric.get("seed_low"), metric.get("seed_high")) if is_seeds else (metric.get("low"), metric.get("high"))
    )
    if low is None or high is None:
        return 100 * float(metric["value"]), None, None
    return 100 * float(metric["value"]), 100 * max(0.0, low), 100 * min(1.0, high)
