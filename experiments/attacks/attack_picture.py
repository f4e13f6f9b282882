"""Pictures of attacks over their budget: a panel for each attack, a line for each model, with 95 % intervals."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from experiments.attacks.budget_curves import BudgetCurve
from experiments.report.figures import VARIABLES, Picture, Style, draw, styles_of

__all__ = ["curves_picture", "standalone_svg", "survival_picture"]

COLUMNS, MAX_PANELS = 3, 12
CurvesByModel = Mapping[str, Sequence[BudgetCurve]]
"""Label of a model to its curves."""
Paint = Callable[[Axes, BudgetCurve, Style], None]


def curves_picture(curves: CurvesByModel) -> Picture | None:
    """Return attack success against what was spent; None if no attack was looked at more than once.

    Args:
        curves: of each model.
    """
    return _panels(curves, "attack-curves", "Attack success over the budget", _success, _success_alt)


def survival_picture(curves: CurvesByModel) -> Picture | None:
    """Return the share of requests that still hold against what was spent (Kaplan-Meier); None as for the other.

    Args:
        curves: of each model.
    """
    return _panels(curves, "attack-survival", "Requests that still hold (Kaplan-Meier)", _survival, _survival_alt)


def standalone_svg(picture: Picture) -> str:
    """Return a picture as a file of its own: colours in place of the page's variables."""
    text = picture.svg
    for colour, variable in VARIABLES.items():
        text = text.replace(f"var({variable})", colour)
    text = text.replace("var(--font)", "sans-serif")
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return re.sub(r"^<svg ", f"<svg {names} ", text, count=1) + "\n"


def _panels(
    curves: CurvesByModel, name: str, title: str, paint_one: Paint, describe: Callable[[BudgetCurve], str]
) -> Picture | None:
    shown = {label: [curve for curve in own if len(curve.spent) > 1] for label, own in curves.items()}
    titles = list(dict.fromkeys(curve.title for own in shown.values() for curve in own))[:MAX_PANELS]
    if not titles:
        return None
    styles = styles_of(list(curves))
    columns = min(COLUMNS, len(titles))
    rows = -(-len(titles) // columns)

    def paint(figure: Figure) -> None:
        axes = figure.subplots(rows, columns, squeeze=False).flat
        for axis, heading in zip(axes, titles, strict=False):
            unit = ""
            for label, own in shown.items():
                for curve in (one for one in own if one.title == heading):
                    paint_one(axis, curve, styles[label])
                    unit = curve.unit
            axis.set_title(heading if len(heading) <= 40 else f"{heading[:39]}…", fontsize=9)
            axis.set_xlabel("queries a request" if unit == "queries" else "optimizer steps")
            axis.set_ylim(-0.02, 1.02)
            axis.yaxis.set_major_formatter(PercentFormatter(1.0))
            axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        for axis in list(axes)[len(titles) :]:
            axis.set_axis_off()
        handles = [
            Line2D([], [], color=styles[label].colour, marker=styles[label].marker, ms=4, label=label[:44])
            for label in shown
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=9)

    told = [
        f"{label}, {curve.title}: {describe(curve)}."
        for label, own in shown.items()
        for curve in own
        if curve.title in titles
    ]
    height = 2.6 * rows + 0.3 + 0.22 * (-(-len(shown) // 3))
    return draw(name, title, "Line charts. " + " ".join(told), size=(3.4 * columns + 0.3, height), paint=paint)


def _success(axis: Axes, curve: BudgetCurve, style: Style) -> None:
    low, high = [rate.low for rate in curve.rates], [rate.high for rate in curve.rates]
    values = [rate.value for rate in curve.rates]
    # A marker for each query would hide the line.
    every = max(1, len(values) // 8)
    axis.plot(curve.spent, values, color=style.colour, marker=style.marker, ms=3.5, markevery=every)
    axis.fill_between(curve.spent, low, high, color=style.colour, alpha=0.13, lw=0)


def _survival(axis: Axes, curve: BudgetCurve, style: Style) -> None:
    own = curve.survival
    last = curve.spent[-1]
    times = [0, *own.times, last]

    def steps(values: Sequence[float]) -> list[float]:
        return [1.0, *values, values[-1] if values else 1.0]

    axis.step(times, steps(own.survival), where="post", color=style.colour)
    axis.fill_between(times, steps(own.low), steps(own.high), step="post", color=style.colour, alpha=0.13, lw=0)


def _success_alt(curve: BudgetCurve) -> str:
    first, last = curve.rates[0], curve.rates[-1]
    return f"{first.value:.1%} at {curve.spent[0]} {curve.unit} to {last} at {curve.spent[-1]}"


def _survival_alt(curve: BudgetCurve) -> str:
    return f"{curve.survival.num_broken} of {curve.survival.num_requests} broken, median {curve.survival.median_text()}"
