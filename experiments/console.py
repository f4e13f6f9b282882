"""Result tables: the same rows for the terminal (Rich) and for Markdown files.

A row is ``{"label": str, "metrics": {key: {"value", "numerator", "denominator", "low", "high"}}, "cost": {...}}``, with
``cost`` as ``row_cost`` returns it. A rate is never shown without its count and its 95 % interval.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

__all__ = [
    "doctor_table",
    "format_rate",
    "format_seconds",
    "markdown_table",
    "methods_table",
    "print_results",
    "results_table",
    "row_cost",
    "stage_times_table",
]

Row = Mapping[str, Any]
DASH = "\u2013"
"""Stands between the ends of an interval, and alone for what was not measured."""
MISSING = DASH


class Column(NamedTuple):
    """One quantity of the result table."""

    title: str
    read: Callable[[Row], str]
    is_cost: bool = False


def format_rate(metric: Mapping[str, Any] | None) -> str:
    """Return a rate in per cent with its count and 95 % interval, or a dash where it was not measured.

    Example:
        >>> text = format_rate({"value": 0.125, "numerator": 10, "denominator": 80, "low": 0.069, "high": 0.215})
        >>> text.replace(DASH, " to ")
        '12.5 % (10/80; 6.9 to 21.5)'
    """
    if not metric or metric.get("value") is None:
        return MISSING
    text = f"{100 * metric['value']:.1f} %"
    count = f"{metric['numerator']:g}/{metric['denominator']:g}"
    return f"{text} ({count}; {100 * metric['low']:.1f}{DASH}{100 * metric['high']:.1f})"


def format_mean(metric: Mapping[str, Any] | None) -> str:
    """Return a mean with what it was taken over and, where known, its 95 % interval.

    Example:
        >>> format_mean({"value": 1.2345, "denominator": 40})
        '1.234 (n=40)'
    """
    if not metric or metric.get("value") is None:
        return MISSING
    details = []
    count = next((metric[key] for key in ("num_groups", "denominator", "count") if metric.get(key) is not None), None)
    if count is not None:
        details.append(f"n={count:g}")
    if metric.get("low") is not None and metric.get("high") is not None:
        details.append(f"{metric['low']:.3f}{DASH}{metric['high']:.3f}")
    return f"{metric['value']:.3f}" + (f" ({'; '.join(details)})" if details else "")


def format_seconds(seconds: float | None) -> str:
    """Return a duration in the unit a person would choose.

    Example:
        >>> [format_seconds(s) for s in (0.31, 42.0, 125.0, 7260.0)]
        ['0.3 s', '42 s', '2 min 05 s', '2 h 01 min']
    """
    if seconds is None:
        return MISSING
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def format_count(count: float | None) -> str:
    """Return a large count in thousands, millions or billions.

    Example:
        >>> [format_count(n) for n in (950, 460800, 134515008)]
        ['950', '461 k', '134.5 M']
    """
    if count is None:
        return MISSING
    for size, unit in ((1e9, "B"), (1e6, "M")):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.0f} k" if count >= 1e4 else f"{count:.0f}"


def _rate(key: str) -> Callable[[Row], str]:
    return lambda row: format_rate(row.get("metrics", {}).get(key))


def _cost(key: str, show: Callable[[Any], str]) -> Callable[[Row], str]:
    return lambda row: show((row.get("cost") or {}).get(key))


def _speed(value: float | None) -> str:
    return MISSING if value is None else f"{value:,.0f}"


def _preparation(seconds: float | None) -> str:
    return MISSING if seconds is None or seconds < SHOWN_SECONDS else format_seconds(seconds)


def _memory(mebibytes: float | None) -> str:
    return MISSING if mebibytes is None else f"{mebibytes / 1024:.2f} GiB"


SHOWN_SECONDS = 1.0
"""Of preparation; less is not shown."""
COLUMNS = (
    Column("attack success", _rate("attack_success")),
    Column("harmful rate", _rate("harmful_rate")),
    Column("over-refusal", _rate("over_refusal")),
    Column("task accuracy", _rate("task_accuracy")),
    Column("refusal rate", _rate("refusal_rate")),
    Column("benign NLL", lambda row: format_mean(row.get("metrics", {}).get("benign_nll"))),
    Column("trainable", _cost("trainable_parameters", format_count), is_cost=True),
    Column("prepare", _cost("prepare_seconds", _preparation), is_cost=True),
    Column("train", _cost("train_seconds", format_seconds), is_cost=True),
    Column("evaluate", _cost("evaluate_seconds", format_seconds), is_cost=True),
    Column("tokens/s", _cost("tokens_per_second", _speed), is_cost=True),
    Column("memory", _cost("peak_memory_mib", _memory), is_cost=True),
)
_PREFILL = re.compile(r"prefill_(\d+)/attack_success")
OPTIONAL_COLUMNS = frozenset({"harmful rate", "prepare"})
"""Left out when no row has them; the others show a dash."""


def row_cost(train: Mapping[str, Any] | None, evaluate: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the cost of a row from the ledgers (``CostLedger.to_dict``) of its training and of its measurement.

    Peak memory is the device's where there is one, else the process's; the larger of both stages.

    Args:
        train: ledger of the stage that made the model; None for a model that was not trained here.
        evaluate: ledger of its measurement.
    """
    ledgers = [ledger for ledger in (train, evaluate) if ledger]
    cost: dict[str, Any] = {}
    if train:
        cost["trainable_parameters"] = train["parameters"]["trainable"]
        # Mining, probing, caches: what a method does before the first step is part of its price.
        if "prepare" in train["seconds"]:
            cost["prepare_seconds"] = train["seconds"]["prepare"]
        cost["train_seconds"] = train["seconds"]["train"]
        cost["tokens_per_second"] = train["tokens_per_second"].get("train")
    if evaluate:
        cost["evaluate_seconds"] = evaluate["seconds"]["evaluate"]
    memories = [ledger["peak_memory_mib"] for ledger in ledgers]
    peaks = [peak for memory in memories for peak in (memory["device"] or memory["host"]).values()]
    cost["peak_memory_mib"] = max(peaks, default=None)
    return cost


def results_table(rows: Sequence[Row], *, title: str | None = None, width: int = 120) -> RenderableType:
    """Return the measured models as one table, or as two or three below each other where one would not fit.

    Args:
        rows: one per evaluated model.
        title: above the first table.
        width: characters of a line.
    """
    columns = _columns(rows)
    groups = _fitting_groups(rows, columns, width)
    tables = [_table(rows, group, title if i == 0 else None) for i, group in enumerate(groups)]
    return Group(*tables)


def markdown_table(rows: Sequence[Row]) -> str:
    """Return the same table in Markdown, quality and cost in one, ending in a newline."""
    columns = _columns(rows)
    lines = [
        "| " + " | ".join(["model", *(column.title for column in columns)]) + " |",
        "| --- |" + " ---: |" * len(columns),
    ]
    for row in rows:
        cells = [str(row["label"]), *(column.read(row) for column in columns)]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def stage_times_table(stages: Sequence[Mapping[str, Any]]) -> Table:
    """Return the wall time of each stage and measurement, with the total of what was not reused.

    Args:
        stages: ``{"stage": str, "seconds": float, "reused": bool}`` in the order they ran; ``reused`` may be left out.
    """
    table = Table(box=box.SIMPLE_HEAD, title="Time", title_justify="left", title_style="bold", pad_edge=False)
    table.add_column("stage")
    table.add_column("wall time", justify="right", no_wrap=True)
    table.add_column("")
    for stage in stages:
        note = "reused, not run again" if stage.get("reused") else ""
        table.add_row(Text(str(stage["stage"])), format_seconds(stage["seconds"]), note)
    table.add_section()
    spent = sum(stage["seconds"] for stage in stages if not stage.get("reused"))
    table.add_row("together", format_seconds(spent), "")
    return table


def methods_table(methods: Mapping[str, Any]) -> Table:
    """Return the registered methods: name, idea, contribution points, strategies.

    Args:
        methods: name to registry entry (``summary``, ``points``, ``supports``).
    """
    table = Table(box=box.SIMPLE_HEAD)
    for title in ("method", "idea", "contributes", "runs under"):
        table.add_column(title, overflow="fold")
    for name, entry in methods.items():
        points = ", ".join(entry.points) or "nothing"
        table.add_row(Text(name, style="bold"), Text(entry.summary), Text(points), Text(", ".join(entry.supports)))
    return table


def doctor_table(checks: Sequence[Any]) -> Table:
    """Return the checks of the set-up with what to do about those that fail.

    Args:
        checks: objects with ``name``, ``status`` (ok, warn or fail), ``detail`` and ``remedy``.
    """
    styles = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    table = Table(box=box.SIMPLE_HEAD)
    for title in ("check", "status", "found", "remedy"):
        table.add_column(title, overflow="fold")
    for check in checks:
        status = Text(check.status, style=styles.get(check.status, ""))
        table.add_row(Text(check.name), status, Text(str(check.detail)), Text(str(check.remedy or "")))
    return table


def print_results(results: Mapping[str, Any], console: Console) -> None:
    """Print what a command returned.

    Args:
        results: ``rows`` become the result table, ``stages`` the times, ``folder`` a line, and every one of a study's
            ``runs`` that failed a line, and so does each of ``alarms``.
        console: where to.
    """
    if results.get("rows"):
        name = results.get("name") or results.get("study")
        console.print(results_table(results["rows"], title=name, width=console.width))
    if results.get("stages"):
        console.print(stage_times_table(results["stages"]))
    for alarm in results.get("alarms", []):
        console.print(Text(alarm, style="yellow"), soft_wrap=True)
    for run in results.get("runs", []):
        if run["status"] != "finished":
            text = f"{run['cell']}: {run['status']}: {run.get('error', '')}"
            console.print(Text(text, style="red"), soft_wrap=True)
    if results.get("folder"):
        console.print(Text(f"Results: {results['folder']}"), soft_wrap=True)


def _columns(rows: Sequence[Row]) -> list[Column]:
    columns = [
        column
        for column in COLUMNS
        if column.title not in OPTIONAL_COLUMNS or any(column.read(row) != MISSING for row in rows)
    ]
    return [*columns[:1], *_prefill_columns(rows), *columns[1:]]


def _prefill_columns(rows: Sequence[Row]) -> list[Column]:
    """Return a column of attack success for each number of forced tokens that a row knows."""
    keys = {key for row in rows for key in row.get("metrics", {})}
    counts = sorted(int(match[1]) for key in keys if (match := _PREFILL.fullmatch(key)))
    return [Column(f"prefill {count}", _rate(f"prefill_{count}/attack_success")) for count in counts]


def _fitting_groups(rows: Sequence[Row], columns: Sequence[Column], width: int) -> list[list[Column]]:
    """Return the columns in groups whose table is at most ``width`` wide; quality and cost are never mixed.

    Cells may break between the rate and its count, so a column is as wide as its longest unbreakable part needs.
    """
    label = max([len("model"), *(len(str(row["label"])) for row in rows)])
    label = min(label, width // 3)
    groups: list[list[Column]] = []
    used = width
    for column in columns:
        needed = 3 + max(len(line) for row in rows for line in [*_lines(column.read(row)), column.title])
        is_new_kind = bool(groups) and groups[-1][0].is_cost != column.is_cost
        if used + needed > width or is_new_kind:
            groups.append([])
            used = label + 2
        groups[-1].append(column)
        used += needed
    return groups


def _lines(cell: str) -> list[str]:
    """Return a rate on two lines: the value, and its count with the interval."""
    head, bracket, tail = cell.partition(" (")
    return [head, f"({tail}"] if bracket else [cell]


def _table(rows: Sequence[Row], columns: Sequence[Column], title: str | None) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD, title=title and Text(title), title_justify="left", title_style="bold", pad_edge=False
    )
    table.add_column("model", overflow="fold")
    for column in columns:
        table.add_column(column.title, justify="right", no_wrap=True)
    for row in rows:
        cells = ["\n".join(_lines(column.read(row))) for column in columns]
        table.add_row(Text(str(row["label"]), style="bold"), *(Text(cell) for cell in cells))
    return table
