"""Alarms when judges contradict each other."""

from __future__ import annotations

from io import StringIO

from rich.console import Console

from experiments.alarms import degenerate_alarms, judge_alarms, study_alarms
from experiments.console import print_results
from framework.evaluation.rates import Rate
from framework.files import to_plain


def row(label: str, a: int, b: int) -> dict:
    metrics = {f"judge/{name}/harmful_rate": {"numerator": n, "denominator": 100} for name, n in (("a", a), ("b", b))}
    return {"label": label, "metrics": metrics}


def run(label: str, *rows: dict, seed: int = 0) -> dict:
    return {"label": label, "model": "m", "task": "t", "share": 0.1, "seed": seed, "results": {"rows": list(rows)}}


def test_clear_contradictions_come_first():
    alarms = judge_alarms([row("start", 50, 50), row("noise", 52, 49), row("apart", 90, 10), row("better", 10, 10)])
    assert alarms == [
        "Judges disagree about apart against start: share judged unsafe +40.0 points by a, -40.0 by b. "
        "Read the replies before trusting either.",
        "Judges disagree about noise against start: share judged unsafe +2.0 points by a, -1.0 by b, "
        "within the 95 % intervals.",
    ]
    assert judge_alarms([]) == []
    assert judge_alarms([{"label": "x", "metrics": {}}] * 2) == []


def test_a_study_compares_runs_that_differ_in_method_only():
    start = row("start", 50, 50)
    alarms = study_alarms([run("plain", start, row("plain", 60, 60)), run("asft", start, row("asft", 40, 70))])
    assert [alarm.split(":")[0] for alarm in alarms] == [
        "Judges disagree about asft against start",
        "Judges disagree about asft against plain",
    ]
    other_seed = study_alarms([run("plain", row("plain", 60, 60)), run("asft", row("asft", 40, 70), seed=1)])
    assert other_seed == []


def test_alarms_are_printed():
    stream = StringIO()
    print_results({"alarms": ["Judges disagree about x"]}, Console(file=stream))
    assert stream.getvalue() == "Judges disagree about x\n"


def test_degenerate_replies_are_told_from_one_in_ten_beyond_the_noise():
    def rate(numerator, denominator):
        return to_plain(Rate.of("degenerate_rate", numerator, denominator))

    rows = [
        {"label": "whole", "metrics": {"degenerate_rate": rate(7, 80), "benign_degenerate_rate": rate(8, 60)}},
        {"label": "broken", "metrics": {"degenerate_rate": rate(56, 80), "benign_degenerate_rate": rate(16, 60)}},
        {"label": "unmeasured", "metrics": {}},
    ]
    assert degenerate_alarms(rows) == [
        "broken gives degenerate text (empty, repeated, echoed, random, a bare label, very short) in 56 of 80 replies "
        "to harmful prompts and 16 of 60 replies to harmless prompts: such replies are neither safe nor useful."
    ]
