from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from experiments.benchmarks.simulated_runs import SimulatedVariant, simulate_study
from experiments.comparison import compare_runs
from experiments.measured_runs import RunSamples, read_run
from experiments.study_tracking import runs_table, study_summary, track_study, tradeoff_table
from framework.schema import TrackingConfig
from tests.experiments.offline_wandb import read_offline_run

VARIANTS = (
    SimulatedVariant("Plain LoRA", 0.7, 0.1, 0.9, 5.0),
    SimulatedVariant("AsFT", 0.1, 0.15, 0.85, 6.0, {"asft": {"weight": 1.0}}),
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[RunSamples]:
    folders = simulate_study(tmp_path_factory.mktemp("runs"), VARIANTS, seeds=(0, 1))
    return [read_run(folder) for folder in folders]


@pytest.fixture(scope="module")
def comparison(runs: list[RunSamples]) -> list[dict]:
    return compare_runs(runs, reference="Plain LoRA")


def test_the_trade_off_has_a_row_a_variant(comparison: list[dict]) -> None:
    rows = {row["variant"]: row for row in tradeoff_table(comparison)}
    assert list(rows) == ["Plain LoRA", "AsFT"]
    asft = rows["AsFT"]
    assert asft["attack_success"] < 0.2 < rows["Plain LoRA"]["attack_success"]
    assert asft["attack_success_low"] < asft["attack_success"] < asft["attack_success_high"]
    assert asft["train_seconds"] == 360.0
    assert (asft["seeds"], asft["is_reference"], asft["is_dominated"]) == (2, False, False)
    assert rows["Plain LoRA"]["is_reference"]
    assert asft["safety_tax"] is not None


def test_runs_stand_side_by_side(runs: list[RunSamples]) -> None:
    rows = runs_table(runs)
    assert [(row["variant"], row["seed"]) for row in rows] == [
        ("Plain LoRA", 0),
        ("AsFT", 0),
        ("Plain LoRA", 1),
        ("AsFT", 1),
    ]
    assert rows[0]["attack_success"] == runs[0].row["metrics"]["attack_success"]["value"]


def test_the_summary_has_a_hypervolume_for_each_group(comparison: list[dict]) -> None:
    assert set(study_summary(comparison, num_runs=4)) == {"study/runs", "study/hypervolume"}
    two = study_summary([comparison[0], {**comparison[0], "share": 0.2}], num_runs=8)
    assert "study/simulated-model/triage/p0.2/hypervolume" in two
    won = json.loads(json.dumps(comparison))
    won[0]["methods"][1]["metrics"]["attack_success"]["is_winner"] = True
    assert study_summary(won, num_runs=4)["study/winner/attack_success"] == "AsFT"


def test_off_writes_nothing(comparison: list[dict], runs: list[RunSamples], tmp_path: Path) -> None:
    assert not track_study("s", comparison, runs, folder=tmp_path, tracking=TrackingConfig(wandb="off"))
    assert list(tmp_path.iterdir()) == []


def test_offline_files_hold_tables_charts_summary_and_artefacts(
    comparison: list[dict], runs: list[RunSamples], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    folder = tmp_path / "results" / "study"
    folder.mkdir(parents=True)
    (folder / "table.json").write_text(json.dumps({"name": "study"}))
    config = TrackingConfig(wandb="offline", tags=["mine"])
    assert track_study("my/study", comparison, runs, folder=folder, tracking=config)
    (written,) = folder.glob("wandb/offline-run-*/*.wandb")
    run = read_offline_run(written)
    assert (run.name, run.group, run.job_type) == ("my/study/study", "my/study", "study")
    assert run.config["variants"] == ["AsFT", "Plain LoRA"]
    assert run.summary["study/runs"] == 4
    assert run.summary["study/hypervolume"] == comparison[0]["tradeoff"]["hypervolume"]

    table = json.loads((run.files / run.history["tradeoff/table"]["path"]).read_text())
    assert table["columns"][0] == "variant"
    assert [row[0] for row in table["data"]] == ["Plain LoRA", "AsFT"]
    column = table["columns"].index("attack_success")
    assert [row[column] for row in table["data"]] == [
        method["metrics"]["attack_success"]["value"] for method in comparison[0]["methods"]
    ]
    side_by_side = json.loads((run.files / run.history["study/runs_table"]["path"]).read_text())
    assert len(side_by_side["data"]) == 4
    for chart in ("utility", "over_refusal", "cost"):
        assert f"tradeoff/{chart}_table" in run.history
    assert any("scatter" in json.dumps(value) for value in run.config.values())

    assert run.artifacts["my-study-results"]["type"] == "results"
    assert set(run.artifacts["my-study-results"]["files"]) == {"table.json"}
    samples = run.artifacts["my-study-samples"]
    assert (samples["type"], len(samples["files"])) == ("samples", 4)
    inside, copy = next(iter(samples["files"].items()))
    original = next(r.folder for r in runs if f"{r.name}.jsonl" == inside)
    assert copy.read_bytes() == (original / "samples.jsonl").read_bytes()
    assert copy.is_relative_to(folder)
    assert list(home.rglob("staging/*")) == []

    # Once more with the same numbers writes nothing; with others it does.
    assert not track_study("my/study", comparison, runs, folder=folder, tracking=config)
    assert track_study("my/study", comparison, runs[:-1], folder=folder, tracking=config)
    assert len(list(folder.glob("wandb/offline-run-*"))) == 2
    shutil.rmtree(folder)
