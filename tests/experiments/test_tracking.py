from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest

from experiments import tracking
from experiments.tracking import (
    artifact_name,
    build_logger,
    close_logger,
    log_files,
    log_summary,
    summary_values,
)
from framework.config import RunConfig
from framework.errors import ConfigError, StorageError
from framework.schema import TrackingConfig
from tests.experiments.offline_wandb import read_offline_run

RATE = {"value": 0.25, "numerator": 20, "denominator": 80, "low": 0.2, "high": 0.3}


def make_config(mode: str, **options: Any) -> RunConfig:
    return RunConfig(name="study/cell", tracking=TrackingConfig(wandb=mode, **options))  # type: ignore[arg-type]


class FakeRun:
    """Stands in for a W&B run."""

    def __init__(self, **init: Any) -> None:
        self.init = init
        self.summary: dict[str, float] = {}
        self.logged: list[dict[str, float]] = []
        self.is_finished = False
        self.fails = False
        self.mode = os.environ.get("WANDB_MODE")
        self._label = lambda **_: None
        self.define_metric = lambda *_, **__: None

    def log(self, metrics: dict[str, float]) -> None:
        if self.fails:
            raise OSError("no space left")
        self.logged.append(metrics)

    def finish(self) -> None:
        self.is_finished = True


@pytest.fixture
def fake_wandb(monkeypatch: pytest.MonkeyPatch) -> list[FakeRun]:
    import wandb

    runs: list[FakeRun] = []

    def init(**options: Any) -> FakeRun:
        runs.append(FakeRun(**options))
        return runs[-1]

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(wandb, "run", None)
    return runs


def test_off_gives_no_logger_and_writes_nothing(tmp_path: Path) -> None:
    logger = build_logger(make_config("off"), folder=tmp_path, stage="align")
    assert logger is False
    log_summary(logger, {"attack_success": RATE})
    close_logger(logger)
    assert list(tmp_path.iterdir()) == []


def test_runs_are_grouped_tagged_and_named(tmp_path: Path, fake_wandb: list[FakeRun]) -> None:
    config = make_config("offline", tags=["mine"], project="p", entity="team")
    mode_before = os.environ.get("WANDB_MODE")
    build_logger(config, folder=tmp_path, stage="finetune", labels=["asft", "triage"])
    init = fake_wandb[0].init
    assert (init["name"], init["group"], init["job_type"]) == ("study/cell/finetune", "study/cell", "finetune")
    assert (init["project"], init["entity"], init["tags"]) == ("p", "team", ["mine", "asft", "triage"])
    assert init["settings"].silent
    assert fake_wandb[0].mode == "dryrun"
    assert os.environ.get("WANDB_MODE") == mode_before
    assert init["config"]["name"] == "study/cell"
    assert Path(init["dir"]) == tmp_path
    build_logger(make_config("offline", group="g"), folder=tmp_path, stage="align")
    assert fake_wandb[1].init["group"] == "g"


def test_the_summary_has_the_measured_keys_and_the_trade_off(tmp_path: Path, fake_wandb: list[FakeRun]) -> None:
    logger = build_logger(make_config("offline"), folder=tmp_path, stage="evaluate")
    log_summary(logger, {"attack_success": RATE, "task_accuracy": {"value": 0.8}, "benign_nll": {"value": None}})
    close_logger(logger)
    assert fake_wandb[0].summary == {
        "eval/attack_success": 0.25,
        "eval/attack_success/numerator": 20.0,
        "eval/attack_success/denominator": 80.0,
        "eval/attack_success/low": 0.2,
        "eval/attack_success/high": 0.3,
        "eval/task_accuracy": 0.8,
        "tradeoff/safety": 0.75,
        "tradeoff/utility": 0.8,
    }
    assert fake_wandb[0].is_finished


def test_a_harm_judge_decides_safety_where_there_is_one() -> None:
    metrics = {"attack_success": RATE, "harmful_rate": {"value": 0.1}, "over_refusal": {"value": 0.3}}
    values = summary_values(metrics)
    assert (values["tradeoff/safety"], values["tradeoff/over_refusal"]) == (0.9, 0.3)


def test_a_failure_offline_is_reported_once_and_the_run_goes_on(
    tmp_path: Path, fake_wandb: list[FakeRun], caplog: pytest.LogCaptureFixture
) -> None:
    logger = build_logger(make_config("offline"), folder=tmp_path, stage="align")
    assert logger
    logger.log_metrics({"train/loss": 1.0}, step=1)
    fake_wandb[0].fails = True
    with caplog.at_level(logging.WARNING):
        logger.log_metrics({"train/loss": 1.0}, step=2)
        logger.log_metrics({"train/loss": 1.0}, step=3)
        close_logger(logger)
    assert len(fake_wandb[0].logged) == 1
    assert [record.getMessage() for record in caplog.records] == [
        "W&B stopped working and is switched off for this stage: no space left"
    ]


def test_a_failure_online_is_not_hidden(tmp_path: Path, fake_wandb: list[FakeRun]) -> None:
    logger = build_logger(make_config("online"), folder=tmp_path, stage="align")
    assert logger
    fake_wandb[0].fails = True
    with pytest.raises(OSError, match="no space left"):
        logger.log_metrics({"train/loss": 1.0}, step=2)


def test_a_start_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    import wandb

    def refuse(**_: Any) -> None:
        raise RuntimeError("no API key")

    monkeypatch.setattr(wandb, "init", refuse)
    with caplog.at_level(logging.WARNING):
        assert build_logger(make_config("offline"), folder=tmp_path, stage="align") is False
    assert "W&B could not start and is switched off: no API key" in caplog.text
    with pytest.raises(ConfigError, match=r"to reach Weights & Biases, but got: no API key\. Run `wandb login`"):
        build_logger(make_config("online"), folder=tmp_path, stage="align")


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="Choose another folder"):
        build_logger(make_config("offline"), folder=tmp_path / "file", stage="align")


def test_offline_for_real_writes_below_the_run_folder_and_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("WANDB_SILENT", raising=False)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "a"
    folder.mkdir(parents=True)
    for name in ("results.json", "samples.jsonl"):
        (folder / name).write_text(name)
    for stage in ("align", "finetune"):
        logger = build_logger(make_config("offline"), folder=folder, stage=stage)
        assert isinstance(logger, tracking.TrackingLogger)
        logger.log_metrics({"train/loss": 1.0}, step=1)
        log_summary(logger, {"attack_success": RATE})
        log_files(logger, "study/cell", folder)
        close_logger(logger)
        assert not logger.is_broken
    files = list(folder.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    read = {run.job_type: run for run in map(read_offline_run, files)}
    assert set(read) == {"align", "finetune"}
    run = read["finetune"]
    assert (run.name, run.group, run.config["name"]) == ("study/cell/finetune", "study/cell", "study/cell")
    assert {key: run.summary[key] for key in summary_values({"attack_success": RATE})} == summary_values(
        {"attack_success": RATE}
    )
    assert run.history["train/loss"] == 1.0
    kinds = {name: (found["type"], set(found["files"])) for name, found in run.artifacts.items()}
    assert kinds == {
        "study-cell-results": ("results", {"results.json"}),  # what is not there is left out
        "study-cell-samples": ("samples", {"samples.jsonl"}),
    }
    copy = run.artifacts["study-cell-samples"]["files"]["samples.jsonl"]
    assert copy.read_text() == "samples.jsonl"
    assert copy.is_relative_to(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert "WANDB_SILENT" not in os.environ
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_names_of_artefacts_are_what_wandb_takes() -> None:
    assert artifact_name("a/b c", "samples") == "a-b-c-samples"
    long = artifact_name("x" * 200, "samples")
    assert len(long) == 128
    assert long != artifact_name("x" * 201, "samples")


def test_no_files_without_tracking(tmp_path: Path) -> None:
    log_files(False, "a", tmp_path)
    assert list(tmp_path.iterdir()) == []
