from __future__ import annotations

from pathlib import Path

import pytest

from framework.errors import ConfigError
from framework.registry import validate_methods
from framework.study import check_measured, compose_variants, load_study_config, study_cells

STUDY = """
base: quickstart
grid:
  methods:
    Plain LoRA: {}
    AsFT: {asft: {weight: 1.0}}
    Full: {overrides: {stages.finetune.adapter.kind: full, stages.finetune.learning_rate: 1.0e-5}}
  harmful_shares: [0.0, 0.1]
  seeds: [0, 1]
reference: Plain LoRA
"""


@pytest.fixture
def study(tmp_path: Path) -> Path:
    path = tmp_path / "grid.yaml"
    path.write_text(STUDY)
    return path


def test_the_grid_is_the_product_of_its_axes(study: Path) -> None:
    cells = study_cells(load_study_config(study))
    assert len(cells) == 12
    assert len({cell.name for cell in cells}) == 12
    first = cells[1]
    assert first.name == "asft-triage-p0-smollm2-135m-instruct-seed0"
    assert first.config.name == f"grid/{first.name}"
    assert first.config.tracking.group == "grid"
    repaired = load_study_config("quickstart", ["grid.seeds=[0]"])
    assert {cell.harmful_share for cell in study_cells(repaired)} == {0.1}  # the repair trains on clean rows
    assert (first.label, first.task, first.harmful_share, first.seed) == ("AsFT", "triage", 0.0, 0)
    assert first.config.stages.finetune is not None
    assert first.config.stages.finetune.methods == {"asft": {"weight": 1.0}}


def test_a_variant_changes_more_than_methods(study: Path) -> None:
    full = study_cells(load_study_config(study))[2].config
    assert full.training("finetune").adapter.kind == "full"
    assert full.training("finetune").learning_rate == 1e-5
    assert full.training("align").adapter.kind == "lora"


def test_overrides_go_to_the_study_or_to_its_base(study: Path) -> None:
    loaded = load_study_config(study, ["grid.seeds=[7]", "model=some/model", "base.max_steps=3", "reference=AsFT"])
    cell = study_cells(loaded)[0]
    assert (cell.seed, cell.model, cell.config.max_steps) == (7, "some/model", 3)
    assert loaded.reference_label == "AsFT"
    assert load_study_config(study, ["reference=null"]).reference_label == "Plain LoRA"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "reference=AsTF",
            "Expected `reference` to be one of AsFT, Full, Plain LoRA, but got 'AsTF'. Did you mean 'AsFT'?",
        ),
        ("grid.seed=[1]", "Expected `grid` to hold known keys only, but got 'seed'. Did you mean `seeds`?"),
        ("grid.harmful_shares=[1.5]", "Expected `grid.harmful_shares[0]` to be a share between 0 and 1, but got 1.5."),
        ("grid.methods={}", "Expected `grid.methods` to be not empty"),
        ("base=nothing", "Expected `recipe` to be a YAML file or one of"),
        ("base=5", "Expected `base` to be a mapping of names to values, but got 5."),
    ],
)
def test_bad_studies_are_refused(study: Path, override: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_study_config(study, [override])
    assert expected in str(caught.value)


def test_a_problem_of_many_cells_is_listed_once_with_a_label(study: Path) -> None:
    loaded = load_study_config(study, ["seeed=1", "grid.methods.Full.overrides={learning_rate: 1}"])
    with pytest.raises(ConfigError) as caught:
        study_cells(loaded, validate_methods=lambda methods, order: ["unknown method"] if methods else [])
    assert sorted(text.split(":")[0] for text in caught.value.problems) == [
        "In `AsFT`",
        "In `Full`",
        "In `Plain LoRA`",
    ]


def test_labels_that_make_the_same_name_are_refused(study: Path) -> None:
    loaded = load_study_config(study, ["grid.methods={A b: {}, a-B: {}}", "reference=null"])
    with pytest.raises(ConfigError, match="Expected every run to have its own name, but got 'a-b-triage"):
        study_cells(loaded)


def test_a_label_with_plus_composes_its_parts_in_that_order(study: Path) -> None:
    text = STUDY.replace("reference:", "# reference:").replace(
        "  harmful_shares",
        "    Anchored: {methods: {l2_to_start: {weight: 0.1}}, overrides: {stages.finetune.learning_rate: 1.0e-4}}\n"
        "    AsFT + safety_mix:\n    Anchored + AsFT:\n  harmful_shares",
    )
    study.write_text(text)
    composed = {cell.label: cell.config for cell in study_cells(load_study_config(study))}
    mixed, anchored = (composed[label].stages.finetune for label in ("AsFT + safety_mix", "Anchored + AsFT"))
    assert mixed is not None
    assert anchored is not None
    assert list(mixed.methods) == ["asft", "safety_mix"]
    assert list(anchored.methods) == anchored.order == ["l2_to_start", "asft"]
    assert anchored.learning_rate == 1e-4


def test_parts_of_other_stages_stay_there() -> None:
    parts = {
        "AsFT": {"methods": {"asft": {}}},
        "WiSE": {"stage": "repair", "methods": {"wise_ft": {}}, "overrides": {"stages.repair.max_steps": 0}},
    }
    assert compose_variants("AsFT + WiSE", parts) == {
        "methods": {"asft": {}},
        "stage": "finetune",
        "overrides": {"stages.repair.max_steps": 0, "stages.repair.methods": {"wise_ft": {}}},
    }


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("AsFT + As FT", "Expected `part of 'AsFT + As FT'` to be one of AsFT, B, C, but got 'As FT'. Did you mean"),
        ("AsFT + asft", "Expected every part of 'AsFT + asft' to bring other methods, but got `asft` twice."),
        ("B + C", "Expected the parts of 'B + C' to agree on `seed`, but got 1 and 2."),
    ],
)
def test_parts_that_do_not_fit_are_refused(label: str, expected: str) -> None:
    parts = {
        "AsFT": {"methods": {"asft": {}}},
        "B": {"methods": {}, "overrides": {"seed": 1}},
        "C": {"methods": {}, "overrides": {"seed": 2}},
    }
    with pytest.raises(ConfigError) as caught:
        compose_variants(label, parts)
    assert expected in str(caught.value)


def test_every_unknown_method_of_a_grid_is_listed_at_once(study: Path) -> None:
    study.write_text(STUDY.replace("reference:", "# reference:").replace("asft: {weight: 1.0}", "asfd: {}"))
    loaded = load_study_config(study, ["grid.methods.Other={packt: {}}", "grid.methods.Third.methods={nset: {}}"])
    with pytest.raises(ConfigError) as caught:
        study_cells(loaded, validate_methods=validate_methods)
    assert len(caught.value.problems) == 3
    for name in ("asfd", "packt", "nset"):
        assert f"but got {name!r}" in str(caught.value)


def test_cells_that_do_not_measure_their_last_model_are_refused_together(study: Path) -> None:
    cells = study_cells(load_study_config(study))
    check_measured(cells)
    late = study_cells(load_study_config(study, ["stages.repair={methods: {wise_ft: {}}, max_steps: 0}"]))
    with pytest.raises(ConfigError) as caught:
        check_measured([*cells, *late])
    assert len(caught.value.problems) == 3
    assert "In `AsFT`: Expected `evaluate.after` to hold `repair`" in caught.value.problems[1]
