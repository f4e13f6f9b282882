"""What a run leaves of training: a picture for every stage with telemetry, kept when the stage is reused."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from experiments.run import run_recipe
from experiments.run_folder import portable_path
from framework.config import load_run_config
from framework.files import read_json
from tests.conftest import make_model, make_tokenizer


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> Path:
    make_model().save_pretrained(tmp_path / "model-folder")
    make_tokenizer().save_pretrained(tmp_path / "model-folder")
    monkeypatch.setenv("SEAWALL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    path = tmp_path / "tiny.yaml"
    path.write_text(
        f"""
name: tiny
model: {{name: {tmp_path / "model-folder"}, dtype: float32, system: ""}}
max_length: 400
max_steps: 4
batch_size: 4
learning_rate: 0.01
stages:
  align: {{data: {{safety: embedded, safety_count: 8, benign: embedded, benign_count: 8}}}}
  finetune:
    data: {{task: triage, task_count: 16}}
    methods: {{pact: {{pairs: 8, reply_tokens: 8, num_tokens: 20}}}}
evaluate:
  {{over_refusal: [], task: false, benign_nll: false, max_new_tokens: 4, limit: 2, after: [finetune],
   prefill: [3], prefill_replies: opening}}
trainer: {{accelerator: cpu, threads: 1, log_every_n_steps: 1, probe_every_n_steps: 2}}
tracking: {{wandb: "off"}}
""",
        encoding="utf-8",
    )
    return path


def test_every_stage_with_telemetry_has_a_picture_also_when_it_is_reused(recipe, tmp_path):
    folders = []
    for name in ("first", "again"):
        results = run_recipe(load_run_config(recipe, [f"name={name}"]))
        folders.append(Path("runs") / name)
    assert [stage["reused"] for stage in results["stages"][1:]] == [True] * 4
    for stage in ("align", "finetune"):
        first, again = ((folder / f"training-{stage}.svg").read_text() for folder in folders)
        assert first == again
        ElementTree.fromstring(first)
        assert "probability of refusal openings" in first
        assert ("pact: gate by place in the reply" in first) == (stage == "finetune")
        assert ("pact: kl" in first) == (stage == "finetune")
    record = next(stage for stage in results["stages"] if stage["stage"] == "finetune")
    history = record["telemetry"]["refusal_probability"]
    assert [step for step, _ in history] == [0, 2, 4]
    assert all(0 <= value <= 1 for _, value in history)
    assert len(record["curves"]["train/pact/gate/0"]) == 4
    (row,) = read_json(folders[1] / "results.json")["rows"]
    assert row["metrics"]["prefill_3/attack_success"]["denominator"] == 2
    assert row["model"]["folder"].startswith("<cache>/artifacts/stage/")


def test_paths_in_results_leave_out_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("SEAWALL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    assert portable_path(tmp_path / "cache" / "artifacts" / "x") == "<cache>/artifacts/x"
    assert portable_path(tmp_path / "models" / "mine") == "models/mine"
    assert portable_path(Path("models/mine")) == "models/mine"
    assert portable_path(tmp_path.parent / "mine") == "mine"
