"""A complete study answers from what it keeps, with the numbers it would compute again, and imports nothing heavy."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from experiments import compare, study_tables
from experiments.compare import compare_study
from experiments.execution import Execution
from experiments.finished_study import finished_study
from experiments.page_marker import page_marker
from framework.errors import ConfigError
from framework.study import StudyConfig, load_study_config, study_cells
from tests.experiments.test_study_records import STUDY, measure, never

HEAVY = ("torch", "transformers", "pytorch_lightning", "wandb", "optuna", "matplotlib", "scipy", "pandas", "numpy")
SCRIPT = """
import json, sys
sys.modules["experiments.run"] = None  # a run that is started all the same fails at once
from experiments.cli import main
code = main(sys.argv[1:])
print(json.dumps([code, [name for name in {heavy} if name in sys.modules]]), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a study that is complete; ``small.yaml`` and ``kept/small`` lie in it."""
    folder = tmp_path_factory.mktemp("complete")
    (folder / "small.yaml").write_text(STUDY.format(base="quickstart"), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(compare, "run_recipe", measure)
        compare_study(load_study_config(folder / "small.yaml"), results_root=folder / "kept")
    return folder


@pytest.fixture
def study(folder: Path, monkeypatch: pytest.MonkeyPatch) -> StudyConfig:
    monkeypatch.chdir(folder)
    return load_study_config(folder / "small.yaml")


def answer(study: StudyConfig, folder: Path, **options: object) -> dict | None:
    execution = Execution(**options)  # type: ignore[arg-type]
    cells = study_cells(study)
    return finished_study(study, cells, execution=execution, results_root=folder / "kept", environment={})


def test_the_stored_tables_are_those_that_would_be_computed(
    study: StudyConfig, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = answer(study, folder)
    monkeypatch.setattr(compare, "run_recipe", never)
    monkeypatch.setattr(study_tables, "stored_tables", lambda *given: None)
    computed = compare_study(study, results_root=folder / "kept")
    assert found == json.loads(json.dumps(computed))
    assert found["comparison"][0]["methods"][1]["metrics"]["attack_success"]["difference"]["hierarchical_low"] < 0


def test_the_command_imports_nothing_heavy_for_it(study: StudyConfig, folder: Path) -> None:
    marked = f'<meta name="seawall-page" content="{page_marker("redacted")}">'
    (folder / "kept" / "small" / "report.html").write_text(marked, encoding="utf-8")
    command = [sys.executable, "-c", SCRIPT.format(heavy=HEAVY), "compare", "small.yaml", "--results", "kept"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert json.loads(done.stderr.splitlines()[-1]) == [0, []], done.stderr
    assert "Report: kept/small/report.html" in done.stdout
    assert "AsFT" in done.stdout


def test_other_records_other_rules_and_open_runs_are_not_answered_from_the_table(
    study: StudyConfig, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(study_tables, "_rules", lambda: "others")
        assert answer(study, folder) is None
    cells = study_cells(study)
    devices = replace(cells[0].config, trainer=replace(cells[0].config.trainer, devices=2))
    several = [replace(cells[0], config=devices), *cells[1:]]
    options = {"execution": Execution(), "results_root": folder / "kept"}
    assert finished_study(study, several, environment={}, **options) is None
    assert finished_study(study, cells, environment={"WORLD_SIZE": "2"}, **options) is None
    assert answer(study, folder.parent) is None
    record = folder / "kept" / "small" / f"{cells[-1].name}.json"
    text = record.read_text(encoding="utf-8")
    try:
        changed = json.loads(text)
        changed["outcomes"]["attack_success"] = dict.fromkeys(changed["outcomes"]["attack_success"], 1)
        record.write_text(json.dumps(changed), encoding="utf-8")
        assert answer(study, folder) is None
        record.unlink()
        assert answer(study, folder) is None
        failed = folder / "kept" / "small" / "failed" / record.name
        failed.parent.mkdir(exist_ok=True)
        failed.write_text(json.dumps({**changed, "status": "failed", "error": "none"}), encoding="utf-8")
        assert answer(study, folder, retry_failed=True) is None
    finally:
        (folder / "kept" / "small" / "failed" / record.name).unlink(missing_ok=True)
        record.write_text(text, encoding="utf-8")
    assert answer(study, folder) is not None


def test_a_changed_study_is_refused_here_too(study: StudyConfig, folder: Path) -> None:
    smaller = replace(study, grid=replace(study.grid, seeds=study.grid.seeds[:1]))
    with pytest.raises(ConfigError, match="Expected the study 'small' to be as it was started"):
        answer(smaller, folder)
