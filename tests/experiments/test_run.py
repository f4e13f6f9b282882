"""`seawall run`, `evaluate` and `compare` end to end on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from experiments import run as run_module
from experiments.compare import Execution, collect_rows, compare_study
from experiments.evaluate import evaluate_command
from experiments.run import run_recipe
from framework.config import load_evaluate_config, load_run_config
from framework.errors import DataError
from framework.files import read_json
from framework.study import load_study_config
from tests.conftest import make_model, make_tokenizer

EVALUATE = "{after: [start, align, finetune], max_new_tokens: 6, limit: 5, batch_size: 8}"


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(tmp_path, tiny_folder, monkeypatch) -> Path:
    monkeypatch.setenv("SEAWALL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    # Reading likelihoods of 48 replies byte by byte is most of the time and has tests of its own.
    path = tmp_path / "tiny.yaml"
    path.write_text(
        f"""
name: tiny
model: {{name: {tiny_folder}, dtype: float32, system: ""}}
adapter: {{rank: 2, alpha: 4, targets: [q_proj, v_proj]}}
max_length: 400
max_steps: 2
batch_size: 4
learning_rate: 0.01
stages:
  align: {{data: {{safety: embedded, benign: embedded, safety_count: 8, benign_count: 8}}}}
  finetune: {{data: {{task: triage, task_count: 16}}, methods: {{}}}}
evaluate: {EVALUATE}
trainer: {{accelerator: cpu, threads: 1}}
tracking: {{wandb: "off"}}
""",
        encoding="utf-8",
    )
    return path


def test_run_leaves_config_results_samples_and_model(recipe, tmp_path):
    results = run_recipe(load_run_config(recipe))
    folder = tmp_path / "runs" / "tiny"
    assert read_json(folder / "results.json") == json.loads(json.dumps(results))
    assert [row["point"] for row in results["rows"]] == ["start", "align", "finetune"]
    for row in results["rows"]:
        for key in ("attack_success", "keyword_attack_success", "refusal_rate", "over_refusal", "task_accuracy"):
            metric = row["metrics"][key]
            assert metric["denominator"] >= 5
            assert metric["value"] == metric["numerator"] / metric["denominator"]
            assert metric["low"] <= metric["value"] <= metric["high"]
        assert row["metrics"]["benign_nll"]["value"] > 0
    assert results["schema_version"] == 1
    assert results["environment"]["packages"]["torch"]
    assert results["stages"][0]["stage"] == "set-up and loading"
    trained = [stage for stage in results["stages"][1:] if not stage["stage"].startswith("evaluate")]
    assert [stage["stage"] for stage in trained] == ["align", "finetune"]
    assert all(stage["cost"]["tokens"]["train"] > 0 for stage in trained)
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 3 * 15
    assert {s["point"] for s in samples} == {"start", "align", "finetune"}
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert set(load_file(folder / "model" / "model.safetensors")) <= set(model.state_dict())
    assert "task_count: 16" in (folder / "config.yaml").read_text()


def test_second_run_is_reused_and_equal(recipe):
    first = run_recipe(load_run_config(recipe))
    again = run_recipe(load_run_config(recipe, ["name=again"]))
    assert [stage["reused"] for stage in first["stages"][1:]] == [False] * 5
    assert [stage["reused"] for stage in again["stages"][1:]] == [True] * 5
    assert [row["metrics"] for row in again["rows"]] == [row["metrics"] for row in first["rows"]]


def test_evaluate_measures_what_the_run_left(recipe, tmp_path):
    results = run_recipe(load_run_config(recipe))
    config = load_evaluate_config(
        str(tmp_path / "runs" / "tiny" / "model"),
        ["task=triage", "evaluate.max_new_tokens=6", "evaluate.limit=5", "model.dtype=float32", 'model.system=""',
         "tracking.wandb=off", "trainer.threads=1"],
    )  # fmt: skip
    measured = evaluate_command("mine", config)
    expected = results["rows"][-1]["metrics"]
    assert measured["rows"][0]["metrics"]["attack_success"] == expected["attack_success"]
    assert measured["rows"][0]["metrics"]["task_accuracy"] == expected["task_accuracy"]


def study_file(recipe: Path, tmp_path: Path) -> Path:
    path = tmp_path / "study.yaml"
    path.write_text(
        f"""
name: small
base: {recipe}
grid:
  methods:
    Plain LoRA: {{}}
    AsFT: {{asft: {{weight: 10.0}}}}
reference: Plain LoRA
""",
        encoding="utf-8",
    )
    return path


def test_compare_shares_the_aligned_model_and_never_repeats(recipe, tmp_path, monkeypatch):
    study = load_study_config(study_file(recipe, tmp_path))
    table = compare_study(study, results_root=tmp_path / "kept")
    assert [row["label"] for row in table["rows"]][2:] == ["Plain LoRA", "AsFT"]
    assert [row["point"] for row in table["rows"]] == ["start", "align", "finetune", "finetune"]
    kept = sorted(path.name for path in (tmp_path / "kept" / "small").glob("*seed0.json"))
    assert len(kept) == 2
    asft = read_json(tmp_path / "kept" / "small" / next(name for name in kept if name.startswith("asft")))
    assert next(s for s in asft["results"]["stages"] if s["stage"] == "align")["reused"]

    def never(*args, **kwargs):
        raise AssertionError("a finished run was repeated")

    monkeypatch.setattr("experiments.compare.run_recipe", never)
    again = compare_study(study, results_root=tmp_path / "kept")
    assert again["rows"] == table["rows"]


def test_failed_run_is_recorded_and_does_not_stop_the_others(recipe, tmp_path, monkeypatch):
    original = run_module.run_recipe

    def sometimes(config, **kwargs):
        if kwargs["label"] == "Plain LoRA":
            raise RuntimeError("broken on purpose")
        return original(config, **kwargs)

    monkeypatch.setattr("experiments.compare.run_recipe", sometimes)
    study = load_study_config(study_file(recipe, tmp_path))
    table = compare_study(study, results_root=tmp_path / "kept")
    assert [run["status"] for run in table["runs"]] == ["failed", "finished"]
    assert "broken on purpose" in table["runs"][0]["error"]
    assert len(list((tmp_path / "kept" / "small" / "failed").glob("*.json"))) == 1
    monkeypatch.setattr("experiments.compare.run_recipe", original)
    again = compare_study(study, results_root=tmp_path / "kept")
    assert [run["status"] for run in again["runs"]] == ["failed", "finished"]
    retried = compare_study(study, results_root=tmp_path / "kept", execution=Execution(retry_failed=True))
    assert [run["status"] for run in retried["runs"]] == ["finished"] * 2
    assert not list((tmp_path / "kept" / "small" / "failed").glob("*.json"))


def test_rows_of_a_grid_say_what_varies():
    def run(share: float, fingerprint: str) -> dict:
        rows = [
            {"label": "m", "point": "start", "model": {"fingerprint": "s"}, "metrics": {}},
            {"label": "LoRA", "point": "finetune", "model": {"fingerprint": fingerprint}, "metrics": {}},
        ]
        return {"label": "LoRA", "share": share, "seed": 0, "model": "m", "task": "t", "results": {"rows": rows}}

    rows = collect_rows([run(0.0, "a"), run(0.1, "b")])
    assert [row["label"] for row in rows] == ["m", "LoRA (share 0.0)", "LoRA (share 0.1)"]


def test_wrong_evaluation_file_is_refused_before_any_stage(recipe, tmp_path):
    with pytest.raises(DataError, match=r"Expected `nowhere.jsonl` to be a file"):
        run_recipe(load_run_config(recipe, ["evaluate.nll=[nowhere.jsonl]"]))
    assert not (tmp_path / "cache").exists()
    assert not (tmp_path / "runs").exists()
