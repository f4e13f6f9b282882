"""What a report compares: measured models, and the variants they are seeds of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.report.collecting import CollectedRun
from framework.files import fingerprint

__all__ = ["Entry", "Variant", "find_entries", "find_variants", "reference_variant"]

POINTS = ("start", "align", "finetune", "repair")
_NOT_DECIDING = ("name", "output", "tracking", "seed")
"""Settings that do not make a run another variant."""
_SHOWN_SETTINGS = 2


@dataclass(frozen=True)
class Entry:
    """One measured model; a model that several runs share is one entry."""

    id: str
    title: str
    """Unique within a report."""
    label: str
    point: str
    run: CollectedRun
    row: Mapping[str, Any]
    is_final: bool
    """Whether it is the last model of its run."""

    @property
    def metrics(self) -> Mapping[str, Any]:
        """Key to value, with counts and bounds for rates."""
        found: Mapping[str, Any] = self.row["metrics"]
        return found

    @property
    def cost(self) -> Mapping[str, Any]:
        """Seconds, memory and parameters."""
        return self.row.get("cost") or {}


@dataclass(frozen=True)
class Variant:
    """One column of a comparison: the final models of runs that differ in their seed alone."""

    id: str
    title: str
    """Unique within a report."""
    label: str
    cell: tuple[str, str, float | None]
    """Model, task and harmful share; variants are compared within a cell."""
    entries: tuple[Entry, ...]

    @property
    def methods(self) -> dict[str, Any]:
        """Methods of all stages, by name."""
        stages = (self.entries[0].run.results.get("config") or {}).get("stages") or {}
        return {
            name: given for stage in stages.values() if stage for name, given in (stage.get("methods") or {}).items()
        }


def find_entries(runs: Sequence[CollectedRun]) -> list[Entry]:
    """Return the measured models of finished runs, shared ones once, those earlier in the chain first."""
    found: dict[str, tuple[CollectedRun, Mapping[str, Any], bool]] = {}
    for run in runs:
        rows = run.results["rows"]
        for number, row in enumerate(rows):
            is_final = number == len(rows) - 1
            model = (row.get("model") or {}).get("fingerprint")
            # One model measured in two ways is two entries: only the same replies are the same.
            key = fingerprint([model, row["metrics"], run.name if is_final else ""])
            found.setdefault(key, (run, row, is_final))
    ordered = sorted(found.values(), key=lambda item: (item[2], _place(item[1].get("point"))))
    titles = _unique([_entry_title(*item, runs) for item in ordered], [item[0].name for item in ordered])
    return [
        Entry(f"m{number}", title, _label(run, row, is_final), str(row.get("point") or "start"), run, row, is_final)
        for number, ((run, row, is_final), title) in enumerate(zip(ordered, titles, strict=True))
    ]


def find_variants(entries: Sequence[Entry]) -> list[Variant]:
    """Return the final models grouped into variants, in the order of the runs."""
    groups: dict[tuple[str, int], list[Entry]] = {}
    for entry in entries:
        if entry.is_final:
            key, number = _variant_key(entry), 0
            # The same settings run twice with one seed are two variants: a seed counts once.
            while any(other.run.seed == entry.run.seed for other in groups.get((key, number), [])):
                number += 1
            groups.setdefault((key, number), []).append(entry)
    members = list(groups.values())
    titles = _variant_titles(members)
    return [
        Variant(f"v{number}", title, group[0].label, cell_of(group[0].run), tuple(group))
        for number, (group, title) in enumerate(zip(members, titles, strict=True))
    ]


def reference_variant(
    variants: Sequence[Variant], cell: tuple[Any, ...], *, label: str | None = None
) -> Variant | None:
    """Return the variant of a cell that the others are compared with: the one named, else plain training, else none.

    Args:
        variants: of all cells.
        cell: model, task and harmful share.
        label: of the wanted variant.
    """
    inside = [variant for variant in variants if variant.cell == cell]
    named = [variant for variant in inside if variant.label == label]
    plain = [variant for variant in inside if not variant.methods]
    return next(iter([*named, *plain]), None) if len(inside) > 1 else None


def cell_of(run: CollectedRun) -> tuple[str, str, float | None]:
    """Return what must be equal for a fair comparison: model, task, harmful share."""
    return run.model, run.task, run.share


def _place(point: Any) -> int:
    return POINTS.index(point) if point in POINTS else len(POINTS)


def _label(run: CollectedRun, row: Mapping[str, Any], is_final: bool) -> str:
    return run.label if is_final else str(row["label"])


def _entry_title(run: CollectedRun, row: Mapping[str, Any], is_final: bool, runs: Sequence[CollectedRun]) -> str:
    # Harmful rows come in while fine-tuning: an aligned model is the same whatever their share.
    axes = {"start": ["model"], "align": ["model", "task", "seed"]}.get(
        str(row.get("point")), ["model", "task", "share", "seed"]
    )
    return _label(run, row, is_final) + _suffix(run, runs, axes)


def _suffix(run: CollectedRun, runs: Sequence[CollectedRun], axes: Sequence[str]) -> str:
    varying = [axis for axis in axes if len({getattr(other, axis) for other in runs}) > 1]
    return f" ({', '.join(_axis(axis, getattr(run, axis)) for axis in varying)})" if varying else ""


def _axis(axis: str, value: Any) -> str:
    if axis == "share":
        return f"{100 * value:g} % harmful" if value is not None else "no harmful share"
    return f"{axis} {value}" if axis == "seed" else str(value).rsplit("/", 1)[-1] or f"no {axis}"


def _unique(titles: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return titles, those that occur twice with the run's name, and with a number if that is not enough."""
    found: list[str] = []
    for title, name in zip(titles, names, strict=True):
        wanted = title if titles.count(title) == 1 else f"{title}, {name}"
        number, tried = 2, wanted
        while tried in found:
            tried, number = f"{wanted} #{number}", number + 1
        found.append(tried)
    return found


def _variant_key(entry: Entry) -> str:
    return fingerprint([entry.label, list(cell_of(entry.run)), _deciding(entry.run)])


def _deciding(run: CollectedRun) -> dict[str, Any]:
    """Return the settings that make a run another variant; threads share the work out and change nothing else."""
    config = run.results.get("config") or {}
    found = {key: value for key, value in config.items() if key not in _NOT_DECIDING}
    if isinstance(found.get("trainer"), Mapping):
        found["trainer"] = {key: value for key, value in found["trainer"].items() if key != "threads"}
    return found


def _variant_titles(groups: Sequence[Sequence[Entry]]) -> list[str]:
    runs = [group[0].run for group in groups]
    titles = [group[0].label + _suffix(group[0].run, runs, ["model", "task", "share"]) for group in groups]
    flat = [_flat(_deciding(run)) for run in runs]
    longer = []
    for number, title in enumerate(titles):
        same = [other for other, text in enumerate(titles) if text == title]
        longer.append(title if len(same) == 1 else f"{title} [{_what_differs(number, same, flat)}]")
    return _unique(longer, [run.name for run in runs])


def _what_differs(number: int, same: Sequence[int], flat: Sequence[Mapping[str, Any]]) -> str:
    keys = [key for key, value in flat[number].items() if any(flat[other].get(key) != value for other in same)]
    shown = [f"{'.'.join(key.split('.')[-2:])} {flat[number][key]}" for key in keys[:_SHOWN_SETTINGS]]
    return ", ".join(shown) or "other settings"


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping) or not value:
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, item in value.items():
        found |= _flat(item, f"{prefix}.{key}" if prefix else str(key))
    return found
