"""Pictures of curves over training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from experiments.report.curves import (
    WINDOW,
    Curve,
    loss_curves,
    margin_over_points,
    margin_over_steps,
    term_curves,
)
from experiments.report.entries import POINTS, Variant
from experiments.report.figures import GREY, Picture, Style, draw

__all__ = ["curves_picture"]

STAGE_NAMES = {"start": "start", "align": "aligned", "finetune": "fine-tuned", "repair": "repaired"}
MAX_LEGEND = 12


def curves_picture(name: str, title: str, variants: Sequence[Variant], styles: Mapping[str, Style]) -> Picture | None:
    """Return panels for loss, method terms and refusal margin, those that have data; None if none has.

    Args:
        name: of the file.
        title: above the picture.
        variants: of one cell.
        styles: by title of a variant.
    """
    panels: list[tuple[str, str, list[Curve]]] = [
        (f"training loss (mean of {WINDOW} steps)", "step", loss_curves(variants)),
        ("method's term, before weighting", "step", term_curves(variants)),
        ("refusal margin while training (nats)", "step", margin_over_steps(variants)),
    ]
    filled = [panel for panel in panels if panel[2]]
    points = margin_over_points(variants)
    count = len(filled) + bool(points)
    if not count:
        return None

    def paint(figure: Figure) -> None:
        axes = figure.subplots(1, count, squeeze=False)[0]
        for axis, (heading, unit, curves) in zip(axes, filled, strict=False):
            _lines(axis, curves, styles)
            axis.set_title(heading)
            axis.set_xlabel(unit)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        if points:
            _margins(axes[-1], points, styles)
        _legend(figure, [variant.title for variant in variants], styles)

    rows = (min(len(variants), MAX_LEGEND + 1) + 2) // 3
    return draw(name, title, _alt(filled, points), size=(3.6 * count + 0.4, 3.1 + 0.22 * rows), paint=paint)


def _lines(axis: Axes, curves: Sequence[Curve], styles: Mapping[str, Style]) -> None:
    for curve in sorted(curves, key=lambda curve: not styles[curve.variant].is_grey):
        style = styles[curve.variant]
        axis.plot(curve.steps, curve.mean, color=style.colour, lw=0.8 if style.is_grey else 1.6)
        if not style.is_grey and (curve.high > curve.low).any():
            axis.fill_between(curve.steps, curve.low, curve.high, color=style.colour, alpha=0.13, lw=0)
    if all((curve.mean >= 0).all() for curve in curves):
        axis.set_ylim(bottom=0)


def _margins(axis: Axes, points: Mapping[str, Mapping[str, float]], styles: Mapping[str, Style]) -> None:
    present = [point for point in POINTS if any(point in values for values in points.values())]
    for name, values in sorted(points.items(), key=lambda item: not styles[item[0]].is_grey):
        style = styles[name]
        places = [present.index(point) for point in values]
        axis.plot(
            places,
            list(values.values()),
            marker=style.marker,
            color=style.colour,
            mfc="none" if style.is_grey else style.colour,
            ms=4.5,
            lw=0.8 if style.is_grey else 1.6,
        )
    axis.axhline(0.0, color=GREY, lw=0.8, ls=(0, (2, 3)))
    axis.set_xticks(range(len(present)), [STAGE_NAMES[point] for point in present])
    axis.set_title("refusal margin of the models (nats)")


def _legend(figure: Figure, names: Sequence[str], styles: Mapping[str, Style]) -> None:
    shown = list(names) if len(names) <= MAX_LEGEND else [name for name in names if not styles[name].is_grey]
    handles = [
        Line2D([], [], color=styles[name].colour, lw=0.8 if styles[name].is_grey else 1.8, label=name[:44])
        for name in shown
    ]
    if len(shown) < len(names):
        handles.append(Line2D([], [], color=GREY, lw=0.8, label=f"{len(names) - len(shown)} others"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=9)


def _alt(panels: Sequence[tuple[str, str, list[Curve]]], points: Mapping[str, Mapping[str, float]]) -> str:
    parts = []
    for heading, _, curves in panels:
        ends = "; ".join(f"{curve.name} from {curve.mean[0]:.2f} to {curve.mean[-1]:.2f}" for curve in curves[:8])
        parts.append(f"{heading}: {ends}.")
    if points:
        ends = "; ".join(
            f"{name} {', '.join(f'{STAGE_NAMES[point]} {value:.2f}' for point, value in values.items())}"
            for name, values in list(points.items())[:8]
        )
        parts.append(f"Refusal margin in nats: {ends}.")
    return "Line charts. " + " ".join(parts)
