from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from experiments import cli
from experiments.cli import main
from framework.errors import ConfigError, NoEffectError, StorageError

RATE = {"value": 0.125, "numerator": 10, "denominator": 80, "low": 0.069, "high": 0.215}
RESULTS = {"name": "quickstart", "rows": [{"label": "aligned", "metrics": {"attack_success": RATE}, "cost": {}}]}


def fake_module(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    module = ModuleType(name)
    for key, value in members.items():
        setattr(module, key, value)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture(autouse=True)
def _no_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are replaced here, so there is nothing to write a report about."""
    nothing = {"present_run": lambda results: None, "present_study": lambda table, tracking: None}
    fake_module(monkeypatch, "experiments.presentation", **nothing)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Replaces the run itself; collects the configurations it was given."""
    seen: list[Any] = []

    def run_recipe(config: Any, *, console: Any) -> dict[str, Any]:
        print("a library talks")
        seen.append(config)
        return RESULTS

    fake_module(monkeypatch, "experiments.run", run_recipe=run_recipe)
    return seen


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def run_recipe(config: Any, *, console: Any) -> dict[str, Any]:
        raise error

    fake_module(monkeypatch, "experiments.run", run_recipe=run_recipe)


def test_help_and_version_answer_at_once() -> None:
    started = time.perf_counter()
    code = "import sys; from experiments.cli import main; c = main(['--help']); print(c, 'torch' in sys.modules)"
    root = Path(cli.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    seconds = time.perf_counter() - started
    assert done.stdout.splitlines()[-1] == "0 False"
    for command in ("run", "evaluate", "compare", "methods", "contract", "doctor"):
        assert command in done.stdout
    assert seconds < 10  # a guard against importing torch, not a benchmark


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("seawall ")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["frobnicate"], "invalid choice: 'frobnicate'"),
        ([], "required: COMMAND"),
        (["run"], "required: RECIPE"),
        (["run", "quickstart", "--jsn"], "unrecognized arguments: --jsn"),
        (["methods", "seed=1"], "unrecognized arguments: seed=1"),
    ],
)
def test_wrong_usage_leaves_with_two(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert expected in capsys.readouterr().err


def test_settings_stand_before_and_after_options(runs: list[Any]) -> None:
    assert main(["run", "quickstart", "seed=1", "--json", "learning_rate=null", "--verbose"]) == 2
    assert main(["run", "quickstart", "--json", "seed=1", "model=org/other", "--verbose", "stages.align=null"]) == 0
    (config,) = runs
    assert (config.seed, config.model.name, config.stages.align) == (1, "org/other", None)


def test_json_is_alone_on_the_standard_output(runs: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "quickstart", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == RESULTS
    assert "a library talks" in captured.err


def test_without_json_the_table_is_printed(runs: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "quickstart"]) == 0
    assert "10/80" in capsys.readouterr().out


def test_every_problem_of_the_settings_is_listed_without_a_traceback(
    runs: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["seeed=1", "max_length=-1", "stages.finetune.methods.asfd={}", "stages.finetune.data.task=triag"]
    assert main(["run", "quickstart", *arguments, "evaluate.judges=[rulse]", "model=smollm3"]) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert lines[0] == "seawall: 6 problems"
    assert len(lines) == 7
    for expected in (
        "'seeed'. Did you mean `seed`?",
        "'asfd'. Did you mean 'asft'?",
        "'triag'",
        "'rulse'",
        "'smollm3'",
    ):
        assert expected in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert runs == []


def test_a_missing_recipe_leaves_with_two(capsys: pytest.CaptureFixture[str], runs: list[Any]) -> None:
    assert main(["run", "nothing/here.yaml"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("seawall: Expected `recipe` to be a YAML file or one of ")
    assert "quickstart" in said


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (ConfigError("bad [x]"), 2, "seawall: bad [x]\n"),
        (NoEffectError("asft did nothing"), 1, "seawall: asft did nothing\n"),
        (StorageError("disk full"), 1, "seawall: disk full\n"),
        (KeyboardInterrupt(), 130, "seawall: interrupted; finished stages are kept and will be reused\n"),
        (ZeroDivisionError("oops"), 1, "seawall: ZeroDivisionError: oops\nThis is not your mistake."),
    ],
)
def test_every_failure_has_its_exit_code(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    expected: str,
) -> None:
    failing(monkeypatch, error)
    assert main(["run", "quickstart"]) == code
    captured = capsys.readouterr()
    assert captured.err.startswith(expected)
    assert "Traceback" not in captured.err
    assert captured.out == ""


@pytest.mark.parametrize("error", [ZeroDivisionError("oops"), NoEffectError("nothing")])
def test_verbose_shows_the_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    failing(monkeypatch, error)
    assert main(["run", "quickstart", "--verbose"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_evaluate_hands_model_and_settings_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Any] = []

    def evaluate_command(model: str, config: Any, *, console: Any) -> dict[str, Any]:
        seen.append((model, config.model.name, config.task, config.evaluate.limit))
        return RESULTS

    fake_module(monkeypatch, "experiments.evaluate", evaluate_command=evaluate_command)
    assert main(["evaluate", "org/model", "--json", "task=triage", "evaluate.limit=3"]) == 0
    assert seen == [("org/model", "org/model", "triage", 3)]
    assert json.loads(capsys.readouterr().out) == RESULTS
    assert main(["evaluate", "org/model", "limit=3"]) == 2


def test_compare_checks_every_cell_first_and_reports_failed_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    seen: list[Any] = []
    kept = ["--results", str(tmp_path)]
    status = "finished"

    def compare_study(study: Any, *, console: Any, **options: Any) -> dict[str, Any]:
        seen.append(study)
        return {"study": study.name, "rows": RESULTS["rows"], "runs": [{"cell": "a", "status": status}]}

    fake_module(monkeypatch, "experiments.compare", compare_study=compare_study)
    assert main(["compare", "quickstart", "grid.seeds=[0,1]", *kept]) == 0
    assert seen[0].grid.seeds == [0, 1]
    assert main(["compare", "quickstart", "grid.methods.AsFT.methods={asfd: {}}", *kept]) == 2
    assert "In `AsFT`: In `stages.finetune.methods`: " in capsys.readouterr().err
    status = "failed"
    assert main(["compare", "quickstart", *kept]) == 1
    assert "a: failed" in capsys.readouterr().out
    assert len(seen) == 2


def test_methods_are_listed_as_table_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    assert "asft" in capsys.readouterr().out
    assert main(["methods", "--json"]) == 0
    methods = {method["name"]: method for method in json.loads(capsys.readouterr().out)}
    assert methods["asft"]["points"]
    assert set(methods["asft"]) == {"name", "summary", "points", "supports"}


@dataclass
class Check:
    name: str
    status: str
    detail: str = "found"
    remedy: str = "do this"


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("warn", 0), ("fail", 1)])
def test_doctor_fails_when_a_check_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], status: str, code: int
) -> None:
    fake_module(monkeypatch, "experiments.doctor", diagnose=lambda: [Check("disk", status)])
    assert main(["doctor"]) == code
    assert "do this" in capsys.readouterr().out
    assert main(["doctor", "--json"]) == code
    (check,) = json.loads(capsys.readouterr().out)
    assert check == {"name": "disk", "status": status, "detail": "found", "remedy": "do this"}


def test_the_console_script_leaves_with_the_exit_code() -> None:
    root = Path(cli.__file__).parents[1]
    command = [sys.executable, "-m", "experiments.cli", "run", "--nonsense"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=dict(os.environ), check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: seawall run")
