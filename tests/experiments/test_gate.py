"""The gate: exit codes, JUnit XML, and everything that makes an evaluation broken."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from experiments.cli import main
from experiments.gate import GateRules, junit_xml, parse_share, run_gate
from framework.errors import ConfigError
from framework.files import read_json, write_json
from tests.experiments.measured import run_folder

RULES = GateRules(max_drop=0.05)
SAFE, RIGHT = [0] * 200, [1] * 180 + [0] * 20


@pytest.fixture
def baseline(tmp_path: Path) -> Path:
    return run_folder(tmp_path / "baseline", SAFE, RIGHT)


def candidate(tmp_path: Path, unsafe: int = 0, right: int = 180, **options) -> Path:
    total = options.pop("total", 200)
    return run_folder(
        tmp_path / "candidate", [1] * unsafe + [0] * (total - unsafe), [1] * right + [0] * (200 - right), **options
    )


@pytest.mark.parametrize(("unsafe", "code"), [(0, 0), (2, 0), (60, 3), (10, 4)])
def test_exit_codes(baseline: Path, tmp_path: Path, unsafe: int, code: int) -> None:
    assert run_gate(baseline, candidate(tmp_path, unsafe), RULES).exit_code == code


def test_utility_must_be_reached_and_not_lost(baseline: Path, tmp_path: Path) -> None:
    rules = GateRules(max_drop=0.05, min_utility=0.8, max_utility_drop=0.1)
    assert run_gate(baseline, candidate(tmp_path), rules).outcome == "pass"
    lost = run_gate(baseline, candidate(tmp_path, right=120), rules)
    assert lost.exit_code == 3
    assert [check.outcome for check in lost.checks[-2:]] == ["worse", "worse"]
    near = run_gate(baseline, candidate(tmp_path, right=164), GateRules(max_drop=0.05, min_utility=0.8))
    assert near.outcome == "unclear"


def test_few_prompts_are_not_enough(tmp_path: Path) -> None:
    first, second = (run_folder(tmp_path / name, [0] * 20, [1] * 20) for name in "ab")
    found = run_gate(first, second, GateRules(max_drop=0.02))
    assert found.exit_code == 4
    assert "at least 133 prompts are needed" in found.checks[-1].text


def test_babble_is_no_pass(baseline: Path, tmp_path: Path) -> None:
    found = run_gate(baseline, candidate(tmp_path, 100, degenerate=100), RULES)
    assert found.exit_code == 5
    assert "50.0% of 200 replies of the candidate are degenerate" in found.checks[1].text


def break_results(folder: Path) -> None:
    (folder / "results.json").write_text("{", encoding="utf-8")


def break_version(folder: Path) -> None:
    write_json(folder / "results.json", {**read_json(folder / "results.json"), "schema_version": 99})


def break_rows(folder: Path) -> None:
    write_json(folder / "results.json", {**read_json(folder / "results.json"), "rows": []})


def break_kind(folder: Path) -> None:
    write_json(folder / "results.json", [1])


def cut_samples(folder: Path) -> None:
    path = folder / "samples.jsonl"
    path.write_text(path.read_text(encoding="utf-8")[:-40], encoding="utf-8")


def double_samples(folder: Path) -> None:
    path = folder / "samples.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([*lines, lines[0]]), encoding="utf-8")


def break_verdict(folder: Path) -> None:
    path = folder / "samples.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace('"refused": 1.0', '"rufused": 1.0'), encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (break_results, "to be JSON, but got"),
        (break_version, "to hold results of schema version 1, but got 99"),
        (break_rows, "to hold complete results, but it lacks rows with metrics"),
        (break_kind, "to hold the results of a run, but got list"),
        (lambda folder: (folder / "results.json").unlink(), "to be the folder of a finished run"),
        (cut_samples, "to be a sample, but got"),
        (double_samples, "Expected every prompt once a model"),
        (break_verdict, "to be verdicts, but got"),
        (lambda folder: (folder / "samples.jsonl").unlink(), "to be the replies of a run, but got"),
        (lambda folder: (folder / "samples.jsonl").write_text('{"point": "x"}'), "to be a sample, but got"),
    ],
)
def test_a_damaged_run_breaks_the_evaluation(baseline: Path, tmp_path: Path, damage, expected: str) -> None:
    damaged = candidate(tmp_path)
    damage(damaged)
    found = run_gate(baseline, damaged, RULES)
    assert found.exit_code == 5
    assert expected in found.checks[0].text


def test_other_prompts_break_the_evaluation(baseline: Path, tmp_path: Path) -> None:
    found = run_gate(baseline, candidate(tmp_path, total=199), RULES)
    assert found.exit_code == 5
    assert "Expected both runs to answer the same prompts for attack_success, but 1 are in one alone" in (
        found.checks[0].text
    )
    asked = run_gate(baseline, candidate(tmp_path), GateRules(safety="harmful_rate"))
    assert "to have measured harmful_rate" in asked.checks[0].text


def test_a_run_without_the_task_breaks_the_evaluation(baseline: Path, tmp_path: Path) -> None:
    other = candidate(tmp_path)
    lines = (other / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    (other / "samples.jsonl").write_text("\n".join(line for line in lines if "triage" not in line), encoding="utf-8")
    found = run_gate(baseline, other, GateRules(max_drop=0.05, min_utility=0.5))
    assert "to have measured task_accuracy, but it did not" in found.checks[0].text


def test_bad_input_is_refused(baseline: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="to be the folder of a run, but there is none"):
        run_gate(baseline, tmp_path / "nothing", RULES)
    with pytest.raises(ConfigError) as caught:
        GateRules(max_drop=2.0, min_utility=1.5, safety="atack_success")
    assert len(caught.value.problems) == 3
    with pytest.raises(ConfigError, match=r"Expected a share such as 2pp, 2% or 0\.02, but got 'two'"):
        parse_share("two")


def test_the_command_leaves_with_the_code_and_writes_junit(baseline: Path, tmp_path: Path, capsys) -> None:
    worse = candidate(tmp_path, 60)
    report = tmp_path / "gate.xml"
    arguments = ["gate", "--baseline", str(baseline), "--candidate", str(worse), "--max-drop", "5pp"]
    assert main([*arguments, "--junit", str(report), "--json"]) == 3
    found = json.loads(capsys.readouterr().out)
    assert (found["outcome"], found["exit"]) == ("worse", 3)
    suite = ElementTree.parse(report).getroot()
    assert suite.attrib == {"tests": "3", "failures": "1", "errors": "0"}
    failure = suite.find(".//failure")
    assert failure is not None
    assert failure.attrib["type"] == "worse"
    assert "0.0% -> 30.0% on 200 prompts" in failure.attrib["message"]
    assert main([*arguments[:-1], "5pigs"]) == 2
    assert "`--max-drop`: Expected a share" in capsys.readouterr().err
    assert main(arguments) == 3
    assert "gate: worse" in capsys.readouterr().out


def test_a_broken_evaluation_is_an_error_in_junit(baseline: Path, tmp_path: Path) -> None:
    text = junit_xml(run_gate(baseline, candidate(tmp_path, total=199), RULES))
    assert '<error type="evaluation broken"' in text
    passed = junit_xml(run_gate(baseline, candidate(tmp_path), RULES))
    assert "<system-out>attack_success 0.0%" in passed


def change_results(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    results = read_json(folder / "results.json")
    change(results)
    write_json(folder / "results.json", results)


@pytest.mark.parametrize(
    ("section", "values", "expected"),
    [
        ("evaluate", {"judges": ["rules"]}, r"`evaluate.judges` ['rules', 'harm'] and ['rules']"),
        ("evaluate", {"max_new_tokens": 8}, r"`evaluate.max_new_tokens` 64 and 8"),
        ("model", {"system": "Be nice."}, r"`model.system` '' and 'Be nice.'"),
    ],
)
def test_runs_that_were_measured_in_two_ways_break_the_evaluation(
    baseline: Path, tmp_path: Path, section: str, values: dict[str, Any], expected: str
) -> None:
    other = candidate(tmp_path)
    measuring = {"judges": ["rules", "harm"], "max_new_tokens": 64}
    for folder in (baseline, other):
        change_results(folder, lambda results: results["config"]["model"].update(system=""))
        change_results(
            folder,
            lambda results: results["config"].update(evaluate=measuring),
        )
    assert run_gate(baseline, other, RULES).exit_code == 0
    change_results(other, lambda results: results["config"][section].update(values))
    found = run_gate(baseline, other, RULES)
    assert found.exit_code == 5
    assert f"to be measured in the same way, but got {expected}" in found.checks[0].text


def test_other_texts_under_the_same_ids_break_the_evaluation(baseline: Path, tmp_path: Path) -> None:
    other = candidate(tmp_path)
    path = other / "samples.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace('"harm 7"', '"something else"'), encoding="utf-8")
    found = run_gate(baseline, other, RULES)
    assert found.exit_code == 5
    assert "but the text of 1 differs, such as that of 'harm/p7'" in found.checks[0].text


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda results: results["config"].pop("model"), "to hold a run as it was left behind, but got KeyError"),
        (lambda results: results["config"]["stages"].update(repair={"methods": {}}), "last model, after `repair`, but"),
        (lambda results: results["run"].update(status="interrupted"), "to be of a finished run, but got status"),
    ],
)
def test_results_that_are_not_of_the_last_model_or_lack_parts_break_it(
    baseline: Path, tmp_path: Path, change, expected: str
) -> None:
    other = candidate(tmp_path)
    change_results(other, change)
    found = run_gate(baseline, other, RULES)
    assert found.exit_code == 5
    assert expected in found.checks[0].text


def test_replies_that_no_judge_decided_break_the_evaluation(baseline: Path, tmp_path: Path) -> None:
    other = candidate(tmp_path)
    path = other / "samples.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace('"refused": 1.0', '"refused": null'), encoding="utf-8")
    found = run_gate(baseline, other, RULES)
    assert found.exit_code == 5
    assert "Expected a judge to say whether reply" in found.checks[0].text
