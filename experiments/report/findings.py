"""The comparison in sentences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments.report.cells import MINUS, format_p, percent
from experiments.report.summary import Cell

__all__ = ["cell_findings", "tradeoff_sentence"]

HEADLINES = {"harmful_rate": "harmful rate", "attack_success": "attack success"}
SECONDS = {"over_refusal": "over-refusal", "task_accuracy": "task accuracy"}
MAX_VARIANTS = 4
MAX_NAMES = 8


def cell_findings(cell: Cell) -> list[str]:
    """Return what a reader should take from one cell, the best variants first."""
    headline = next((key for key in HEADLINES if key in cell.methods[cell.reference.title]["metrics"]), None)
    if headline is None:
        return ["No safety metric was measured."]
    if len(cell.variants) == 1:
        return _chain(cell)
    others = [variant.title for variant in cell.variants if variant is not cell.reference]
    known = [title for title in others if headline in cell.methods[title]["metrics"]]
    ordered = sorted(known, key=lambda title: float(cell.methods[title]["metrics"][headline]["value"]))
    base = cell.methods[cell.reference.title]["metrics"]
    found = [f"Everything is compared with {cell.reference.title}: {_values(base)}."]
    found += [_against(cell, title, headline) for title in ordered[:MAX_VARIANTS]]
    if len(ordered) > MAX_VARIANTS:
        found.append(f"{len(ordered) - MAX_VARIANTS} more variants are in the table.")
    winners = [title for title, row in cell.methods.items() if row["metrics"].get(headline, {}).get("is_winner")]
    if winners:
        found.append(f"{winners[0]} has the lowest {HEADLINES[headline]}, outside the noise of every other variant.")
    else:
        found.append(f"No variant's {HEADLINES[headline]} is outside the noise of all others.")
    return found


def tradeoff_sentence(cell: Cell) -> str:
    """Return the front, the knee and the share of the box that the front dominates."""
    front = [title for title in cell.points if not cell.is_dominated(title)]
    if len(cell.points) < 2:
        return ""
    knee = [title for title, point in cell.points.items() if point["is_knee"]]
    more = f" and {len(front) - MAX_NAMES} more" if len(front) > MAX_NAMES else ""
    named = ", ".join(front[:MAX_NAMES]) + more
    text = f"Not dominated: {named}. Hypervolume of the front: {cell.tradeoff['hypervolume']:.3f} of 1."
    if knee:
        text += f" Knee: {knee[0]}."
    left_out = cell.tradeoff["left_out"]
    if left_out:
        text += f" Not weighed, because a quantity is missing: {', '.join(left_out)}."
    return text


def _against(cell: Cell, title: str, headline: str) -> str:
    metrics = cell.methods[title]["metrics"]
    parts = [_change(HEADLINES[headline], metrics[headline])]
    parts += [_change(name, metrics[key]) for key, name in SECONDS.items() if key in metrics]
    tax = (cell.points.get(title) or {}).get("safety_tax")
    paid = (
        ""
        if tax is None
        else f" Safety tax: {tax:.2f} points of accuracy per point of attack success avoided.".replace("-", MINUS)
    )
    return f"{title}: {'; '.join(parts)}.{paid}"


def _change(name: str, metric: Mapping[str, Any]) -> str:
    text = f"{name} {percent(metric['value'])}"
    found = metric.get("difference")
    if not found:
        return text
    change = f"{abs(100 * found['difference']):.1f} points {'more' if found['difference'] > 0 else 'less'}"
    p_value = found["adjusted_p"]
    if p_value is None:
        return f"{text} ({change})" if found["difference"] else f"{text} (no change)"
    return f"{text} ({change}, {format_p(p_value)}: {found['verdict']})"


def _values(metrics: Mapping[str, Any]) -> str:
    names = {**HEADLINES, **SECONDS}
    return ", ".join(f"{name} {percent(metrics[key]['value'])}" for key, name in names.items() if key in metrics)


def _chain(cell: Cell) -> list[str]:
    """Return the models of a single variant, one after another."""
    entry = cell.variants[0].entries[0]
    found = []
    for row in entry.run.results["rows"]:
        label = entry.run.label if row is entry.row else row["label"]
        values = _values(row["metrics"])
        if values:
            found.append(f"{label}: {values}.")
    return found
