"""The frontier picture: attack success against over-refusal, one line an arm over the ratio, with intervals.

Run: ``python -m experiments.frontier STUDY_FOLDER [--output frontier.svg] [--method smh]``. The folder is the one in
which ``seawall compare`` keeps the runs of a study. Pooled are the seeds of one label on one model, task and harmful
share, and nothing else; rates and intervals are those of the study's table. Where no outcomes of single prompts are
kept, which is so for the models before the last ones, seeds count as independent, and the point says so.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from experiments.comparison import compare_runs
from experiments.fingerprints import resolved_methods
from experiments.measured_runs import RunSamples
from experiments.study_records import read_study, study_runs
from framework.errors import DataError, SeawallError
from framework.evaluation.rates import Rate
from framework.files import write_atomic

__all__ = ["FrontierPoint", "collect_points", "frontier_svg"]

ATTACK, REFUSAL = "attack_success", "over_refusal"
COLOURS = ("#1f6feb", "#d1242f", "#1a7f37", "#8250df", "#bf8700", "#57606a")
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 720, 480, 64, 40, 200, 56
CONTROLLED = "controlled"
"""Value of a method's ``balance`` under which its ratio is only where it begins."""
DECISION = re.compile(r"decision/(\d+)/ratio")
"""What a controller reports of the ratio it set after a step."""


class FrontierPoint(NamedTuple):
    """One arm at one ratio on one model, task and harmful share, pooled over seeds."""

    label: str
    """As in the study's table; with the model, task or share where the study has several."""
    arm: str
    """What is joined by a line: all settings of the methods but the ratio, and the same place."""
    ratio: float | None
    """Harmless rows for each harmful one; None for runs without the method, and where a controller moves it."""
    mark: str
    """What stands beside the point: the ratio, or that it is controlled and where it ended; empty without either."""
    attack: Rate
    refusal: Rate
    num_seeds: int
    is_by_prompt: bool
    """Whether the intervals know which replies answer one prompt; otherwise the seeds count as independent."""

    @property
    def title(self) -> str:
        """The label, the end of a controlled ratio, and over how many seeds."""
        ended = f" ({self.mark})" if self.ratio is None and self.mark else ""
        apart = ", taken as independent" if self.num_seeds > 1 and not self.is_by_prompt else ""
        return f"{self.label}{ended}, {self.num_seeds} seed{'s' if self.num_seeds > 1 else ''}{apart}"


def collect_points(records: Sequence[Mapping[str, Any]], *, method: str = "smh") -> list[FrontierPoint]:
    """Return the last model of every run and, once, the model each of them had before, pooled over seeds.

    Args:
        records: finished runs, of ``read_study``.
        method: whose ratio is varied.

    Raises:
        ConfigError: a run has a method or a setting that is not known.
        DataError: a run measured no attack success or no over-refusal, or a label has two runs of one seed.
    """
    chosen = [_settings(record, method) for record in records]
    arms = _arm_names([one for one in chosen if one is not None], method)
    places: dict[tuple[str, str, float], list[_Member]] = {}
    for record, own, run in zip(records, chosen, study_runs(records), strict=True):
        arm = run.label if own is None else arms[_key(own.fixed)]
        places.setdefault((run.model, run.task or "", run.share), []).append(_Member(run, record, own, arm))
    names = _place_names(list(places))
    return [
        point
        for place, members in places.items()
        for point in (*_last_points(members, names[place], method), *_earlier_points(members, names[place]))
    ]


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
    """All but a ratio that holds throughout: the method's own by their names, others as ``stage.method.setting``."""
    ratio: float | None
    """None where a controller moves it."""


class _Member(NamedTuple):
    """One run of a place."""

    run: RunSamples
    record: Mapping[str, Any]
    settings: _Settings | None
    arm: str


def _settings(record: Mapping[str, Any], method: str) -> _Settings | None:
    """Return the settings of a run; None where no stage has the method."""
    own: dict[str, Any] | None = None
    others: dict[str, Any] = {}
    for stage, given in record["results"]["config"]["stages"].items():
        for one in resolved_methods(given["methods"]) if given else ():
            if one["name"] == method:
                own = one["config"]
            else:
                name = f"{stage}.{one['name']}"
                others |= {name: "on"} | {f"{name}.{key}": value for key, value in one["config"].items()}
    if own is None:
        return None
    if own.get("balance") == CONTROLLED:
        # Where a controlled ratio begins is a setting like any other, and no place on a line over the ratio.
        return _Settings(own | others, None)
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
    return f"{fixed.get('select', method)}{', controlled' if fixed.get('balance') == CONTROLLED else ''}"


def _place_names(places: Sequence[tuple[str, str, float]]) -> dict[tuple[str, str, float], str]:
    """Return what is put behind the labels of a model, task and share: those of the three that differ."""
    models, tasks, shares = (dict.fromkeys(values) for values in zip(*places, strict=True))
    short = {model: Path(model).name for model in models}
    is_telling = len(set(short.values())) == len(models)
    names = {}
    for model, task, share in places:
        parts = [short[model] if is_telling else model] if len(models) > 1 else []
        parts += [task or "no task"] if len(tasks) > 1 else []
        parts += [f"{100 * share:g} % harmful"] if len(shares) > 1 else []
        names[model, task, share] = "".join(f", {part}" for part in parts)
    return names


def _last_points(members: Sequence[_Member], place: str, method: str) -> list[FrontierPoint]:
    """Return the points of the last models of a place."""
    groups: dict[str, list[_Member]] = {}
    for one in members:
        ratio = None if one.settings is None else one.settings.ratio
        groups.setdefault(_key([one.run.label, one.arm, ratio]), []).append(one)
    # A label is one point only as long as its settings are: the key stands in for it where seeds are pooled.
    cells = _table_cells([replace(one.run, label=key) for key, group in groups.items() for one in group])
    points = []
    for key, group in groups.items():
        first = group[0]
        ratio = None if first.settings is None else first.settings.ratio
        points.append(
            FrontierPoint(
                first.run.label + place, first.arm + place, ratio, _mark(group, method), **cells[key]._asdict()
            )
        )
    return points


def _earlier_points(members: Sequence[_Member], place: str) -> list[FrontierPoint]:
    """Return the points of the models measured right before the last ones, each model counted once."""
    found: dict[tuple[str, str], tuple[RunSamples, str]] = {}
    for one in members:
        rows = one.record["results"]["rows"]
        if len(rows) > 1:
            row, label = rows[-2], f"before ({rows[-2]['point']})"
            before = replace(one.run, label=label, row=row, outcomes={})
            found.setdefault((label, row["model"]["fingerprint"]), (before, one.run.label))
    counts = Counter((run.label, run.seed) for run, _ in found.values())
    several = {label for (label, _), count in counts.items() if count > 1}
    # Two models of one seed are no seeds of one model: they are told apart by what became of them.
    runs = [
        replace(run, label=f"{run.label} of {owner}") if run.label in several else run for run, owner in found.values()
    ]
    return [
        FrontierPoint(label + place, label + place, None, "", **cell._asdict())
        for label, cell in (_table_cells(runs) if runs else {}).items()
    ]


class _Cell(NamedTuple):
    """Both rates of one label."""

    attack: Rate
    refusal: Rate
    num_seeds: int
    is_by_prompt: bool


def _table_cells(runs: Sequence[RunSamples]) -> dict[str, _Cell]:
    """Return label to its rates as the study's table has them; the runs are of one model, task and share."""
    for name in (ATTACK, REFUSAL):
        if any(name not in run.row["metrics"] for run in runs):
            raise DataError(
                f"Expected every run to have measured `{name}`, but got one that did not: "
                f"{next(run.name for run in runs if name not in run.row['metrics'])!r}. Name sets in "
                "`evaluate.safety` and `evaluate.over_refusal`."
            )
    # The other rates would only take time.
    wanted = [
        replace(
            run,
            row={"metrics": {name: run.row["metrics"][name] for name in (ATTACK, REFUSAL)}},
            outcomes={name: run.outcomes[name] for name in (ATTACK, REFUSAL) if name in run.outcomes},
        )
        for run in runs
    ]
    (table,) = compare_runs(wanted, reference=wanted[0].label, with_hierarchical=False)
    cells = {}
    for one in table["methods"]:
        found = [one["metrics"][name] for name in (ATTACK, REFUSAL)]
        attack, refusal = (
            Rate(name, *(cell[key] for key in ("numerator", "denominator", "value", "low", "high")))
            for name, cell in zip((ATTACK, REFUSAL), found, strict=True)
        )
        # Only a rate without outcomes of prompts is compared by the means of its seeds.
        by_prompt = not any("seed_difference" in cell for cell in found)
        cells[one["label"]] = _Cell(attack, refusal, one["num_runs"], by_prompt)
    return cells


def _mark(group: Sequence[_Member], method: str) -> str:
    settings = group[0].settings
    if settings is None:
        return ""
    if settings.ratio is not None:
        return f"1:{settings.ratio:g}"
    ends = sorted(ratio for one in group if (ratio := _last_ratio(one.record, method)) is not None)
    if not ends:
        return CONTROLLED
    low, high = f"1:{ends[0]:.2g}", f"1:{ends[-1]:.2g}"
    return f"{CONTROLLED}, ends at {low}{'' if low == high else f' to {high}'}"


def _last_ratio(record: Mapping[str, Any], method: str) -> float | None:
    """Return the ratio a controller set last, from the effects of the method; None if it set none."""
    found: dict[int, float] = {}
    for stage in record["results"].get("stages", ()):
        for name, value in ((stage.get("effects") or {}).get(method) or {}).get("reports", {}).items():
            if (match := DECISION.fullmatch(name)) is not None:
                found[int(match[1])] = float(value)
    return found[max(found)] if found else None


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
        tip = escape(_sentence(point))
        parts += [
            f'<path d="M{low_x:.1f} {y:.1f}H{high_x:.1f}M{x:.1f} {low_y:.1f}V{high_y:.1f}" stroke="{colour}" '
            'opacity="0.5"/>',
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"><title>{tip}</title></circle>',
        ]
        if point.mark:
            parts.append(f'<text x="{x + 6:.1f}" y="{y - 6:.1f}" fill="{colour}">{escape(point.mark)}</text>')
    return parts


def _sentence(point: FrontierPoint) -> str:
    return f"{point.title}: attack success {point.attack}, over-refusal {point.refusal}"


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the frontier of a study; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m experiments.frontier", description=__doc__)
    parser.add_argument("folder", type=Path, help="where `seawall compare` keeps the runs")
    parser.add_argument("--output", type=Path, default=Path("frontier.svg"))
    parser.add_argument("--method", default="smh", help="whose ratio is varied (default: smh)")
    arguments = parser.parse_args(argv)
    try:
        points = collect_points(read_study(arguments.folder), method=arguments.method)
        write_atomic(arguments.output, frontier_svg(points, title=arguments.folder.name))
    except SeawallError as error:
        print(f"seawall: {error}", file=sys.stderr)
        return error.exit_code
    for point in points:
        print(_sentence(point))
    print(f"written to {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
