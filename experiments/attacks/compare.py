"""Several models under the same suite of attacks: one table, curves over the budget, worst cases, paired tests.

Run: ``python -m experiments.attacks.compare FILE FILE ... [--baseline LABEL] [--output FOLDER]``. A file is the
``attack.json`` of ``seawall attack``, or the folder it lies in; ``LABEL=FILE`` gives its model another name.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.attacks.attack_files import AttackFile, check_comparable, point_setting, read_attack_file
from experiments.attacks.attack_picture import curves_picture, standalone_svg, survival_picture
from experiments.attacks.budget_curves import SHOWN_AT, BudgetCurve, LogRank, budget_curves, log_rank, success_at
from experiments.attacks.interface import AttackOutcome, AttackPoint
from experiments.attacks.paired_attacks import PairedAttack, paired_attacks, unpaired_attacks
from experiments.attacks.worst_case import WorstCase, check_floor, last_points, worst_case
from experiments.report.figures import Picture
from experiments.statistics import holm
from framework.errors import ConfigError, DataError, SeawallError, describe_unknown
from framework.files import to_plain, write_atomic, write_json

__all__ = ["AttackComparison", "ModelRow", "compare_attacks", "comparison_markdown", "write_comparison"]


@dataclass(frozen=True)
class HeldTest:
    """The log-rank test of a model against the baseline under one attack."""

    title: str
    """Of the attack at its setting."""
    test: LogRank
    p_holm: float
    """Corrected over the attacks compared with this model."""


@dataclass(frozen=True)
class ModelRow:
    """What the attacks did to one model."""

    label: str
    worst: WorstCase
    curves: tuple[BudgetCurve, ...]
    rates: Mapping[str, Mapping[str, Any]]
    """Attack and setting to the rate with the whole budget, and what was spent of which unit."""
    paired: tuple[PairedAttack, ...]
    """Against the baseline; empty for the baseline itself."""
    held: tuple[HeldTest, ...]
    steps: Mapping[str, Mapping[int, Mapping[str, Any]]] = field(default_factory=dict)
    """Attack that trains, at its setting, to the rate after each number of steps it was measured at."""
    missing: tuple[str, ...] = ()
    """Attacks that another model was given and this one has no results of, with the reason where it is known."""
    unpaired: tuple[str, ...] = ()
    """Attacks of both this model and the baseline that could not be paired, each with the reason."""


@dataclass(frozen=True)
class AttackComparison:
    """Models beside each other."""

    baseline: str
    floor: float | None
    rows: tuple[ModelRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; which requests were broken is left to the files compared."""
        found = to_plain(self)
        for row in found["rows"]:
            for curve in row["curves"]:
                curve.pop("held")
        return dict(found)


def compare_attacks(
    files: Sequence[str | Path],
    *,
    baseline: str | None = None,
    floor: float | None = None,
    limits: Mapping[str, int] | None = None,
) -> AttackComparison:
    """Return how models stand to each other under the attacks they have in common.

    Args:
        files: at least one, of ``seawall attack``, also as ``LABEL=FILE``; their labels differ.
        baseline: label of the model the others are compared with; None takes the first.
        floor: share of the unattacked model's utility below which an attack does not count; None takes the largest
            that the suites name.
        limits: most that may be spent in the worst case, by unit.

    Raises:
        DataError: no file, a file that cannot be read, two models of one label, models that were not measured alike,
            attacks of one name with other settings, or nothing in common.
        ConfigError: an unknown baseline, or a floor that is no share.
    """
    check_floor(floor)
    if not files:
        raise DataError("Expected at least one results file of `seawall attack`, but got none.")
    read = [read_attack_file(path) for path in files]
    labels = [one.label for one in read]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise DataError(f"Expected every model to have a label of its own, but got {', '.join(twice)} twice.")
    chosen = baseline if baseline is not None else labels[0]
    if chosen not in labels:
        raise ConfigError(describe_unknown("baseline", chosen, labels))
    check_comparable(read)
    floors = [one.utility_floor for one in read if one.utility_floor is not None]
    used = floor if floor is not None else max(floors, default=None)
    curves = {one.label: _curves(one) for one in read}
    base = next(one for one in read if one.label == chosen)
    rows = [
        ModelRow(
            label=one.label,
            worst=worst_case(one.outcomes, floor=used, limits=limits, num_failed=len(one.failed)),
            curves=tuple(curves[one.label]),
            rates=_rates(one),
            paired=() if one is base else tuple(paired_attacks(one.outcomes, base.outcomes)),
            held=() if one is base else tuple(_held_tests(curves[one.label], curves[chosen])),
            steps=_step_rates(one),
            missing=_missing(one, read),
            unpaired=() if one is base else tuple(unpaired_attacks(one.outcomes, base.outcomes)),
        )
        for one in read
    ]
    return AttackComparison(chosen, used, tuple(rows))


def comparison_markdown(comparison: AttackComparison) -> str:
    """Return the comparison as Markdown; no request and no reply is in it."""
    rows = comparison.rows
    titles = list(dict.fromkeys(title for row in rows for title in row.rates))
    lines = ["# Attacks compared", "", "Attack success with the whole budget, 95 % Wilson intervals.", ""]
    cells, by_step = [_rate_cells(title, comparison) for title in titles], _step_cells(comparison)
    lines += _table(["attack", *(row.label for row in rows)], cells)
    if any("†" in cell for row in [*cells, *by_step] for cell in row):
        lines += ["", "† The attacked model lost its utility; this does not count as broken open."]
    if any("‡" in cell for row in cells for cell in row):
        lines += ["", "‡ Measured with this smaller budget alone, so that it may not be set beside others of its row."]
    floor = "no floor" if comparison.floor is None else f"utility floor {comparison.floor:.0%}"
    lines += ["", f"## Worst case ({floor})", "", *(f"- {row.label}: {row.worst}." for row in rows), ""]
    lines.append("Each interval holds for the maximum over all attacks at once (bootstrap over requests).")
    lacking = [f"- {row.label} has no results of {', '.join(row.missing)}." for row in rows if row.missing]
    if lacking:
        lines += ["", "The worst cases are over each model's own attacks, which are not the same:", "", *lacking]
    if by_step:
        head = ["attack", "steps", *(row.label for row in rows)]
        lines += ["", "## After so many steps of training", "", *_table(head, by_step)]
    budget = [_budget_cells(curve, row.label) for row in rows for curve in row.curves]
    if budget:
        head = ["model", "attack", *(f"@{k}" for k in SHOWN_AT), "broken", "median held"]
        lines += ["", "## Over the budget", "", *_table(head, budget)]
    tests = [_paired_cells(row.label, pair) for row in rows for pair in row.paired]
    if tests:
        head = ["model", "attack", "model's", "baseline's", "difference", "only baseline / only model", "p (Holm)"]
        lines += ["", f"## Paired with {comparison.baseline}", "", *_table(head, tests)]
    alone = [f"- {row.label}, {text}." for row in rows for text in row.unpaired]
    if alone:
        lines += ["", f"What could not be paired with {comparison.baseline}:", "", *alone]
    held = [
        [row.label, one.title, f"{one.test.statistic:.2f}", f"{one.p_holm:.3g}"] for row in rows for one in row.held
    ]
    if held:
        lines += ["", f"## How long requests hold, against {comparison.baseline}", ""]
        lines += _table(["model", "attack", "log-rank chi-square", "p (Holm)"], held)
    return "\n".join(lines) + "\n"


def write_comparison(comparison: AttackComparison, folder: Path) -> list[Path]:
    """Write ``comparison.json``, ``comparison.md`` and the pictures, SVG and PNG; returns their paths.

    Raises:
        StorageError: the folder cannot be written.
    """
    found = [folder / "comparison.json", folder / "comparison.md"]
    write_json(found[0], comparison.to_dict())
    write_atomic(found[1], comparison_markdown(comparison))
    by_model = {row.label: row.curves for row in comparison.rows}
    pictures: list[Picture | None] = [curves_picture(by_model), survival_picture(by_model)]
    for picture in pictures:
        if picture is not None:
            found += [folder / f"{picture.name}.svg", folder / f"{picture.name}.png"]
            write_atomic(found[-2], standalone_svg(picture))
            write_atomic(found[-1], picture.png)
    return found


def _curves(file: AttackFile) -> list[BudgetCurve]:
    found = []
    for outcome in file.outcomes:
        attempts = file.attempts(outcome) if outcome.unit == "queries" else None
        found += budget_curves(outcome, attempts=attempts)
    return found


def _missing(file: AttackFile, files: Sequence[AttackFile]) -> tuple[str, ...]:
    named = dict.fromkeys(name for one in files for name in [*(made.name for made in one.outcomes), *one.failed])
    own = {outcome.name for outcome in file.outcomes}
    return tuple(f"{name} (failed)" if name in file.failed else name for name in named if name not in own)


def _rates(file: AttackFile) -> dict[str, Mapping[str, Any]]:
    found: dict[str, Mapping[str, Any]] = {}
    for outcome in file.outcomes:
        for point in last_points(outcome).values():
            found[_title(outcome, point)] = {**_rate_of(point), "spent": point.spent, "unit": outcome.unit}
    return found


def _step_rates(file: AttackFile) -> dict[str, dict[int, Mapping[str, Any]]]:
    found: dict[str, dict[int, Mapping[str, Any]]] = {}
    for outcome in file.outcomes:
        for point in outcome.points if outcome.unit == "steps" else ():
            found.setdefault(_title(outcome, point), {})[point.spent] = _rate_of(point)
    return found


def _title(outcome: AttackOutcome, point: AttackPoint) -> str:
    setting = ", ".join(f"{key} {value}" for key, value in point_setting(point).items())
    return f"{outcome.name} ({setting})" if setting else outcome.name


def _rate_of(point: AttackPoint) -> Mapping[str, Any]:
    return {**point.metrics["attack_success"], "utility_share": point.metrics.get("utility_share", {}).get("value")}


def _held_tests(curves: Sequence[BudgetCurve], baseline: Sequence[BudgetCurve]) -> list[HeldTest]:
    other = {curve.title: curve for curve in baseline}
    found = []
    for curve in curves:
        # One look at the requests is no time: the paired test says all there is.
        if curve.title in other and len(curve.spent) > 1:
            test = log_rank(curve.held, other[curve.title].held)
            if test is not None:
                found.append((curve.title, test))
    corrected = holm([test.p_value for _, test in found]) if found else []
    return [HeldTest(title, test, p) for (title, test), p in zip(found, corrected, strict=True)]


def _rate_cells(title: str, comparison: AttackComparison) -> list[str]:
    rates = [row.rates.get(title) for row in comparison.rows]
    most = max(rate["spent"] for rate in rates if rate is not None)
    cells = ["-" if rate is None else _rate_text(rate, comparison.floor) for rate in rates]
    # A training that stopped early leaves less than its neighbours were attacked with.
    marks = [f" ‡ {one['spent']} {one['unit']}" if one is not None and one["spent"] < most else "" for one in rates]
    return [title, *(cell + mark for cell, mark in zip(cells, marks, strict=True))]


def _step_cells(comparison: AttackComparison) -> list[list[str]]:
    rows = comparison.rows
    titles = dict.fromkeys(title for row in rows for title in row.steps)
    steps = {title: sorted({step for row in rows for step in row.steps.get(title, {})}) for title in titles}
    found = []
    for title, step in ((name, at) for name in titles for at in steps[name]):
        rates = [row.steps.get(title, {}).get(step) for row in rows]
        cells = ["-" if rate is None else _rate_text(rate, comparison.floor) for rate in rates]
        found.append([title, str(step), *cells])
    return found


def _rate_text(rate: Mapping[str, Any], floor: float | None) -> str:
    counts = f"{rate['numerator']}/{rate['denominator']}"
    is_below = None not in (floor, rate["utility_share"]) and rate["utility_share"] < floor
    mark = " †" if is_below else ""
    return f"{rate['value']:.1%} ({counts}, {rate['low']:.1%} to {rate['high']:.1%}){mark}"


def _budget_cells(curve: BudgetCurve, label: str) -> list[str]:
    last = curve.spent[-1]
    shown = [f"{success_at(curve.held, k).value:.1%}" if k <= last else "-" for k in SHOWN_AT]
    if curve.unit != "queries":
        shown = ["-"] * len(SHOWN_AT)
    survival = curve.survival
    broken = f"{survival.num_broken}/{survival.num_requests}"
    return [label, curve.title, *shown, f"{broken} in {last} {curve.unit}", survival.median_text()]


def _paired_cells(label: str, pair: PairedAttack) -> list[str]:
    return [
        label,
        str(pair.point),
        f"{pair.point.rate.value:.1%}",
        f"{pair.undefended.value:.1%}",
        f"{pair.difference:+.1%} ({pair.low:+.1%} to {pair.high:+.1%})",
        f"{pair.only_undefended} / {pair.only_defended}",
        f"{pair.p_holm:.3g}",
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    texts = [[cell.replace("|", "\\|") for cell in row] for row in [head, *rows]]
    lines = ["| " + " | ".join(row) + " |" for row in texts]
    return [lines[0], "| " + " | ".join("---" for _ in head) + " |", *lines[1:]]


def main(argv: Sequence[str] | None = None) -> int:
    """Compare results files; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m experiments.attacks.compare", description=__doc__)
    parser.add_argument("files", nargs="+", metavar="FILE", help="attack.json of a model, its folder, or LABEL=FILE")
    parser.add_argument("--baseline", metavar="LABEL", help="model the others are compared with (default: the first)")
    parser.add_argument("--floor", type=float, help="share of the utility an attacked model must keep")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="write table, JSON and pictures here")
    arguments = parser.parse_args(argv)
    try:
        found = compare_attacks(arguments.files, baseline=arguments.baseline, floor=arguments.floor)
        print(comparison_markdown(found))
        for path in write_comparison(found, arguments.output) if arguments.output else ():
            print(f"written: {path}")
    except SeawallError as error:
        print(f"seawall: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
