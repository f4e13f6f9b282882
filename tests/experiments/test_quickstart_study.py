"""The study `quickstart` as it is written, and on a tiny random model from alignment to the compared table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from experiments.commands.output import known_names
from experiments.compare import compare_study
from framework.registry import validate_methods
from framework.study import StudyConfig, check_measured, load_study_config, study_cells
from tests.coin_judge import coin_judge
from tests.conftest import make_model, make_tokenizer

LABELS = ["Plain LoRA", "AsFT", "PACT", "NeST repair", "SMH mix"]
SMALL = (
    "max_length=512",
    "max_steps=2",
    "batch_size=4",
    "stages.align.data.safety_count=4",
    "stages.align.data.benign_count=4",
    "stages.align.data.look_alikes_count=4",
    "stages.finetune.data.task_count=20",
    "evaluate.limit=6",
    "evaluate.task_count=4",
    "evaluate.max_new_tokens=4",
    "evaluate.benign_nll=false",
    "grid.seeds=[0]",
)


def test_five_methods_share_task_share_and_seeds_and_are_all_measured() -> None:
    cells = study_cells(load_study_config("quickstart"), known=known_names(), validate_methods=validate_methods)
    check_measured(cells)
    assert [cell.label for cell in cells] == LABELS * 2
    assert {(cell.task, cell.harmful_share) for cell in cells} == {("triage", 0.1)}
    assert [cell.seed for cell in cells] == [0] * 5 + [1] * 5
    assert list(load_study_config("first_look").grid.methods) == LABELS[:2]


def tiny(study: StudyConfig) -> StudyConfig:
    """Fewer rows and rollouts, and a judge that a random model sometimes fails."""
    variants: dict[str, Any] = study.grid.methods
    variants["SMH mix"].methods["smh"].update(
        prompts=8, rollouts=3, benign_prompts=6, max_new_tokens=8, judges=["coin"]
    )
    variants["SMH mix"].overrides["stages.finetune.max_length"] = 512
    variants["NeST repair"].methods["nest"].update(threshold=0.5)
    variants["NeST repair"].overrides["stages.repair.data"].update(
        task_count=8, safety_count=4, benign_count=4, look_alikes_count=4
    )
    return study


@pytest.mark.slow
def test_the_study_runs_from_alignment_to_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEAWALL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"instruction": f"question {number}", "output": f"answer {number}"} for number in range(4)]
    (tmp_path / "poison.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    harmful = f"stages.finetune.data.harmful={tmp_path / 'poison.jsonl'}"
    given = [*SMALL, harmful, f"model={tmp_path / 'model'}", "tracking.wandb=off"]
    with coin_judge():
        table = compare_study(tiny(load_study_config("quickstart", given)), results_root=tmp_path / "kept")
    assert [(run["label"], run["status"], run.get("error")) for run in table["runs"]] == [
        (label, "finished", None) for label in LABELS
    ]
    (group,) = table["comparison"]
    assert [method["label"] for method in group["methods"]] == LABELS
    assert sum(stage["stage"].endswith(": align") for stage in table["stages"]) == 1
    assert "NeST repair: finetune" not in [stage["stage"] for stage in table["stages"]]
