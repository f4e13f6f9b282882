from __future__ import annotations

from pathlib import Path

import pytest

from framework.errors import ConfigError
from framework.study import load_study_config, study_cells

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
        study_cells(loaded, validate_methods=lambda methods: ["unknown method"] if methods else [])
    assert sorted(text.split(":")[0] for text in caught.value.problems) == [
        "In `AsFT`",
        "In `Full`",
        "In `Plain LoRA`",
    ]


def test_labels_that_make_the_same_name_are_refused(study: Path) -> None:
    loaded = load_study_config(study, ["grid.methods={A b: {}, a-B: {}}", "reference=null"])
    with pytest.raises(ConfigError, match="Expected every run to have its own name, but got 'a-b-triage"):
        study_cells(loaded)
