"""Puts a report together: collects, compares, draws, and fills the template."""

from __future__ import annotations

import base64
import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from experiments.page_marker import page_marker
from experiments.report.cautions import find_cautions
from experiments.report.cells import columns_of
from experiments.report.collecting import CollectedRun, Collection
from experiments.report.effects import method_effects
from experiments.report.entries import Entry, Variant, find_entries, find_variants
from experiments.report.figures import Picture, Style, styles_of
from experiments.report.findings import cell_findings, tradeoff_sentence
from experiments.report.plots import KINDS_OF_PICTURES, category_tables, cell_pictures
from experiments.report.replies import Reply, replies_of
from experiments.report.summary import Cell, compare_cells
from experiments.report.tables import model_table, number_of, variant_row
from experiments.report.transcripts import Replies as Shown
from experiments.report.transcripts import Transcripts, pack_transcripts

__all__ = ["Report", "build_report"]

TEMPLATES = Path(__file__).parent / "templates"
NOTES = {
    "redacted": "Harmful requests and the replies to them are not in this page; `seawall report --with-replies` puts "
    "them in.",
    "none": "This page was made without replies.",
}
MAX_PICTURES = 24
MAX_PICTURE_BYTES = 400_000
SECTIONS = (
    ("summary", "In short"),
    ("variants", "Comparison"),
    ("tradeoff", "Trade-off"),
    ("categories", "Categories"),
    ("training", "Training"),
    ("cost", "Cost"),
    ("effects", "Effects"),
    ("pictures", "Pictures"),
    ("transcripts", "Replies"),
    ("models", "All models"),
    ("about", "How to read"),
)


@dataclass(frozen=True)
class Report:
    """A finished report; nothing is written yet."""

    html: str
    pictures: tuple[Picture, ...]
    entries: tuple[Entry, ...]
    cells: tuple[Cell, ...]
    replies: Mapping[str, Sequence[Reply]]


def build_report(collection: Collection, *, reference: str | None = None, show: Shown = "redacted") -> Report:
    """Return the report on collected runs.

    Args:
        collection: the runs.
        reference: label the others are compared with; None takes the study's, else plain training.
        show: which replies are in the page; of the others the verdicts alone.

    Raises:
        DataError: a file of replies is damaged.
    """
    entries = find_entries(collection.runs)
    variants = find_variants(entries)
    replies = replies_of(entries)
    cells = compare_cells(variants, replies, reference=reference or collection.reference)
    styles = _styles(cells)
    drawn = {cell.id: cell_pictures(cell, styles, replies) for cell in cells}
    transcripts = pack_transcripts(entries, replies, first=_compared_first(cells), show=show)
    context = {
        **_head(collection, variants),
        **_assets(),
        "marker": page_marker(show),
        "cells": [_cell_context(cell, drawn[cell.id], styles, replies) for cell in cells],
        "cautions": find_cautions(collection, entries, variants, replies),
        "effects": method_effects([variant for cell in cells for variant in cell.variants]),
        **_gallery(collection.runs),
        **_transcript_context(transcripts, cells, replies, show=show),
        "models": model_table(entries, cells),
        "has_differences": any(_differences(cell) for cell in cells),
    }
    context["has"] = _has(context["cells"], entries)
    context["sections"] = [item for item in SECTIONS if _is_shown(item[0], context)]
    pictures = tuple(picture for found in drawn.values() for picture in found.values())
    return Report(_render(context), pictures, tuple(entries), tuple(cells), replies)


def _render(context: Mapping[str, Any]) -> str:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html").render(context)


def _assets() -> dict[str, Any]:
    from markupsafe import Markup

    texts = {name: (TEMPLATES / f"report.{name}").read_text(encoding="utf-8") for name in ("css", "js")}
    # Our own files, put into <style> and <script> as they are.
    return {name: Markup(text) for name, text in texts.items()}


def _head(collection: Collection, variants: Sequence[Variant]) -> dict[str, Any]:
    runs = collection.runs
    seeds = {run.seed for run in runs}
    models = sorted({run.model.rsplit("/", 1)[-1] for run in runs if run.model})
    days = sorted({str(run.results["run"].get("started", ""))[:10] for run in runs} - {""})
    facts = [
        number_of(len(runs), "run"),
        number_of(len(variants), "variant"),
        number_of(len(seeds), "seed"),
        ", ".join(models[:3]) + (f" and {len(models) - 3} more" if len(models) > 3 else ""),
        days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}" if days else "",
    ]
    listed = [*runs, *collection.failed]
    return {
        "title": collection.name,
        "facts": [fact for fact in facts if fact],
        "version": importlib.metadata.version("seawall"),
        "runs": [_run_line(run) for run in listed],
        "machines": _machines(runs),
    }


def _run_line(run: CollectedRun) -> dict[str, str]:
    done = run.results.get("run") or {}
    return {
        "name": run.name,
        "state": "finished" if run.is_finished else f"failed: {run.error}",
        "model": run.model,
        "task": run.task,
        "seed": "" if run.seed is None else str(run.seed),
        "started": str(done.get("started", "")),
        "seconds": f"{done['seconds']:.0f}" if done.get("seconds") is not None else "",
    }


def _machines(runs: Sequence[CollectedRun]) -> list[str]:
    found: dict[str, int] = {}
    for run in runs:
        environment = run.results.get("environment") or {}
        packages = ", ".join(f"{name} {number}" for name, number in (environment.get("packages") or {}).items())
        devices = ", ".join(environment.get("devices") or []) or "no accelerator"
        machine = f"{environment.get('cpu')}, {environment.get('threads')} threads, {devices}"
        text = f"{machine}; Python {environment.get('python')}; {packages}"
        found[text] = found.get(text, 0) + 1
    return [f"{number_of(count, 'run')}: {text}" for text, count in found.items()]


def _styles(cells: Sequence[Cell]) -> dict[str, Style]:
    """Return one style per variant; a label keeps its colour from cell to cell, dominated variants are grey."""
    front = [v.label for cell in cells for v in cell.variants if not cell.is_dominated(v.title)]
    labels = list(dict.fromkeys([*(cell.reference.label for cell in cells), *front]))
    by_label = styles_of(labels)
    found: dict[str, Style] = {}
    for cell in cells:
        dominated = [v.title for v in cell.variants if cell.is_dominated(v.title) and v is not cell.reference]
        grey = styles_of(dominated, greyed=dominated)
        taken: set[str] = set()
        for variant in cell.variants:
            style = grey.get(variant.title) or by_label[variant.label]
            # Two variants of one label in one cell need two colours.
            if not style.is_grey and style.colour in taken:
                free = [s for s in styles_of([str(n) for n in range(8)]).values() if s.colour not in taken]
                style = free[0] if free else styles_of(["x"], greyed=["x"])["x"]
            taken.add(style.colour)
            found[variant.title] = style
    return found


def _cell_context(
    cell: Cell, pictures: Mapping[str, Picture], styles: Mapping[str, Style], replies: Mapping[str, Sequence[Reply]]
) -> dict[str, Any]:
    columns = columns_of([(row["metrics"], row["cost"]) for row in cell.methods.values()])
    return {
        "title": cell.title,
        "findings": cell_findings(cell),
        "columns": columns,
        "rows": [variant_row(cell, variant, columns, styles[variant.title]) for variant in cell.variants],
        "notes": [note[:1].upper() + note[1:].replace("_", " ") + "." for note in cell.notes],
        "pictures": {kind: pictures.get(kind) for kind in KINDS_OF_PICTURES},
        "tradeoff": tradeoff_sentence(cell),
        "categories": category_tables(cell, replies),
    }


def _gallery(runs: Sequence[CollectedRun]) -> dict[str, Any]:
    """Return the pictures that lie beside the results, those too large or too many left out and counted."""
    found = [(run, path) for run in runs for path in run.pictures]
    small = [(run, path) for run, path in found if path.stat().st_size <= MAX_PICTURE_BYTES][:MAX_PICTURES]
    items = [
        {
            # As an image an SVG runs no script and loads nothing.
            "uri": "data:image/svg+xml;base64," + base64.b64encode(path.read_bytes()).decode(),
            "alt": f"Picture {path.stem.replace('_', ' ').replace('-', ' ')} of run {run.name}",
            "caption": f"{run.name}: {path.stem}",
        }
        for run, path in small
    ]
    left_out = len(found) - len(small)
    text = f"{number_of(left_out, 'picture')} more beside the runs' results: too large or too many for this page."
    return {"gallery": items, "gallery_left_out": text if left_out else ""}


def _compared_first(cells: Sequence[Cell]) -> list[str]:
    """Return the entries whose replies matter most: references, then one seed of every variant."""
    references = [entry.id for cell in cells for entry in cell.reference.entries]
    return [*references, *(variant.entries[0].id for cell in cells for variant in cell.variants)]


def _transcript_context(
    transcripts: Transcripts, cells: Sequence[Cell], replies: Mapping[str, Sequence[Reply]], *, show: Shown
) -> dict[str, Any]:
    models = [model["id"] for model in transcripts.data["models"]]
    if len(models) < 2 or not transcripts.num_prompts:
        why = (
            "No two models with their replies at hand: a study's kept results hold numbers alone. Report the "
            "run folders to see replies."
            if len(models) < 2
            else "No verdict differs between any two models."
        )
        return {"transcripts": None, "no_transcripts": why}
    start, end = _first_pair(cells, replies, models)
    notes = []
    if transcripts.num_left_out:
        notes.append(
            f"To keep the page small, the replies of {number_of(transcripts.num_left_out, 'model')} are left out; "
            "their verdicts are here. Report the two runs alone to see them."
        )
    if note := NOTES.get(show):
        notes.append(note)
    if transcripts.num_without:
        notes.append(f"{number_of(transcripts.num_without, 'model')} came without replies.")
    return {
        "transcripts": {
            "packed": transcripts.packed(),
            "start": start,
            "end": end,
            "note": " ".join(notes),
            "with_replies": show != "none",
        },
        "no_transcripts": "",
    }


def _first_pair(
    cells: Sequence[Cell], replies: Mapping[str, Sequence[Reply]], models: Sequence[str]
) -> tuple[str, str]:
    """Return the pair that is shown first: the reference and the next variant, at one seed."""
    for cell in cells:
        for variant in cell.variants[1:]:
            for before in cell.reference.entries:
                for after in variant.entries:
                    if before.run.seed == after.run.seed and before.id in replies and after.id in replies:
                        return before.id, after.id
    return models[-2], models[-1]


def _differences(cell: Cell) -> bool:
    return any(metric.get("difference") for row in cell.methods.values() for metric in row["metrics"].values())


def _has(cells: Sequence[Mapping[str, Any]], entries: Sequence[Entry]) -> dict[str, bool]:
    found = {kind: any(cell["pictures"][kind] for cell in cells) for kind in KINDS_OF_PICTURES}
    return {**found, "harmful_rate": any("harmful_rate" in entry.metrics for entry in entries)}


def _is_shown(section: str, context: Mapping[str, Any]) -> bool:
    kinds = {"training": "curves", "tradeoff": "tradeoff", "categories": "categories", "cost": "cost"}
    if section in kinds:
        return bool(context["has"][kinds[section]])
    if section in ("effects", "pictures"):
        return bool(context["effects" if section == "effects" else "gallery"])
    return True
