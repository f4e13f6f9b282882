from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console, RenderableType

from experiments.console import (
    doctor_table,
    format_rate,
    format_seconds,
    markdown_table,
    methods_table,
    print_results,
    results_table,
    row_cost,
    stage_times_table,
)

RATE = {"value": 0.125, "numerator": 10, "denominator": 80, "low": 0.069, "high": 0.215}


def make_row(label: str, **metrics: Any) -> dict[str, Any]:
    known = {"attack_success": RATE, "over_refusal": RATE, "task_accuracy": RATE, "refusal_rate": RATE}
    nll = {"value": 1.2345, "count": 4000, "num_groups": 40, "low": 1.1, "high": 1.3}
    cost = {
        "trainable_parameters": 460_800,
        "train_seconds": 125.0,
        "evaluate_seconds": 35.2,
        "tokens_per_second": 1234.4,
        "peak_memory_mib": 2100.0,
    }
    return {"label": label, "metrics": {**known, "benign_nll": nll, **metrics}, "cost": cost}


def render(table: RenderableType, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_a_rate_has_count_and_interval() -> None:
    assert format_rate(RATE) == "12.5 % (10/80; 6.9\N{EN DASH}21.5)"
    assert format_rate(None) == format_rate({"value": None}) == "\N{EN DASH}"


@pytest.mark.parametrize(("seconds", "text"), [(None, "\N{EN DASH}"), (59.6, "1 min 00 s"), (3600, "1 h 00 min")])
def test_seconds_round_into_the_next_unit(seconds: float | None, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize("width", [80, 100, 140])
def test_the_table_fits_and_shows_every_figure_whole(width: int) -> None:
    rows = [make_row("smollm2-135m-instruct"), make_row("aligned"), make_row("safe [bold] + asft (seed 0)")]
    text = render(results_table(rows, title="quickstart", width=width), width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert text.count("(10/80; 6.9\N{EN DASH}21.5)") == 4 * len(rows)
    for piece in ("quickstart", "attack success", "benign NLL", "(n=40; 1.100\N{EN DASH}1.300)", "461 k", "2 min 05 s"):
        assert piece in text
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    assert "[bold]" in text.replace("\n", "")


def test_markdown_has_the_same_figures_in_one_table() -> None:
    lines = markdown_table([make_row("a|b"), {"label": "empty", "metrics": {}, "cost": {}}]).splitlines()
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
    assert "12.5 % (10/80; 6.9\N{EN DASH}21.5)" in lines[2]
    assert lines[2].startswith("| a\\|b |")
    assert "2.05 GiB" in lines[2]
    assert set(lines[3].replace("empty", "").split()) == {"|", "\N{EN DASH}"}


def test_the_harmful_rate_is_a_column_only_when_someone_has_it() -> None:
    assert "harmful rate" not in markdown_table([make_row("a")])
    assert "harmful rate" in markdown_table([make_row("a"), make_row("b", harmful_rate=RATE)])


def test_row_cost_takes_the_larger_peak_and_the_device_first() -> None:
    train = {
        "parameters": {"trainable": 5},
        "seconds": {"train": 2.0},
        "tokens_per_second": {"train": 7.0},
        "peak_memory_mib": {"host": {"train": 100.0}, "device": {}},
    }
    evaluate = {"seconds": {"evaluate": 3.0}, "peak_memory_mib": {"host": {"evaluate": 900.0}, "device": {"x": 300.0}}}
    assert row_cost(train, evaluate) == {
        "trainable_parameters": 5,
        "train_seconds": 2.0,
        "tokens_per_second": 7.0,
        "evaluate_seconds": 3.0,
        "peak_memory_mib": 300.0,
    }
    assert row_cost(None, None) == {"peak_memory_mib": None}


def test_what_a_method_does_before_training_is_a_cost_of_its_own() -> None:
    train = {
        "parameters": {"trainable": 5},
        "seconds": {"train": 2.0, "prepare": 284.1},
        "tokens_per_second": {"train": 7.0},
        "peak_memory_mib": {"host": {"train": 100.0}, "device": {}},
    }
    cost = row_cost(train, None)
    assert cost["prepare_seconds"] == 284.1
    row = make_row("SMH")
    assert "prepare" not in markdown_table([row])
    row["cost"]["prepare_seconds"] = cost["prepare_seconds"]
    assert "4 min 44 s" in markdown_table([row])
    train["seconds"]["prepare"] = 0.01  # type: ignore[index]
    row["cost"] = {**row["cost"], **row_cost(train, None)}
    assert "prepare" not in markdown_table([row])


def test_times_leave_reused_stages_out_of_the_sum() -> None:
    stages = [{"stage": "align", "seconds": 100.0, "reused": True}, {"stage": "finetune", "seconds": 42.0}]
    lines = render(stage_times_table(stages), 80).splitlines()
    assert any("align" in line and "reused" in line and "1 min 40 s" in line for line in lines)
    assert any("together" in line and "42 s" in line for line in lines)


def test_methods_and_checks_are_listed() -> None:
    entry = SimpleNamespace(summary="Penalise [x].", points=("loss_term",), supports=("ddp", "single"))
    text = render(methods_table({"asft": entry}), 100)
    assert all(piece in text for piece in ("asft", "Penalise [x].", "loss_term", "ddp, single"))
    check = SimpleNamespace(name="disk", status="fail", detail="1 GB", remedy="Free [5] GB")
    text = render(doctor_table([check]), 100)
    assert all(piece in text for piece in ("disk", "fail", "1 GB", "Free [5] GB"))


def test_results_name_failed_runs_and_the_folder() -> None:
    console = Console(width=100, file=io.StringIO())
    runs = [{"cell": "a", "status": "failed", "error": "no [disk]"}, {"cell": "b", "status": "finished"}]
    results = {
        "name": "q",
        "rows": [make_row("x")],
        "stages": [{"stage": "s", "seconds": 1.0}],
        "runs": runs,
        "folder": "runs/q",
    }
    print_results(results, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "a: failed: no [disk]" in text
    assert "b:" not in text
    assert "Results: runs/q" in text
    assert text.index("attack success") < text.index("wall time")


def test_each_number_of_forced_tokens_has_a_column_beside_attack_success():
    rate = {"value": 0.25, "numerator": 1, "denominator": 4, "low": 0.05, "high": 0.7}
    metrics = {f"prefill_{count}/attack_success": rate for count in (20, 5)}
    text = markdown_table([{"label": "one", "metrics": metrics}, {"label": "two", "metrics": {}}])
    heading, _, first, second = text.strip().split("\n")
    assert heading.startswith("| model | attack success | prefill 5 | prefill 20 | over-refusal |")
    assert first.count("25.0 % (1/4; 5.0\u201370.0)") == 2
    assert "25.0" not in second
