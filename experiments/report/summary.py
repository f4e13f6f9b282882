"""Variants side by side, cell by cell: the statistics of a comparison, and what each variant itself cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.comparison import compare_runs
from experiments.measured_runs import RunSamples, find_outcomes
from experiments.report.entries import Entry, Variant, reference_variant
from experiments.report.replies import Reply

__all__ = ["Cell", "compare_cells", "phase_costs"]

_TESTED = ("attack_success", "harmful_rate", "over_refusal", "task_accuracy")
"""Rates whose paired tests the page shows; testing all of them would take most of a report's time."""
_TRAINED = ("finetune", "repair")
"""Stages whose cost is a variant's own; aligning is shared."""


@dataclass(frozen=True)
class Cell:
    """Variants that may be compared: one model, task and harmful share."""

    id: str
    title: str
    variants: tuple[Variant, ...]
    """The reference first, then those on the front, then the dominated ones; the safest of each first."""
    reference: Variant
    methods: Mapping[str, Mapping[str, Any]]
    """Variant's title to its seeds, metrics and cost, as ``compare_runs`` returns them."""
    points: Mapping[str, Mapping[str, Any]]
    """Variant's title to its place in the trade-off; those that lack an objective are absent."""
    tradeoff: Mapping[str, Any]
    notes: tuple[str, ...]

    def is_dominated(self, title: str) -> bool:
        """Whether some other variant is better and nowhere worse."""
        return bool(self.points.get(title, {}).get("is_dominated"))


def compare_cells(
    variants: Sequence[Variant], replies: Mapping[str, Sequence[Reply]], *, reference: str | None = None
) -> list[Cell]:
    """Return the comparison of each cell.

    Args:
        variants: of all cells.
        replies: by entry's id, for runs whose outcomes were not kept.
        reference: label the others are compared with; None takes plain training, else the first variant.
    """
    groups: dict[tuple[Any, ...], list[Variant]] = {}
    for variant in variants:
        groups.setdefault(variant.cell, []).append(variant)
    return [_compare_cell(f"cell{number}", group, replies, reference) for number, group in enumerate(groups.values())]


def phase_costs(variant: Variant) -> dict[str, float]:
    """Return a variant's own seconds by phase and its peak memory, means over its seeds.

    Aligning is left out where another stage follows, because runs share it.
    """
    totals: dict[str, list[float]] = {}
    for entry in variant.entries:
        for key, value in _run_costs(entry).items():
            totals.setdefault(key, []).append(value)
    return {key: float(np.mean(values)) for key, values in totals.items()}


def _compare_cell(
    cell_id: str, variants: Sequence[Variant], replies: Mapping[str, Sequence[Reply]], label: str | None
) -> Cell:
    base = reference_variant(variants, variants[0].cell, label=label) or variants[0]
    runs = [_as_run(variant, entry, replies) for variant in variants for entry in variant.entries]
    # The page has no place for the second view of a difference.
    found = compare_runs(runs, reference=base.title, with_hierarchical=False)[0]
    points = {point["name"]: point for point in found["tradeoff"]["points"]}

    methods = {row["label"]: row for row in found["methods"]}

    def place(variant: Variant) -> tuple[bool, bool, float]:
        harm = methods[variant.title]["metrics"].get("attack_success", {}).get("value", 1.0)
        return variant is not base, bool(points.get(variant.title, {}).get("is_dominated")), float(harm)

    model, task, share = variants[0].cell
    parts = [model.rsplit("/", 1)[-1], task, f"{100 * share:g} % harmful rows" if share is not None else ""]
    return Cell(
        id=cell_id,
        title=", ".join(part for part in parts if part) or "all models",
        variants=tuple(sorted(variants, key=place)),
        reference=base,
        methods=methods,
        points=points,
        tradeoff=found["tradeoff"],
        notes=tuple(found["notes"]),
    )


def _as_run(variant: Variant, entry: Entry, replies: Mapping[str, Sequence[Reply]]) -> RunSamples:
    run = entry.run
    outcomes = run.outcomes or find_outcomes((reply.record for reply in replies.get(entry.id, ())), rates=_TESTED)
    return RunSamples(
        label=variant.title,
        model=run.model,
        task=run.task,
        share=run.share or 0.0,
        seed=run.seed or 0,
        name=run.name,
        row=entry.row,
        outcomes={rate: found for rate, found in outcomes.items() if rate in _TESTED},
    )


def _run_costs(entry: Entry) -> dict[str, float]:
    stages = [stage for stage in entry.run.results["stages"] if stage.get("cost")]
    own = [stage for stage in stages if stage["stage"] in _TRAINED] or [s for s in stages if s["stage"] == "align"]
    found: dict[str, float] = {}
    for stage in own:
        for phase in ("prepare", "train", "other"):
            found[phase] = found.get(phase, 0.0) + float(stage["cost"]["seconds"].get(phase, 0.0))
    if entry.cost.get("evaluate_seconds") is not None:
        found["evaluate"] = float(entry.cost["evaluate_seconds"])
    if entry.cost.get("peak_memory_mib") is not None:
        found["memory_mib"] = float(entry.cost["peak_memory_mib"])
    return found
