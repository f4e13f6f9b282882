"""Several runs at once: worker processes, submitit's local executor, jobs that die, and stopping."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from experiments.cli import main
from experiments.execution import Execution
from experiments.study_estimate import training_keys
from experiments.study_pool import LocalJob, run_pool, starter
from experiments.study_progress import StudyProgress
from experiments.study_records import failed_record, read_study
from experiments.study_worker import run_cell
from framework.errors import ConfigError
from framework.files import read_json
from framework.interruption import Interrupted
from framework.study import StudyCell, StudyConfig, load_study_config, study_cells
from tests.conftest import make_model, make_tokenizer
from tests.experiments.test_study_records import measure
from tests.experiments.test_study_records import study as study  # a fixture

TINY = """
name: pooled
base:
  name: tiny
  model: {{name: {model}, dtype: float32, system: ""}}
  adapter: {{rank: 2, alpha: 4, targets: [q_proj, v_proj]}}
  max_length: 400
  max_steps: 2
  batch_size: 4
  stages:
    align: {{data: {{safety: embedded, benign: embedded, safety_count: 4, benign_count: 4}}}}
    finetune: {{data: {{task: triage, task_count: 8}}}}
  evaluate: {{after: [finetune], max_new_tokens: 4, limit: 3, batch_size: 8, benign_nll: false}}
  trainer: {{accelerator: cpu}}
  tracking: {{wandb: "off"}}
grid:
  methods: {{LoRA: {{}}, AsFT: {{asft: {{weight: 10.0}}}}}}
"""


class Job:
    """Runs its cell when it is asked whether it is done; ``dies`` leaves no record."""

    alive: list[str] = []
    most = 0

    def __init__(self, cell: StudyCell, folder: Path, *, dies: bool = False) -> None:
        self.cell, self.folder, self.dies, self.looks = cell, folder, dies, 0
        Job.alive.append(cell.name)
        Job.most = max(Job.most, len(Job.alive))

    def done(self) -> bool:
        self.looks += 1
        if self.looks == 2:
            Job.alive.remove(self.cell.name)
            if not self.dies:
                run_cell(self.cell, self.folder, runner=measure)
        return self.looks >= 2

    def error(self) -> str | None:
        return "the worker ended with signal 9: out of memory" if self.dies else None

    def stop(self) -> None:
        Job.alive.remove(self.cell.name)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    Job.alive, Job.most = [], 0
    monkeypatch.setattr("experiments.study_pool.POLL", 0.001)


def pool(study: StudyConfig, folder: Path, **options: Any) -> StudyProgress:
    cells = study_cells(study)
    progress = StudyProgress([cell.name for cell in cells], workers=2)
    run_pool(cells, folder, workers=2, progress=progress, **options)
    return progress


def test_as_many_runs_as_workers_go_on_at_once(study: StudyConfig, tmp_path: Path) -> None:
    progress = pool(study, tmp_path / "kept", start=lambda cell: Job(cell, tmp_path / "kept"))
    assert Job.most == 2
    assert set(progress.states.values()) == {"finished"}
    assert len(read_study(tmp_path / "kept")) == 6


def test_runs_that_share_a_stage_do_not_wait_for_each_other(study: StudyConfig, tmp_path: Path) -> None:
    started: list[StudyCell] = []

    def start(cell: StudyCell) -> Job:
        started.append(cell)
        return Job(cell, tmp_path / "kept")

    pool(study, tmp_path / "kept", start=start)
    cells = study_cells(study)
    assert training_keys(cells[0].config) & training_keys(cells[1].config)
    assert not training_keys(started[0].config) & training_keys(started[1].config)
    assert started[0] == cells[0]
    assert sorted(cell.name for cell in started) == sorted(cell.name for cell in cells)


def test_a_worker_that_dies_is_recorded_and_does_not_stop_the_others(study: StudyConfig, tmp_path: Path) -> None:
    folder, cells = tmp_path / "kept", study_cells(study)
    progress = pool(study, folder, start=lambda cell: Job(cell, folder, dies=cell.name == cells[0].name))
    assert progress.counts()["finished"] == 5
    record = failed_record(folder, cells[0])
    assert record is not None
    assert record["error"] == "the worker ended with signal 9: out of memory"


def test_stopping_ends_the_jobs(study: StudyConfig, tmp_path: Path) -> None:
    def stop() -> None:
        raise Interrupted(15)

    with pytest.raises(Interrupted):
        pool(study, tmp_path / "kept", start=lambda cell: Job(cell, tmp_path / "kept"), check=stop)
    assert Job.alive == []


def test_bad_executors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="Expected `executor` to be one of local, submitit-local, slurm, but got 'pbs'"
    ):
        starter("pbs", tmp_path, workers=1)
    with pytest.raises(ConfigError, match="Expected `--job` with the executors of submitit only"):
        starter("local", tmp_path, workers=1, parameters={"timeout_min": 3})
    with pytest.raises(ConfigError, match="Expected submitit to take executor 'submitit-local' and"):
        starter("submitit-local", tmp_path, workers=1, parameters={"no_such_thing": 3})
    with pytest.raises(ConfigError, match="Expected `workers` to be a whole number ≥ 1, but got 0"):
        Execution(workers=0)


@pytest.fixture
def tiny_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SEAWALL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    path = tmp_path / "pooled.yaml"
    path.write_text(TINY.format(model=tmp_path / "model"), encoding="utf-8")
    return path


@pytest.mark.parametrize("options", [["--workers", "2"], ["--executor", "submitit-local", "--job", "timeout_min=10"]])
def test_workers_and_submitit_train_and_the_command_compares(
    tiny_study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    assert main(["compare", str(tiny_study), "--results", "kept", "--json", *options]) == 0
    table = json.loads(capsys.readouterr().out)
    assert [run["status"] for run in table["runs"]] == ["finished"] * 2
    assert len(table["comparison"][0]["methods"]) == 2
    records = read_study(tmp_path / "kept" / "pooled")
    aligned = [
        stage["reused"] for record in records for stage in record["results"]["stages"] if stage["stage"] == "align"
    ]
    assert sorted(aligned) in ([False, False], [False, True])  # the second waited for the first, or came later
    prints = {
        stage["fingerprint"] for record in records for stage in record["results"]["stages"] if stage["stage"] == "align"
    }
    assert len(prints) == 1
    assert main(["compare", str(tiny_study), "--results", "kept", *options]) == 0
    assert "attack_success: " in capsys.readouterr().out


def test_a_worker_that_is_killed_says_so(tiny_study: Path, tmp_path: Path) -> None:
    cell = study_cells(load_study_config(tiny_study))[0]
    job = LocalJob(cell, tmp_path / "kept", threads=1, retry_failed=False)
    job.stop()
    assert job.done()
    job.stop()
    assert str(job.error()).startswith("the worker ended with ")
    (tmp_path / "kept" / "logs" / f"{cell.name}.log").write_text("first\nMemoryError\n", encoding="utf-8")
    assert str(job.error()).endswith("MemoryError")


def test_the_dry_run_prints_and_runs_nothing(
    tiny_study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", str(tiny_study), "--results", "kept", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "2 of 2 runs to do, about" in shown
    assert "rough" in shown
    assert not (tmp_path / "kept").exists()
    assert main(["compare", str(tiny_study), "--results", "kept", "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [run["is_finished"] for run in found["runs"]] == [False, False]
    assert read_json(tmp_path / "model" / "config.json")
