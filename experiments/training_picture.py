"""The curves of a training stage as one picture: what a probe saw of the model, and what the methods reported."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

__all__ = ["Curve", "Panel", "has_telemetry", "training_panels", "training_svg"]

WIDTH, HEIGHT, LEFT, TOP, GAP = 260, 120, 56, 40, 74
COLUMNS = 3
SHADES = ("#08306b", "#2171b5", "#4292c6", "#6baed6", "#74c476", "#fd8d3c", "#d94801")
PROBES = {
    "refusal_probability": "probability of refusal openings",
    "refusal_margin": "refusal margin, nats per token",
    "direction_cosine": "cosine of the refusal direction with the start",
    "direction_auroc": "AUROC along the start's refusal direction",
    "kl_to_start": "KL to the start on harmful prompts, nats",
}
_BY_POSITION = re.compile(r"train/(.+)/(\d+)")
_REFERENCE = "_reference"


class Curve(NamedTuple):
    """One line of a panel."""

    label: str
    points: list[tuple[float, float]]
    """(optimizer step, value), finite."""


class Panel(NamedTuple):
    """One quantity, or several that belong together."""

    title: str
    curves: list[Curve]


def has_telemetry(record: Mapping[str, Any]) -> bool:
    """Return whether a stage's record holds more than loss, learning rate and gradient norm."""
    panels = training_panels(record)
    return any(panel.title != "loss" for panel in panels)


def training_panels(record: Mapping[str, Any]) -> list[Panel]:
    """Return what there is to draw of a stage: probes, then the methods' quantities, then the loss.

    ``train/<method>/<quantity>/<number>`` is drawn as one line for each place in the reply, and a quantity together
    with ``<quantity>_reference``.

    Args:
        record: ``stage.json`` of a stage.
    """
    curves: Mapping[str, Sequence[float | None]] = record.get("curves") or {}
    steps = curves.get("step") or []
    probes = record.get("telemetry") or {}
    panels = [Panel(title, [Curve("", _points(probes[name]))]) for name, title in PROBES.items() if probes.get(name)]
    names = sorted(name for name in curves if name.count("/") > 1)
    grouped: dict[str, list[tuple[str, str]]] = {}
    for name in names:
        match = _BY_POSITION.fullmatch(name)
        if match:
            title, label = f"{match[1].replace('/', ': ')} by place in the reply", match[2]
        else:
            title, label = name.removeprefix("train/").removesuffix(_REFERENCE).replace("/", ": "), ""
            label = "reference" if name.endswith(_REFERENCE) else "model" if f"{name}{_REFERENCE}" in curves else ""
        grouped.setdefault(title, []).append((label, name))
    for title, members in grouped.items():
        ordered = sorted(members, key=lambda member: (int(member[0]) if member[0].isdigit() else -1, member[0]))
        lines = [Curve(label, _points(zip(steps, curves[name], strict=True))) for label, name in ordered]
        panels.append(Panel(title, lines))
    if "train/loss" in curves:
        panels.append(Panel("loss", [Curve("", _points(zip(steps, curves["train/loss"], strict=True)))]))
    panels = [Panel(title, [curve for curve in lines if curve.points]) for title, lines in panels]
    return [panel for panel in panels if panel.curves]


def training_svg(record: Mapping[str, Any]) -> str:
    """Return the panels of a stage as SVG, three in a row.

    Args:
        record: ``stage.json`` of a stage with at least one curve.
    """
    panels = training_panels(record)
    rows = -(-len(panels) // COLUMNS)
    width, height = COLUMNS * (WIDTH + GAP) + 10, rows * (HEIGHT + GAP) + 16
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="10">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for number, panel in enumerate(panels):
        x = LEFT + number % COLUMNS * (WIDTH + GAP)
        parts += _panel(panel, x, TOP + number // COLUMNS * (HEIGHT + GAP))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(panel: Panel, x: float, y: float) -> list[str]:
    points = [point for curve in panel.curves for point in curve.points]
    first, last = min(step for step, _ in points), max(step for step, _ in points)
    low, high = min(value for _, value in points), max(value for _, value in points)
    if low == high:
        low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
    parts = [
        f'<text x="{x}" y="{y - 20}" font-size="12">{html.escape(panel.title)}</text>',
        f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#ccc"/>',
        f'<text x="{x - 4}" y="{y + 8}" text-anchor="end">{high:.3g}</text>',
        f'<text x="{x - 4}" y="{y + HEIGHT}" text-anchor="end">{low:.3g}</text>',
        f'<text x="{x}" y="{y + HEIGHT + 14}">{first:g}</text>',
        f'<text x="{x + WIDTH}" y="{y + HEIGHT + 14}" text-anchor="end">step {last:g}</text>',
    ]
    legend = x
    for number, curve in enumerate(panel.curves):
        colour = SHADES[number % len(SHADES)]
        places = [
            (x + WIDTH * (step - first) / ((last - first) or 1.0), y + HEIGHT * (high - value) / (high - low))
            for step, value in curve.points
        ]
        line = " ".join(f"{px:.1f},{py:.1f}" for px, py in places)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        if len(places) == 1:
            parts.append(f'<circle cx="{places[0][0]:.1f}" cy="{places[0][1]:.1f}" r="2" fill="{colour}"/>')
        if curve.label:
            parts.append(f'<text x="{legend}" y="{y - 6}" fill="{colour}">{html.escape(curve.label)}</text>')
            legend += 10 + 6 * len(curve.label)
    return parts


def _points(pairs: Any) -> list[tuple[float, float]]:
    return [(float(s), float(v)) for s, v in pairs if v is not None and math.isfinite(v)]
