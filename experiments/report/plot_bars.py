"""Bars: rates by category, and what each variant cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.report.figures import GREY, PALETTE, Picture, Style, draw
from experiments.report.replies import Count
from experiments.statistics import wilson_interval

__all__ = ["category_picture", "cost_picture"]

KINDS = {
    "harmful": ("attack success by category", "share of harmful prompts answered (%)"),
    "benign": ("over-refusal by category", "share of harmless prompts refused (%)"),
    "task": ("task accuracy by class", "share of right answers (%)"),
}
MAX_BARS = 4
"""Variants side by side; more are in the table below the picture."""
MAX_ROWS = 40
PHASES = (("prepare", "preparing"), ("train", "training"), ("other", "other"), ("evaluate", "evaluating"))

Categories = Mapping[str, Mapping[str, Count]]
"""Kind and category to counts."""


def category_picture(
    name: str, title: str, counts: Mapping[str, Categories], styles: Mapping[str, Style]
) -> Picture | None:
    """Return a panel of bars for each kind of prompt; None if nothing was counted.

    Args:
        name: of the file.
        title: above the picture.
        counts: variant to its counts; the first few are drawn.
        styles: by variant.
    """
    shown = dict(list(counts.items())[:MAX_BARS])
    names = {kind: list(dict.fromkeys(c for found in shown.values() for c in found.get(kind, {}))) for kind in KINDS}
    kinds = [kind for kind in KINDS if len(names[kind]) > 1]
    if not kinds:
        return None
    tallest = max(len(names[kind]) for kind in kinds)

    def paint(figure: Figure) -> None:
        axes = figure.subplots(1, len(kinds), squeeze=False)[0]
        for axis, kind in zip(axes, kinds, strict=True):
            _category_bars(axis, kind, names[kind], shown, styles)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)

    height = 1.3 + tallest * (0.2 + 0.13 * len(shown))
    alt = "Bar charts. " + " ".join(_category_alt(kind, shown) for kind in kinds)
    return draw(name, title, alt, size=(4.1 * len(kinds), height), paint=paint)


def _category_bars(
    axis: Axes, kind: str, names: Sequence[str], counts: Mapping[str, Categories], styles: Mapping[str, Style]
) -> None:
    thickness = 0.8 / len(counts)
    for number, (variant, found) in enumerate(counts.items()):
        places, values, spreads = [], [], [[], []]  # type: tuple[list[float], list[float], list[list[float]]]
        for place, category in enumerate(names):
            count = found.get(kind, {}).get(category)
            if count is None:
                continue
            low, high = wilson_interval(count.hits, count.total)
            value = count.hits / count.total
            places.append(place + (number - (len(counts) - 1) / 2) * thickness)
            values.append(100 * value)
            spreads[0].append(100 * (value - low))
            spreads[1].append(100 * (high - value))
        error: dict[str, Any] = {"ecolor": GREY, "elinewidth": 0.8}
        axis.barh(
            places,
            values,
            thickness * 0.9,
            color=styles[variant].colour,
            label=variant[:44],
            xerr=spreads,
            error_kw=error,
        )
    axis.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    axis.invert_yaxis()
    axis.set_xlim(0, 100)
    axis.grid(axis="y", visible=False)
    heading, unit = KINDS[kind]
    axis.set_title(heading)
    axis.set_xlabel(unit)


def _category_alt(kind: str, counts: Mapping[str, Categories]) -> str:
    worst = []
    for variant, found in counts.items():
        cells = found.get(kind, {})
        if cells:
            name = max(cells, key=lambda c: cells[c].hits / cells[c].total)
            worst.append(f"{variant}: highest for {name.replace('_', ' ')}, {cells[name].hits} of {cells[name].total}")
    return f"{KINDS[kind][0]}: {'; '.join(worst)}."


def cost_picture(name: str, title: str, costs: Mapping[str, Mapping[str, float]]) -> Picture | None:
    """Return stacked minutes and the peak memory of each variant; None if nothing was measured.

    Args:
        name: of the file.
        title: above the picture.
        costs: variant to seconds by phase (keys of ``PHASES``) and ``memory_mib``.
    """
    shown = dict(list(costs.items())[:MAX_ROWS])
    if not any(any(values.get(phase) for phase, _ in PHASES) for values in shown.values()):
        return None

    def paint(figure: Figure) -> None:
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
        places = list(range(len(shown)))
        base = [0.0] * len(shown)
        for (phase, heading), colour in zip(PHASES, (PALETTE[4], PALETTE[0], GREY, PALETTE[7]), strict=True):
            minutes = [values.get(phase, 0.0) / 60 for values in shown.values()]
            if any(minutes):
                left.barh(places, minutes, 0.62, left=base, color=colour, label=heading)
                base = [start + length for start, length in zip(base, minutes, strict=True)]
        memory = [values.get("memory_mib", 0.0) / 1024 for values in shown.values()]
        right.barh(places, memory, 0.62, color=PALETTE[7])
        left.set_yticks(places, [variant if len(variant) <= 36 else variant[:35] + "\u2026" for variant in shown])
        left.invert_yaxis()
        left.set_title("wall time (minutes, mean over seeds)")
        right.set_title("peak memory (GiB)")
        for axis in (left, right):
            axis.grid(axis="y", visible=False)
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)

    parts = [
        f"{variant}: {sum(values.get(phase, 0.0) for phase, _ in PHASES) / 60:.1f} minutes, "
        f"{values.get('memory_mib', 0.0) / 1024:.1f} GiB"
        for variant, values in list(shown.items())[:12]
    ]
    return draw(name, title, f"Bar charts. {'; '.join(parts)}.", size=(9.6, 1.3 + 0.3 * len(shown)), paint=paint)
