"""Results as files for other programs: one CSV with a line per model, one tidy parquet with a line per number."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.report.entries import Entry
from experiments.report.replies import Reply, category_counts, template_counts
from framework.files import write_atomic

__all__ = ["TIDY_COLUMNS", "csv_table", "tidy_rows", "write_exports"]

CSV_FILE = "metrics.csv"
PARQUET_FILE = "results.parquet"
_WHO = ("run", "title", "label", "model", "task", "share", "seed", "point", "is_final", "fingerprint")
_PARTS = ("value", "numerator", "denominator", "low", "high")
TIDY_COLUMNS: Mapping[str, str] = {
    "run": "string",
    "title": "string",
    "label": "string",
    "model": "string",
    "task": "string",
    "share": "float64",
    "seed": "int64",
    "point": "string",
    "is_final": "bool_",
    "fingerprint": "string",
    "kind": "string",
    "stage": "string",
    "name": "string",
    "step": "float64",
    "value": "float64",
    "numerator": "float64",
    "denominator": "float64",
    "low": "float64",
    "high": "float64",
}
"""Name to type in Arrow. ``kind`` is metric, cost, category, template, curve, probe or effect."""


def write_exports(entries: Sequence[Entry], replies: Mapping[str, Sequence[Reply]], folder: Path) -> tuple[Path, Path]:
    """Write ``metrics.csv`` and ``results.parquet`` and return their paths.

    Args:
        entries: measured models.
        replies: by entry's id, for rates by category.
        folder: where to.

    Raises:
        StorageError: the folder cannot be written.
    """
    import pyarrow as pa
    from pyarrow import parquet

    rows = list(tidy_rows(entries, replies))
    columns = {
        name: pa.array([row.get(name) for row in rows], type=getattr(pa, kind)()) for name, kind in TIDY_COLUMNS.items()
    }
    packed = io.BytesIO()
    parquet.write_table(pa.table(columns), packed, compression="zstd")
    csv_path, parquet_path = folder / CSV_FILE, folder / PARQUET_FILE
    write_atomic(csv_path, csv_table(entries))
    write_atomic(parquet_path, packed.getvalue())
    return csv_path, parquet_path


def csv_table(entries: Sequence[Entry]) -> str:
    """Return a line per measured model: what it is, every metric with its counts and bounds, its cost."""
    rows = [{**_who(entry), **_flat(entry)} for entry in entries]
    names = [*_WHO, *dict.fromkeys(name for row in rows for name in row if name not in _WHO)]
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def tidy_rows(entries: Sequence[Entry], replies: Mapping[str, Sequence[Reply]]) -> Iterator[dict[str, Any]]:
    """Yield one row per number: metrics, costs and rates by part of every model, curves and effects of its last stage.

    Args:
        entries: measured models.
        replies: by entry's id.
    """
    for entry in entries:
        who = _who(entry)
        for name, metric in entry.metrics.items():
            yield {**who, "kind": "metric", "name": name, **{part: metric.get(part) for part in _PARTS}}
        for name, value in entry.cost.items():
            yield {**who, "kind": "cost", "name": name, "value": value}
        for part, counts in (("category", category_counts), ("template", template_counts)):
            for kind, cells in counts(replies.get(entry.id, ())).items():
                for name, (hits, total) in cells.items():
                    found = {"value": hits / total, "numerator": hits, "denominator": total}
                    yield {**who, "kind": part, "name": f"{kind}/{name}", **found}
        if entry.is_final:
            yield from _stage_rows(entry, who)


def _stage_rows(entry: Entry, who: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for stage in entry.run.results["stages"]:
        where = {**who, "stage": str(stage["stage"])}
        curves = stage.get("curves") or {}
        for name, values in curves.items():
            for step, value in zip(curves["step"], values, strict=True):
                if name != "step" and value is not None:
                    yield {**where, "kind": "curve", "name": name, "step": step, "value": value}
        for history in stage.get("probes") or []:
            for step, value in history:
                yield {**where, "kind": "probe", "name": "refusal_margin", "step": step, "value": value}
        for method, counters in (stage.get("effects") or {}).items():
            for name, value in counters.items():
                if isinstance(value, (int, float)):
                    yield {**where, "kind": "effect", "name": f"{method}/{name}", "value": float(value)}


def _who(entry: Entry) -> dict[str, Any]:
    run = entry.run
    return {
        "run": run.name,
        "title": entry.title,
        "label": entry.label,
        "model": run.model,
        "task": run.task,
        "share": run.share,
        "seed": run.seed,
        "point": entry.point,
        "is_final": entry.is_final,
        "fingerprint": (entry.row.get("model") or {}).get("fingerprint"),
    }


def _flat(entry: Entry) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, metric in entry.metrics.items():
        for part in _PARTS:
            if metric.get(part) is not None:
                found[name if part == "value" else f"{name}/{part}"] = metric[part]
    return {**found, **{f"cost/{name}": value for name, value in entry.cost.items() if value is not None}}
