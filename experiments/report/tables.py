"""The rows of a report's tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.report.cells import Column, Value, columns_of
from experiments.report.entries import Entry, Variant
from experiments.report.figures import VARIABLES, Style
from experiments.report.summary import Cell

__all__ = ["model_table", "number_of", "variant_row"]

MAX_SEEDS = 8
"""Listed below a variant's name."""


def variant_row(cell: Cell, variant: Variant, columns: Sequence[Column], style: Style) -> dict[str, Any]:
    """Return one variant's row of a comparison."""
    row = cell.methods[variant.title]
    seeds = [str(seed) for seed in row["seeds"]]
    settings = "; ".join(f"{name} {_settings(given)}".strip() for name, given in variant.methods.items())
    listed = ", ".join(seeds[:MAX_SEEDS]) + ("\u2026" if len(seeds) > MAX_SEEDS else "")
    return {
        "title": variant.title,
        "key": _key(style),
        "note": f"{number_of(len(seeds), 'seed')} ({listed})" + (f" \u00b7 {settings}" if settings else ""),
        "tags": _tags(cell, variant),
        "is_dominated": cell.is_dominated(variant.title),
        "cells": [_value(row["metrics"], row["cost"], column) for column in columns],
    }


def model_table(entries: Sequence[Entry], cells: Sequence[Cell]) -> dict[str, Any]:
    """Return the columns and rows of every measured model."""
    columns = columns_of([(entry.metrics, entry.cost) for entry in entries])
    dominated = {
        entry.id
        for cell in cells
        for variant in cell.variants
        if cell.is_dominated(variant.title)
        for entry in variant.entries
    }
    rows = [
        {
            "title": entry.title,
            "note": f"{entry.point} · {entry.run.name}" if entry.is_final else entry.point,
            "is_final": entry.is_final,
            "is_dominated": entry.id in dominated,
            "cells": [_value(entry.metrics, entry.cost, column) for column in columns],
        }
        for entry in entries
    ]
    return {"columns": columns, "rows": rows}


def _tags(cell: Cell, variant: Variant) -> list[dict[str, str]]:
    title, found = variant.title, []

    def tag(text: str, tone: str, hint: str) -> None:
        found.append({"text": text, "tone": tone, "hint": hint})

    if variant is cell.reference and len(cell.variants) > 1:
        tag("reference", "info", "the others are compared with it")
    won = [key for key, metric in cell.methods[title]["metrics"].items() if metric.get("is_winner")]
    headline = [key for key in ("attack_success", "harmful_rate") if key in won]
    if headline:
        tag("winner", "good", f"outside the noise of every other variant in {', '.join(headline).replace('_', ' ')}")
    point = cell.points.get(title, {})
    if point.get("is_knee"):
        tag("knee", "odd", "beyond it, little is gained by giving up more")
    if point.get("is_dominated"):
        tag("dominated", "", f"by {', '.join(point['dominated_by'])}")
    return found


def _key(style: Style) -> str:
    """Return the mark that stands for a variant in the pictures."""
    colour = f"var({VARIABLES[style.colour]})"
    fill = "none" if style.is_grey else colour
    circle = f'<circle cx="5" cy="5" r="4" fill="{fill}" stroke="{colour}" stroke-width="1.5"/>'
    return f'<svg viewBox="0 0 10 10" aria-hidden="true">{circle}</svg>'


def _settings(given: Any) -> str:
    if not isinstance(given, Mapping):
        return ""
    return ", ".join(f"{key} {value}" for key, value in given.items() if isinstance(value, (int, float, str)))


def _value(metrics: Mapping[str, Any], cost: Mapping[str, Any], column: Column) -> Value:
    found = (cost if column.is_cost else metrics).get(column.key)
    if found is None or (not column.is_cost and found.get("value") is None):
        return Value()
    shown: Value = column.show(found)
    return shown


def number_of(count: int, noun: str) -> str:
    """Return a count with its noun.

    Example:
        >>> number_of(2, "run"), number_of(1, "run")
        ('2 runs', '1 run')
    """
    return f"{count} {noun}{'' if count == 1 else 's'}"
