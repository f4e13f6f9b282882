"""The compared table for reading: one block per model, task and harmful share, in Markdown and on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments.console import DASH, MISSING, format_rate

__all__ = ["comparison_markdown", "format_difference", "group_title", "print_comparison"]

SHOWN = ("attack_success", "harmful_rate", "over_refusal", "task_accuracy")
"""Rates of the tables; the others are in ``table.json``."""
HEAD = ("method", "rate", "over seeds", "difference", "p (prompts)", "p (seeds)", "detectable", "verdict")
NARROW = ("method", "rate", "difference", "p (prompts)", "verdict")
WIDE = 120

LEGEND = (
    "rate: of all replies, with the Wilson 95 % interval; over seeds: t interval of the seed means; difference: to "
    "the reference in points, with the paired bootstrap interval; p (prompts): exact McNemar; p (seeds): the larger of "
    "it and a paired t test over seeds; both after Holm's correction over the methods; detectable: the smallest "
    "difference this many pairs show with 80 % power."
)


def comparison_markdown(groups: Sequence[Mapping[str, Any]]) -> str:
    """Return the groups as Markdown; empty when there are none.

    Args:
        groups: of ``compare_runs``.
    """
    parts = []
    for group in groups:
        parts.append(f"## {group_title(group)}\n")
        for rate in _rates(group):
            rows = [_cells(method, rate) for method in group["methods"]]
            lines = [HEAD, ["---"] + ["---:"] * (len(HEAD) - 1), *rows]
            text = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
            parts.append(f"### {rate}\n\n{text}\n")
        parts.append(_tradeoff_markdown(group))
        parts += [f"- {note}\n" for note in group["notes"]]
    return "\n" + "\n".join([*parts, LEGEND, ""]) if parts else ""


def print_comparison(groups: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Print the groups.

    Args:
        groups: of ``compare_runs``.
        console: where to.
    """
    for group in groups:
        if len(group["methods"]) < 2:
            continue
        for rate in _rates(group):
            console.print(_table(group, rate, is_wide=console.width >= WIDE))
        for note in group["notes"]:
            console.print(Text(note, style="yellow"), soft_wrap=True)


def _table(group: Mapping[str, Any], rate: str, *, is_wide: bool) -> Table:
    """Return one rate of a group; a narrow terminal gets fewer columns, never cut numbers."""
    table = Table(box=box.SIMPLE_HEAD, title=f"{rate}: {group_title(group)}", title_justify="left", pad_edge=False)
    kept = [number for number, title in enumerate(HEAD) if is_wide or title in NARROW]
    for number in kept:
        table.add_column(HEAD[number], justify="right" if number else "left", overflow="fold", no_wrap=number > 0)
    dominated = {point["name"] for point in group["tradeoff"]["points"] if point["is_dominated"]}
    for method in group["methods"]:
        cells = _cells(method, rate)
        # A number and its interval stand on two lines.
        broken = [cells[number].replace(" (", "\n(", 1) if number else cells[number] for number in kept]
        table.add_row(*(Text(cell) for cell in broken), style="dim" if method["label"] in dominated else "")
    return table


def group_title(group: Mapping[str, Any]) -> str:
    """Return what a group holds still.

    Example:
        >>> group_title({"model": "m", "task": "triage", "share": 0.1, "seeds": [0, 1], "reference": "LoRA"})
        'm, triage, harmful share 0.1, 2 seeds, against LoRA'
    """
    seeds = f"{len(group['seeds'])} seed{'s' * (len(group['seeds']) != 1)}"
    model = Path(group["model"]).name if Path(group["model"]).is_absolute() else group["model"]
    return f"{model}, {group['task']}, harmful share {group['share']:g}, {seeds}, against {group['reference']}"


def format_difference(found: Mapping[str, Any] | None) -> str:
    """Return a difference in points with its interval.

    Example:
        >>> format_difference({"difference": -0.125, "low": -0.2, "high": -0.05}).replace(DASH, " to ")
        '-12.5 (-20.0 to -5.0)'
    """
    if not found:
        return MISSING
    return f"{100 * found['difference']:+.1f} ({100 * found['low']:+.1f}{DASH}{100 * found['high']:+.1f})"


def _rates(group: Mapping[str, Any]) -> list[str]:
    return [rate for rate in SHOWN if any(rate in method["metrics"] for method in group["methods"])]


def _cells(method: Mapping[str, Any], rate: str) -> list[str]:
    metric = method["metrics"].get(rate)
    if metric is None:
        return [method["label"], *[MISSING] * (len(HEAD) - 1)]
    found = metric["difference"] or {}
    return [
        method["label"],
        format_rate(metric) if metric.get("low") is not None else f"{100 * metric['value']:.1f} %",
        _span(metric["seed_low"], metric["seed_high"]),
        format_difference(found),
        _p_value(found.get("adjusted_mcnemar_p")),
        _p_value(found.get("adjusted_p")),
        f"{100 * found['detectable']:.1f}" if found else MISSING,
        _verdict(method, metric, found),
    ]


def _verdict(method: Mapping[str, Any], metric: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    if metric["is_winner"]:
        return "winner"
    return "reference" if method["is_reference"] else str(found.get("verdict") or MISSING)


def _span(low: float | None, high: float | None) -> str:
    return MISSING if low is None or high is None else f"{100 * low:.1f}{DASH}{100 * high:.1f}"


def _p_value(value: float | None) -> str:
    if value is None:
        return MISSING
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _tradeoff_markdown(group: Mapping[str, Any]) -> str:
    found = group["tradeoff"]
    head = ["method", *(objective["title"] for objective in found["objectives"]), "safety tax", "dominated by"]
    lines = [head, ["---"] * len(head)]
    for point in found["points"]:
        values = [f"{point['values'][objective['key']]:.3g}" for objective in found["objectives"]]
        tax = MISSING if point["safety_tax"] is None else f"{point['safety_tax']:.2f}"
        name = f"{point['name']} (knee)" if point["is_knee"] else point["name"]
        lines.append([name, *values, tax, ", ".join(point["dominated_by"]) or MISSING])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"### Trade-off (hypervolume {found['hypervolume']:.3f})\n\n{table}\n"
