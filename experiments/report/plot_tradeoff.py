"""Pareto plots: attack success against utility, over-refusal and cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.report.figures import GREY, INK, MUTED, Picture, Style, draw
from experiments.tradeoff import pareto_front

__all__ = ["Dot", "tradeoff_picture"]

Bounded = tuple[float, float | None, float | None]
"""Value, lower and upper bound."""
MAX_LEGEND = 12


@dataclass(frozen=True)
class Dot:
    """One variant in a trade-off."""

    id: str
    name: str
    values: Mapping[str, Bounded]
    """By key, in the units of the axis."""
    seeds: Sequence[Mapping[str, float]]
    """The same for each seed."""
    is_dominated: bool = False
    is_reference: bool = False


@dataclass(frozen=True)
class Axis:
    """One quantity of the trade-off."""

    key: str
    title: str
    higher_is_better: bool
    unit: str = ""


AXES = (
    Axis("task_accuracy", "task accuracy (%)", True, " %"),
    Axis("over_refusal", "over-refusal (%)", False, " %"),
    Axis("fit_minutes", "preparing and training (minutes)", False, " min"),
)
SAFETY = Axis("attack_success", "attack success (%)", False, " %")


def tradeoff_picture(name: str, title: str, dots: Sequence[Dot], styles: Mapping[str, Style]) -> Picture | None:
    """Return one panel for each quantity that was measured beside attack success; None if there is none.

    Args:
        name: of the file.
        title: above the picture.
        dots: the variants of one cell.
        styles: by name of a dot.
    """
    shown = [dot for dot in dots if SAFETY.key in dot.values]
    axes = [axis for axis in AXES if any(axis.key in dot.values for dot in shown)]
    if not axes:
        return None

    def paint(figure: Figure) -> dict[str, str]:
        tips: dict[str, str] = {}
        panels = figure.subplots(1, len(axes), squeeze=False)[0]
        for number, (panel, axis) in enumerate(zip(panels, axes, strict=True)):
            tips |= _panel(panel, axis, [dot for dot in shown if axis.key in dot.values], styles, f"p{number}")
        _legend(figure, shown, styles)
        return tips

    rows = min(len(shown), MAX_LEGEND + 1)
    height = 3.5 + 0.22 * ((rows + 2) // 3)
    return draw(name, title, _alt(shown, axes), size=(3.6 * len(axes) + 0.4, height), paint=paint)


def _panel(panel: Axes, axis: Axis, dots: Sequence[Dot], styles: Mapping[str, Style], prefix: str) -> dict[str, str]:
    tips = {}
    _bounds(panel, axis, dots, styles)
    for dot in sorted(dots, key=lambda dot: not dot.is_dominated):
        style = styles[dot.name]
        seeds = [seed for seed in dot.seeds if SAFETY.key in seed and axis.key in seed]
        if len(seeds) > 1:
            places = [seed[SAFETY.key] for seed in seeds], [seed[axis.key] for seed in seeds]
            panel.plot(*places, style.marker, color=style.colour, ms=3.5, alpha=0.35, mew=0)
        x, y = dot.values[SAFETY.key], dot.values[axis.key]
        gid = f"{prefix}-{dot.id}"
        face = "none" if style.is_grey else style.colour
        edge = INK if dot.is_reference else style.colour
        panel.plot(x[0], y[0], style.marker, ms=7.5, mfc=face, mec=edge, mew=1.3, gid=gid, zorder=4)
        tips[gid] = f"{dot.name}: attack success {x[0]:.1f} %, {axis.title.split(' (')[0]} {y[0]:.1f}{axis.unit}"
    _front(panel, axis, dots)
    panel.set_xlabel(f"{SAFETY.title}, lower is better")
    panel.set_title(f"{axis.title}, {'higher' if axis.higher_is_better else 'lower'} is better")
    panel.set_xlim(left=min(0.0, panel.get_xlim()[0]))
    return tips


def _front(panel: Axes, axis: Axis, dots: Sequence[Dot]) -> None:
    """Draw the steps between points that no other beats in the two quantities shown."""
    if len(dots) < 2:
        return
    points = [(dot.values[SAFETY.key][0], dot.values[axis.key][0]) for dot in dots]
    is_best = pareto_front(points, maximise=[False, axis.higher_is_better])
    best = sorted({point for point, wins in zip(points, is_best, strict=True) if wins})
    if len(best) > 1:
        panel.step(
            [x for x, _ in best], [y for _, y in best], where="post", color=MUTED, lw=1.0, ls=(0, (4, 3)), zorder=1
        )


def _bounds(panel: Axes, axis: Axis, dots: Sequence[Dot], styles: Mapping[str, Style]) -> None:
    """Draw the intervals of all dots at once: one by one takes as long as the rest of a panel."""
    spreads = {key: [_spread(dot.values[key]) for dot in dots] for key in (SAFETY.key, axis.key)}
    colours: Any = [styles[dot.name].colour for dot in dots]  # one each, which the annotations do not know of
    panel.errorbar(
        [dot.values[SAFETY.key][0] for dot in dots],
        [dot.values[axis.key][0] for dot in dots],
        xerr=list(zip(*spreads[SAFETY.key], strict=True)),
        yerr=list(zip(*spreads[axis.key], strict=True)),
        ecolor=colours,
        elinewidth=0.9,
        alpha=0.55,
        fmt="none",
    )


def _spread(value: Bounded) -> tuple[float, float]:
    """Return how far the bounds are below and above; 0 where there are none."""
    middle, low, high = value
    return (0.0, 0.0) if low is None or high is None else (max(0.0, middle - low), max(0.0, high - middle))


def _legend(figure: Figure, dots: Sequence[Dot], styles: Mapping[str, Style]) -> None:
    named = [dot for dot in dots if not styles[dot.name].is_grey]
    if len(dots) <= MAX_LEGEND:
        named = list(dots)
    handles: list[Any] = [
        Line2D(
            [],
            [],
            ls="",
            marker=styles[dot.name].marker,
            color=styles[dot.name].colour,
            mfc="none" if styles[dot.name].is_grey else styles[dot.name].colour,
            label=_short(dot.name) + (" (dominated)" if dot.is_dominated else ""),
        )
        for dot in named
    ]
    if len(named) < len(dots):
        rest = f"{len(dots) - len(named)} others (dominated, or beyond the palette)"
        handles.append(Line2D([], [], ls="", marker="o", color=GREY, mfc="none", label=rest))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=9)


def _short(name: str) -> str:
    return name if len(name) <= 44 else name[:43] + "\u2026"


def _alt(dots: Sequence[Dot], axes: Sequence[Axis]) -> str:
    named = dots[:MAX_LEGEND]
    parts = [
        f"{dot.name}: attack success {dot.values[SAFETY.key][0]:.1f} %"
        + "".join(
            f", {axis.title.split(' (')[0]} {dot.values[axis.key][0]:.1f}{axis.unit}"
            for axis in axes
            if axis.key in dot.values
        )
        for dot in named
    ]
    more = f"; and {len(dots) - len(named)} more, in the table" if len(dots) > len(named) else ""
    return "Scatter plots. " + "; ".join(parts) + more + "."
