"""Ablations: derived from a method's config, or declared by it; what is left out says why."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import pytest

from experiments import ablation
from experiments.ablation import FULL, Change, ablation_study, find_ablations, setting_changes
from framework.config import RunConfig, load_run_config
from framework.errors import ConfigError
from framework.registry import MethodEntry, validate_methods
from framework.study import study_cells


def recipe(*overrides: str) -> RunConfig:
    return load_run_config("quickstart", overrides)


def test_each_setting_changes_alone_and_each_method_is_left_out_alone() -> None:
    config = recipe("stages.finetune.methods={asft: {weight: 1.0}, l2_to_start: {weight: 0.5}}")
    found = find_ablations(config)
    labels = list(found.variants)
    assert labels[0] == FULL
    assert {"without asft", "without l2_to_start", "asft.weight=0", "asft.weight=0.5", "asft.weight=2"} <= set(labels)
    assert {"asft.projector=column_space", "asft.projector=none", "asft.include_scale=false"} <= set(labels)
    assert list(found.variants["without asft"].methods) == ["l2_to_start"]
    changed = found.variants["asft.weight=2"].methods
    assert changed == {"asft": {"weight": 2.0}, "l2_to_start": {"weight": 0.5}}
    assert found.variants["asft.weight=0"].overrides == {"stages.finetune.allow_no_effect": True}


def test_what_is_left_out_says_why() -> None:
    left_out = find_ablations(recipe("stages.finetune.methods={asft: {weight: 1.0}}")).left_out
    assert left_out["asft.base"] == "it is unset; its config declares no alternatives"
    assert "Expected one of `rank` and `energy` with the projector top_k" in left_out["asft.projector=top_k"]
    assert "Expected `harmful` to be a folder" in left_out["asft.direction=harmful"]


def test_an_ablation_is_a_study_whose_runs_are_all_valid() -> None:
    config = recipe("stages.finetune.methods={asft: {weight: 1.0}}")
    study, _ = ablation_study(config, seeds=[0, 1, 2], only=["asft.weight"])
    assert study.name == "quickstart-ablation"
    assert study.reference_label == FULL
    cells = study_cells(study, validate_methods=validate_methods)
    assert [cell.label for cell in cells[:4]] == [FULL, "asft.weight=0", "asft.weight=0.5", "asft.weight=2"]
    assert len(cells) == 12
    assert cells[1].config.stages.finetune is not None
    assert cells[1].config.stages.finetune.allow_no_effect


def test_without_its_only_method_a_stage_of_edits_goes() -> None:
    config = recipe("stages.repair={methods: {wise_ft: {}}, max_steps: 0}")
    study, _ = ablation_study(config, only=["wise_ft"])
    cells = {cell.label: cell.config for cell in study_cells(study)}
    assert cells["without wise_ft"].stages.repair is None
    assert cells[FULL].stages.repair is not None


@dataclasses.dataclass(frozen=True)
class Declared:
    ABLATIONS: ClassVar[dict[str, tuple[Any, ...]]] = {"depth": (0, 3), "label": ()}
    depth: int = 3
    label: str = "a"
    kind: Literal["x", "y"] | None = None
    count: int = 1
    share: float = 0.0


def test_a_config_may_declare_its_ablations(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = MethodEntry("declared", object, Declared, "", (), ())  # type: ignore[arg-type]
    monkeypatch.setattr(ablation, "known_methods", lambda: {"declared": entry})
    changes = setting_changes("declared", {})
    assert [change for change in changes if not change.left_out] == [
        Change("depth", 0),
        Change("kind", "x"),
        Change("kind", "y"),
        Change("count", 2),
    ]
    assert {change.field: change.left_out for change in changes if change.left_out} == {
        "label": "its config declares no other value",
        "share": "it is 0, which has no half and no double; its config declares no alternatives",
    }


def test_bad_requests_are_refused() -> None:
    with pytest.raises(ConfigError, match="Expected the run to have a method to ablate"):
        find_ablations(recipe("stages.finetune.methods={}"))
    with pytest.raises(ConfigError, match=r"Did you mean 'asft.weight'\?"):
        find_ablations(recipe("stages.finetune.methods={asft: {}}"), only=["asft.wieght"])
