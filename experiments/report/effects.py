"""What each method counted: the proof that it acted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.report.cautions import idle_methods
from experiments.report.entries import Variant

__all__ = ["MethodEffects", "method_effects"]

TEXTS: Mapping[str, str] = {
    "largest_term": "largest weighted loss term",
    "loss_calls": "loss terms computed",
    "modules_matched": "modules matched",
    "hooks_added": "hooks",
    "parameters_added": "parameters added",
    "parameters_frozen": "parameters frozen",
    "sources_added": "data sources",
    "gradient_edits": "gradient edits",
    "projections": "projections",
    "weights_edited": "weights edited",
    "stored_numbers": "numbers stored",
}
_HIDDEN = ("reports",)


@dataclass(frozen=True)
class MethodEffects:
    """One method of one variant, over its seeds."""

    variant: str
    stage: str
    method: str
    settings: str
    counters: tuple[tuple[str, str], ...]
    """Text and value, as a range where seeds differ."""
    is_idle: bool
    """Whether it counted nothing in some run."""


def method_effects(variants: Sequence[Variant]) -> list[MethodEffects]:
    """Return the effect counters of every method, the variants in order."""
    found = []
    for variant in variants:
        idle = {pair for entry in variant.entries for pair in idle_methods(entry.run)}
        collected: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
        settings: dict[tuple[str, str], str] = {}
        for entry in variant.entries:
            for stage in entry.run.results["stages"]:
                for method, given in (stage.get("methods") or {}).items():
                    key = (str(stage["stage"]), str(method))
                    collected.setdefault(key, []).append((stage.get("effects") or {}).get(method) or {})
                    settings[key] = ", ".join(f"{name} {_plain(value)}" for name, value in (given or {}).items())
        for (stage_name, method), runs in collected.items():
            counters = tuple(_counters(runs))
            is_idle = (stage_name, method) in idle
            found.append(
                MethodEffects(variant.title, stage_name, method, settings[stage_name, method], counters, is_idle)
            )
    return found


def _counters(runs: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    names = dict.fromkeys(name for run in runs for name in run if name not in _HIDDEN)
    found = []
    for name in names:
        values = [run.get(name) for run in runs]
        numbers = [float(value) for value in values if isinstance(value, (int, float))]
        if numbers and any(numbers):
            low, high = min(numbers), max(numbers)
            text = _number(low) if low == high else f"{_number(low)}\u2013{_number(high)}"
            found.append((TEXTS.get(name, name.replace("_", " ")), text))
    return found


def _number(value: float) -> str:
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}".replace(",", "\u202f")
    return f"{value:.3g}"


def _plain(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 30 else text[:29] + "\u2026"
