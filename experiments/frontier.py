"""The frontier picture: attack success against over-refusal, one line an arm over the ratio, with intervals.

Run: ``python -m experiments.frontier STUDY_FOLDER [--output frontier.svg] [--method smh]``. The folder is the one in
which ``seawall compare`` keeps the runs of a study. Runs of several seeds are pooled: their counts are added, and the
intervals are Wilson's over the pooled counts, which take every prompt of every seed for independent.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from framework.errors import DataError, SeawallError
from framework.evaluation.metrics import Rate
from framework.files import read_json, write_atomic

__all__ = ["FrontierPoint", "collect_points", "frontier_svg", "read_runs"]

ATTACK, REFUSAL = "attack_success", "over_refusal"
COLOURS = ("#1f6feb", "#d1242f", "#1a7f37", "#8250df", "#bf8700", "#57606a")
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 720, 480, 64, 40, 200, 56


class FrontierPoint(NamedTuple):
    """One arm at one ratio, pooled over seeds."""

    label: str
    """As in the study's table."""
    arm: str
    """What is joined by a line: the method's settings but the ratio."""
    ratio: float | None
    """Harmless rows for each harmful one; None for runs without the method."""
    attack: Rate
    refusal: Rate
    num_seeds: int


def read_runs(folder: Path) -> list[dict[str, Any]]:
    """Return the finished runs that ``seawall compare`` keeps in a folder.

    Raises:
        DataError: there are none.
    """
    found = [read_json(path) for path in sorted(folder.glob("*.json")) if path.name != "table.json"]
    runs = [run for run in found if isinstance(run, dict) and run.get("status") == "finished" and "results" in run]
    if not runs:
        raise DataError(
            f"Expected `{folder}` to hold finished runs of a study, but got none. Name the folder of `seawall compare`."
        )
    return runs


def collect_points(runs: Sequence[Mapping[str, Any]], *, method: str = "smh") -> list[FrontierPoint]:
    """Return the last model of every run and, once, the model all of them began with, pooled over seeds.

    Args:
        runs: finished runs.
        method: whose ratio is varied.

    Raises:
        DataError: a run measured no attack success or no over-refusal.
    """
    groups: dict[tuple[str, str, float | None], list[Mapping[str, Any]]] = {}
    for run in runs:
        rows, stage = run["results"]["rows"], _stage_settings(run, method)
        ratio = None if stage is None else float(stage.get("ratio", 1.0))
        groups.setdefault((str(run["label"]), _arm(str(run["label"]), stage), ratio), []).append(rows[-1])
        if len(rows) > 1:
            groups.setdefault(("before", "before", None), []).append(rows[-2])
    return [_pooled(*key, rows) for key, rows in groups.items()]


def frontier_svg(points: Sequence[FrontierPoint], *, title: str = "") -> str:
    """Return the picture: over-refusal to the right, attack success upwards; down and left is better.

    Args:
        points: at least one.
        title: above the picture.
    """
    highest = [max(getattr(point, side).high for point in points) for side in ("refusal", "attack")]
    limit_x, limit_y = (min(1.0, max(0.1, -(-value * 10 // 1) / 10)) for value in highest)

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + x / limit_x * (WIDTH - LEFT - RIGHT)
        return across, HEIGHT - BOTTOM - y / limit_y * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="11">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="20" font-size="14">{escape(title)}</text>',
        *_axes(limit_x, limit_y, place),
    ]
    arms = list(dict.fromkeys(point.arm for point in points))
    for number, arm in enumerate(arms):
        own = sorted((p for p in points if p.arm == arm), key=lambda p: -1.0 if p.ratio is None else p.ratio)
        parts += _line(own, COLOURS[number % len(COLOURS)], place)
        y = TOP + 16 * number
        parts.append(f'<circle cx="{WIDTH - RIGHT + 16}" cy="{y}" r="4" fill="{COLOURS[number % len(COLOURS)]}"/>')
        parts.append(f'<text x="{WIDTH - RIGHT + 26}" y="{y + 4}">{escape(arm)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _stage_settings(run: Mapping[str, Any], method: str) -> Mapping[str, Any] | None:
    stages: Mapping[str, Any] = run["results"]["config"]["stages"]
    found = [stage["methods"][method] for stage in stages.values() if stage and method in stage["methods"]]
    return found[-1] if found else None


def _arm(label: str, settings: Mapping[str, Any] | None) -> str:
    """Return what a point has in common with those of other ratios."""
    if settings is None:
        return label
    balance = settings.get("balance", "fixed")
    return f"{settings.get('select', 'hard')}{', controlled' if balance == 'controlled' else ''}"


def _pooled(label: str, arm: str, ratio: float | None, rows: Sequence[Mapping[str, Any]]) -> FrontierPoint:
    attack, refusal = (_pooled_rate(label, name, rows) for name in (ATTACK, REFUSAL))
    # The model before is the same in every run of a seed: counted once each.
    return FrontierPoint(label, arm, ratio, attack, refusal, len(_distinct(rows)))


def _pooled_rate(label: str, name: str, rows: Sequence[Mapping[str, Any]]) -> Rate:
    if any(name not in row["metrics"] for row in rows):
        raise DataError(
            f"Expected every run of {label!r} to have measured `{name}`, but got one that did not. Name sets in "
            "`evaluate.safety` and `evaluate.over_refusal`."
        )
    own = [row["metrics"][name] for row in _distinct(rows)]
    return Rate.of(name, sum(one["numerator"] for one in own), sum(one["denominator"] for one in own))


def _distinct(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return list({row["model"]["fingerprint"]: row for row in rows}.values())


def _axes(limit_x: float, limit_y: float, place: Any) -> list[str]:
    (left, bottom), (right, top) = place(0, 0), place(limit_x, limit_y)
    parts = [
        f'<path d="M{left} {top}V{bottom}H{right}" fill="none" stroke="#57606a"/>',
        f'<text x="{(left + right) / 2}" y="{HEIGHT - 14}" text-anchor="middle">over-refusal (harmless prompts)</text>',
        f'<text transform="translate(16 {(top + bottom) / 2}) rotate(-90)" text-anchor="middle">attack success</text>',
    ]
    for step in range(6):
        x, y = place(limit_x * step / 5, 0)[0], place(0, limit_y * step / 5)[1]
        parts += [
            f'<path d="M{x:.1f} {bottom}v4M{left} {y:.1f}h-4" stroke="#57606a"/>',
            f'<path d="M{left} {y:.1f}H{right}" stroke="#eaeef2"/>',
            f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{limit_x * step / 5:.0%}</text>',
            f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{limit_y * step / 5:.0%}</text>',
        ]
    return parts


def _line(points: Sequence[FrontierPoint], colour: str, place: Any) -> list[str]:
    places = [place(point.refusal.value, point.attack.value) for point in points]
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    parts = [f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.5" opacity="0.6"/>']
    for point, (x, y) in zip(points, places, strict=True):
        (low_x, low_y), (high_x, high_y) = (
            place(point.refusal.low, point.attack.low),
            place(point.refusal.high, point.attack.high),
        )
        seeds = f"{point.num_seeds} seed{'s' if point.num_seeds > 1 else ''}"
        tip = escape(f"{point.label}, {seeds}: attack success {point.attack}, over-refusal {point.refusal}")
        parts += [
            f'<path d="M{low_x:.1f} {y:.1f}H{high_x:.1f}M{x:.1f} {low_y:.1f}V{high_y:.1f}" stroke="{colour}" '
            'opacity="0.5"/>',
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"><title>{tip}</title></circle>',
        ]
        if point.ratio is not None:
            parts.append(f'<text x="{x + 6:.1f}" y="{y - 6:.1f}" fill="{colour}">1:{point.ratio:g}</text>')
    return parts


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the frontier of a study; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m experiments.frontier", description=__doc__)
    parser.add_argument("folder", type=Path, help="where `seawall compare` keeps the runs")
    parser.add_argument("--output", type=Path, default=Path("frontier.svg"))
    parser.add_argument("--method", default="smh", help="whose ratio is varied (default: smh)")
    arguments = parser.parse_args(argv)
    try:
        points = collect_points(read_runs(arguments.folder), method=arguments.method)
        write_atomic(arguments.output, frontier_svg(points, title=arguments.folder.name))
    except SeawallError as error:
        print(f"seawall: {error}", file=sys.stderr)
        return error.exit_code
    for point in points:
        print(f"{point.label}: attack success {point.attack}, over-refusal {point.refusal}")
    print(f"written to {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
