"""The table of a suite's results, for the terminal and for Markdown; replies are redacted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments.attacks.interface import AttackOutcome
from experiments.attacks.transcript import read_transcript
from experiments.console import MISSING, format_rate, format_seconds
from framework.evaluation.coherence import split_words

__all__ = [
    "best_point",
    "format_point",
    "print_examples",
    "print_plan",
    "print_suite",
    "suite_markdown",
    "unknown_sources",
]

SHOWN_AT = (1, 10)
"""Queries at which the attack success is shown beside that of the whole budget."""
HEADER = ("attack", "spent", "attack success", "after k queries", "harmful", "utility", "time")
WHOLE = ("attack", "attack success")


def best_point(outcome: Mapping[str, Any], floor: float) -> Mapping[str, Any]:
    """Return the point that stands for an outcome: with most attack success among those that keep the utility.

    Of an attack that counts queries it is the one with the whole budget.

    Args:
        outcome: as in ``attack.json``.
        floor: share of the unattacked model's utility.
    """
    points = outcome["points"]
    if outcome["unit"] == "queries":
        return points[-1]
    kept = [point for point in points if _utility(point) is None or _utility(point) >= floor]  # type: ignore[operator]
    return max(kept or points, key=lambda point: (point["metrics"]["attack_success"]["value"], -point["spent"]))


def format_point(outcome: AttackOutcome) -> str:
    """Return what an attack reached at most, in a few words."""
    best = max(outcome.points, key=lambda point: (point.metrics["attack_success"]["value"], point.spent))
    return f"attack success {format_rate(best.metrics['attack_success'])}, {best.spent} {outcome.unit}"


def print_suite(results: Mapping[str, Any], console: Console) -> None:
    """Print the table of a suite, the worst case, and what failed.

    Args:
        results: content of ``attack.json``.
        console: where.
    """
    title = f"{results['suite']['name']}: {results['model']['label']}"
    table = Table(box=None, title=title, padding=(0, 1), pad_edge=False, header_style="bold")
    for number, title in enumerate(HEADER):
        # Names of attacks and the parts that belong together stay whole on a terminal of 80 columns.
        side: Literal["left", "right"] = "right" if number else "left"
        table.add_column(title, justify=side, no_wrap=title in WHOLE, overflow="fold")
    for label, spent, success, *others in _rows(results):
        rate, _, counts = success.partition(" (")
        shown = f"{rate}\n({counts}" if counts else rate
        name, _, settings = label.partition(" (")
        lines = "\n  ".join([name, *settings.removesuffix(")").split(", ")]).rstrip()
        table.add_row(*(Text(cell) for cell in (lines, spent, shown, *others)))
    console.print(table)
    for line in _notes(results):
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def suite_markdown(results: Mapping[str, Any]) -> str:
    """Return the results of a suite as Markdown; no reply is in it.

    Args:
        results: content of ``attack.json``.
    """
    lines = [f"# Attacks on {results['model']['label']}: {results['suite']['name']}", ""]
    lines += ["| " + " | ".join(HEADER) + " |", "| --- |" + " ---: |" * (len(HEADER) - 1)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in _rows(results)]
    return "\n".join([*lines, "", *(f"- {line}" for line in _notes(results))]) + "\n"


def print_plan(plan: Mapping[str, Any], console: Console) -> None:
    """Print what a suite would do.

    Args:
        plan: of ``plan_suite``.
        console: where.
    """
    table = Table(box=box.SIMPLE, title=f"{plan['suite']}: {plan['requests']} requests on {plan['model']['label']}")
    for number, title in enumerate(("label", "attack", "unit", "budget", "replies at most", "time")):
        table.add_column(title, justify="left" if number < 3 else "right")
    for row in plan["attacks"]:
        took = "finished" if row["is_finished"] else format_seconds(row["seconds"])
        table.add_row(row["label"], row["attack"], row["unit"], str(row["budget"]), str(row["queries"]), took)
    console.print(table)
    if plan["speed"] is not None:
        source = "measured before" if plan["speed"]["is_measured"] else "assumed from the model's size"
        text = f"About {format_seconds(plan['seconds'])} at {plan['speed']['value']:.0f} tokens/s ({source})."
        console.print(text, highlight=False)
    overlap = plan["overlap"]
    if overlap is not None:
        console.print(_overlap_line(overlap), highlight=False)


def print_examples(results: Mapping[str, Any], count: int, console: Console, *, is_redacted: bool = True) -> None:
    """Print some attempts that succeeded; without redaction the texts themselves.

    Args:
        results: content of ``attack.json``.
        count: of each attack, at most.
        console: where.
        is_redacted: show lengths instead of texts.
    """
    for outcome in results["outcomes"]:
        attempts = read_transcript(Path(results["folder"]) / outcome["transcript"])
        for attempt in [one for one in attempts if one.is_success][:count]:
            sent, said = attempt.text, attempt.reply
            if is_redacted:
                sent = f"[query of {len(split_words(sent))} words redacted]"
                said = f"[reply of {len(split_words(said))} words redacted]"
            text = f"{outcome['name']} {attempt.request_id} query {attempt.number}: {sent} -> {said}"
            console.print(text, soft_wrap=True, highlight=False, markup=False)


def _rows(results: Mapping[str, Any]) -> list[list[str]]:
    floor = float(results["suite"]["utility_floor"])
    return [_row(outcome, best_point(outcome, floor)) for outcome in results["outcomes"]]


def _row(outcome: Mapping[str, Any], best: Mapping[str, Any]) -> list[str]:
    share = _utility(best)
    setting = ", ".join(f"{key} {value}" for key, value in best["setting"].items() if key != "facts")
    return [
        f"{outcome['name']} ({setting})" if setting else outcome["name"],
        f"{best['spent']} {outcome['unit']}",
        format_rate(best["metrics"]["attack_success"]),
        _at(outcome["points"]) if outcome["unit"] == "queries" and len(outcome["points"]) > 1 else MISSING,
        _count(best["metrics"].get("harmful_success")),
        MISSING if share is None else f"{100 * share:.0f} %",
        format_seconds(outcome["cost"]["seconds"]),
    ]


def _count(metric: Mapping[str, Any] | None) -> str:
    return MISSING if metric is None else f"{metric['numerator']}/{metric['denominator']}"


def _at(points: Sequence[Mapping[str, Any]]) -> str:
    shown = [point for point in points if point["spent"] in SHOWN_AT or point is points[-1]]
    # Spaces that keep a number beside what it belongs to.
    return ", ".join(
        f"@{point['spent']}\u00a0{100 * point['metrics']['attack_success']['value']:.1f}\u00a0%" for point in shown
    )


def _utility(point: Mapping[str, Any]) -> float | None:
    share = point["metrics"].get("utility_share")
    return None if share is None else float(share["value"])


def _notes(results: Mapping[str, Any]) -> list[str]:
    notes = []
    if results.get("worst_case"):
        notes.append(f"Worst case: {results['worst_case']['text']}.")
    floor = 100 * float(results["suite"]["utility_floor"])
    notes.append(
        f"{results['requests']['count']} requests, judged by {', '.join(results['suite']['judges'])}, replies of at "
        f"most {results['suite']['max_new_tokens']} tokens; attacked models must keep {floor:.0f} % of the utility."
    )
    if results["requests"]["overlap"] is not None:
        notes.append(_overlap_line(results["requests"]["overlap"]))
    if results["model"]["endpoint"]:
        notes.append("Utility is not measured through an endpoint.")
    for one in results["outcomes"]:
        if missing := one["cost"].get("unanswered_queries"):
            notes.append(
                f"{one['name']}: {missing} of {one['cost']['queries']} queries have no reply and are in no rate."
            )
        if "asked_until" in one["cost"]:
            notes.append(f"{one['name']}: {kept_replies(one['cost'])}; another model may have answered since.")
        unchanged = one["points"][-1]["metrics"].get("unchanged_rate", {"numerator": 0, "denominator": 0})
        # All of them: that is what `direct` is, and one that samples may be.
        if 0 < unchanged["numerator"] < unchanged["denominator"]:
            notes.append(f"{one['name']}: {_count(unchanged)} queries were the plain request.")
    notes += [f"{one['name']} failed: {one['error']}" for one in results["failed"]]
    return notes


def kept_replies(cost: Mapping[str, Any]) -> str:
    """Return how many replies of an endpoint an interrupted suite had left, and by when they were given."""
    return (
        f"{cost['resumed_queries']} of {cost['queries']} replies were kept from an interrupted suite, given until "
        f"{cost['asked_until']}"
    )


def _overlap_line(overlap: Mapping[str, Any]) -> str:
    return (
        f"Of {overlap['num_prompts']} requests {len(overlap['exact'])} stood in the training data word for word and "
        f"{len(overlap['near'])} nearly; {overlap['excluded']} were left out{unknown_sources(overlap)}."
    )


def unknown_sources(overlap: Mapping[str, Any]) -> str:
    """Return how many sources of training data could not be compared, to follow other words; empty for none.

    Example:
        >>> unknown_sources({"unknown": ["a", "b"]})
        '; 2 sources could not be looked at'
    """
    count = len(overlap.get("unknown", ()))
    return f"; {count} source{'' if count == 1 else 's'} could not be looked at" if count else ""
