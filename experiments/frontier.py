"""The frontier picture: attack success against over-refusal, one line an arm over the ratio, with intervals.

Run: ``python -m experiments.frontier STUDY_FOLDER [--output frontier.svg] [--method smh]``. The folder is the one in
which ``seawall compare`` keeps the runs of a study. Runs of several seeds are pooled: their counts are added, and the
intervals are Wilson's over the pooled counts, which take every prompt of every seed for independent.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from experiments.fingerprints import resolved_methods
from framework.errors import DataError, SeawallError
from framework.evaluation.rates import Rate
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
    """What is joined by a line: all settings of the methods but the ratio."""
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
    """Return the last model of every run and, once, the model each of them had before, pooled over seeds.

    Args:
        runs: finished runs.
        method: whose ratio is varied.

    Raises:
        ConfigError: a run has a method or a setting that is not known.
        DataError: a run measured no attack success or no over-refusal.
    """
    settings = [_settings(run, method) for run in runs]
    arms = _arm_names([one for one in settings if one is not None], method)
    groups: dict[tuple[str, str, float | None], list[Mapping[str, Any]]] = {}
    for run, own in zip(runs, settings, strict=True):
        rows, label = run["results"]["rows"], str(run["label"])
        arm = label if own is None else arms[_key(own.fixed)]
        groups.setdefault((label, arm, None if own is None else own.ratio), []).append(rows[-1])
        if len(rows) > 1:
            before = f"before ({rows[-2]['point']})"
            groups.setdefault((before, before, None), []).append(rows[-2])
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


class _Settings(NamedTuple):
    """Settings of the methods of a run, defaults included."""

    fixed: dict[str, Any]
    """All but the ratio: those of the method by their names, those of others as ``stage.method.setting``."""
    ratio: float


def _settings(run: Mapping[str, Any], method: str) -> _Settings | None:
    """Return the settings of a run; None where no stage has the method."""
    own: dict[str, Any] | None = None
    others: dict[str, Any] = {}
    for stage, given in run["results"]["config"]["stages"].items():
        for one in resolved_methods(given["methods"]) if given else ():
            if one["name"] == method:
                own = one["config"]
            else:
                name = f"{stage}.{one['name']}"
                others |= {name: "on"} | {f"{name}.{key}": value for key, value in one["config"].items()}
    if own is None:
        return None
    return _Settings(
        {key: value for key, value in own.items() if key != "ratio"} | others, float(own.get("ratio", 1.0))
    )


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _arm_names(settings: Sequence[_Settings], method: str) -> dict[str, str]:
    """Return by settings the name of their arm: what it chooses and, where arms would share a name, what differs."""
    arms = {_key(one.fixed): one.fixed for one in settings}
    short = {key: _short_name(fixed, method) for key, fixed in arms.items()}
    names = {}
    for key, own in arms.items():
        alike = [arms[other] for other, name in short.items() if name == short[key]]
        differing = [name for name in own if len({_key(other.get(name)) for other in alike}) > 1]
        # A method that only one of them has is named, its settings are not.
        shown = [name for name in differing if name.rpartition(".")[0] not in differing]
        names[key] = ", ".join([short[key], *(f"{name} {own[name]}" for name in shown)])
    return names


def _short_name(fixed: Mapping[str, Any], method: str) -> str:
    return f"{fixed.get('select', method)}{', controlled' if fixed.get('balance') == 'controlled' else ''}"


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
