from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from experiments.commands.output import known_names
from framework.config import check_run
from framework.fields import Problem
from framework.held_out import PromptSource, held_out_problems
from framework.registry import validate_methods
from framework.schema import DataConfig, EvaluateConfig, RunConfig, StageConfig, StagesConfig
from framework.study import load_study_config, study_cells


def checked(*, data: dict[str, Any], methods: dict[str, Any], evaluate: dict[str, Any]) -> list[str]:
    """The problems of a run with one stage, as the commands check it."""
    stage = {"data": {"benign": "embedded", **data}, "methods": methods}
    values = {"name": "a", "stages": {"align": stage}, "evaluate": {"task": False, "after": ["align"], **evaluate}}
    return check_run(values, known=known_names(), validate_methods=validate_methods).problems


@pytest.fixture
def prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of prompts in the working folder; sets of the catalog lie in ``data``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SEAWALL_DATA", str(tmp_path / "data"))
    for name in ("own.jsonl", "data/xstest/xstest_prompts.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}\n", encoding="utf-8")
    return tmp_path / "own.jsonl"


@pytest.mark.usefixtures("prompts")
def test_a_set_that_is_mined_and_measured_is_named_on_both_sides() -> None:
    (problem,) = checked(
        data={},
        methods={"smh": {"benign": ["embedded", "xstest_safe"]}},
        evaluate={"over_refusal": ["embedded", "xstest_safe"]},
    )
    assert problem == (
        "Expected `stages.align.methods.smh.benign` and `evaluate.over_refusal` to name different sets, but got "
        "'xstest_safe' and 'xstest_safe', which hold the same prompts. A rate over what was learnt says nothing: name "
        "another set on one side."
    )


@pytest.mark.usefixtures("prompts")
@pytest.mark.parametrize(
    ("data", "methods", "evaluate", "setting"),
    [
        ({}, {"smh": {"harmful": ["harmbench_standard"]}}, {"safety": ["harmbench_standard"]}, "methods.smh.harmful"),
        ({}, {"smh": {"harmful": ["harmbench"]}}, {"safety": ["harmbench_standard"]}, "methods.smh.harmful"),
        ({}, {"smh": {"harmful": ["own.jsonl"]}}, {"safety": ["./own.jsonl"]}, "methods.smh.harmful"),
        ({}, {"smh": {"benign": ["data/xstest/xstest_prompts.csv"]}}, {"over_refusal": ["xstest_safe"]}, "smh.benign"),
        ({}, {"smh": {"benign": ["xstest/xstest_prompts.csv"]}}, {"over_refusal": ["xstest_safe"]}, "smh.benign"),
        ({}, {"nest": {"safety": "own.jsonl"}}, {"safety": ["own.jsonl"]}, "methods.nest.safety"),
        ({}, {"safety_mix": {"source": "own.jsonl"}}, {"safety": ["own.jsonl"]}, "methods.safety_mix.source"),
        ({"safety": "own.jsonl"}, {}, {"safety": ["own.jsonl"]}, "data.safety"),
        ({"benign": "own.jsonl"}, {}, {"over_refusal": ["own.jsonl"]}, "data.benign"),
        ({"look_alikes": "own.jsonl"}, {}, {"over_refusal": ["own.jsonl"]}, "data.look_alikes"),
        ({"task": "own.jsonl", "task_count": 4}, {}, {"over_refusal": ["own.jsonl"]}, "data.task"),
        (
            {"task": "triage", "task_count": 4, "harmful_share": 0.5, "harmful": "own.jsonl"},
            {},
            {"safety": ["own.jsonl"]},
            "data.harmful",
        ),
    ],
)
def test_what_is_learnt_from_is_not_measured(
    data: dict[str, Any], methods: dict[str, Any], evaluate: dict[str, Any], setting: str
) -> None:
    (problem,) = checked(data=data, methods=methods, evaluate=evaluate)
    assert f"{setting}` and `evaluate.{next(iter(evaluate))}` to name different sets, but got " in problem


@pytest.mark.usefixtures("prompts")
@pytest.mark.parametrize(
    ("data", "methods", "evaluate"),
    [
        (
            {"safety": "embedded", "look_alikes": "embedded"},
            {"smh": {}},
            {"safety": ["embedded", "embedded_jailbreak"]},
        ),
        ({}, {"smh": {"harmful": ["xstest_unsafe"]}}, {"over_refusal": ["xstest_safe"]}),
        ({}, {"smh": {"harmful": ["harmbench_validation"]}}, {"safety": ["harmbench"]}),
        ({"task": "own.jsonl", "task_count": 4}, {}, {"task": True}),
        ({"safety": "own.jsonl"}, {}, {"safety": ["data/xstest/xstest_prompts.csv"]}),
    ],
)
def test_prompts_of_another_split_may_be_measured(
    data: dict[str, Any], methods: dict[str, Any], evaluate: dict[str, Any]
) -> None:
    assert checked(data=data, methods=methods, evaluate=evaluate) == []


def problems(methods: dict[str, Any], measured: list[str], data: DataConfig | None = None) -> list[Problem]:
    stages = StagesConfig(repair=StageConfig(data=data or DataConfig(), methods=methods))
    config = RunConfig(name="a", stages=stages, evaluate=EvaluateConfig(safety=measured, over_refusal=measured))
    return list(held_out_problems(config, lambda name: [PromptSource(Path(name))] if name.endswith("set") else []))


def test_every_place_is_reported_under_its_setting() -> None:
    found = problems({"smh": {"harmful": ["set", "set"], "benign": ["other set"]}}, ["set"], DataConfig(safety="set"))
    assert [problem.path for problem in found] == ["stages.repair.data.safety"] * 2 + ["stages.repair.methods"] * 2
    assert all("`stages.repair.methods.smh.harmful`" in problem.text for problem in found[2:])


def test_a_setting_that_is_left_out_counts_by_its_default() -> None:
    own = EvaluateConfig(safety=["alpaca_mix"], over_refusal=[])
    config = RunConfig(name="a", stages=StagesConfig(repair=StageConfig(methods={"npo": {}})), evaluate=own)
    (problem,) = held_out_problems(config, lambda name: [PromptSource(Path("x"))] if name == "alpaca_mix" else [])
    assert "`stages.repair.methods.npo.source`" in problem.text


def test_settings_that_are_wrong_in_themselves_are_passed_over() -> None:
    assert len(problems({"unheard_of": {"source": "set"}}, ["set"])) == 2
    assert problems({"smh": {"harmful": 3}}, ["set"]) == []


def test_a_study_lists_it_with_its_label(prompts: Path) -> None:
    path = prompts.parent / "study.yaml"
    path.write_text(
        "name: s\nbase: smh_align\ngrid:\n  methods:\n"
        "    mix: {methods: {smh: {benign: [xstest_safe]}}, stage: finetune,"
        " overrides: {evaluate.over_refusal: [xstest_safe]}}\n",
        encoding="utf-8",
    )
    with pytest.raises(ValueError, match=r"In `mix`: Expected `stages\.finetune\.methods\.smh\.benign` and"):
        study_cells(load_study_config(path), known=known_names(), validate_methods=validate_methods)
