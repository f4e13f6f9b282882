"""NeST on an image-text model: a whole run, measured with images, and its patch under the names of the files."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from experiments.run import run_recipe
from framework.config import load_run_config
from methods.nest import read_patch
from methods.nest.patched_folders import apply_patches
from tests.methods.nest.tiny_neurons import SETTINGS, write_prompts
from tests.tiny_vision import save_image_text_model, save_picture


@pytest.fixture
def pictures(tmp_path):
    rows = []
    for number, colour in enumerate([(250, 0, 0), (0, 0, 250), (0, 250, 0)]):
        save_picture(tmp_path / "pictures" / f"{number}.png", colour)
        rows.append({"prompt": f"What is on picture {number}?", "image": f"pictures/{number}.png"})
    rows.append({"prompt": "And without one?", "image": ""})
    path = tmp_path / "pictures.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_run_trains_the_text_tower_measures_with_images_and_leaves_a_patch(tmp_path, monkeypatch, pictures):
    monkeypatch.setenv("SEAWALL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    start = save_image_text_model(tmp_path / "model")
    nest = json.dumps({**write_prompts(tmp_path), **SETTINGS})
    overrides = [
        f"model={start}", "max_length=500", "max_steps=2", "batch_size=4", f"stages.align.methods={{nest: {nest}}}",
        f"evaluate.safety=[{pictures}]", "evaluate.limit=4", "evaluate.max_new_tokens=2", "evaluate.benign_nll=false",
        "evaluate.after=[align]", "tracking.wandb=off", "trainer.accelerator=cpu", "trainer.threads=1",
    ]  # fmt: skip
    results = run_recipe(load_run_config("nest_vlm", overrides))
    samples = (tmp_path / "runs/nest_vlm/samples.jsonl").read_text(encoding="utf-8").rstrip("\n").split("\n")
    rows = [json.loads(line) for line in samples]
    assert [row.get("image", "")[-14:] for row in rows if row["kind"] == "harmful"] == [
        "pictures/0.png", "pictures/1.png", "pictures/2.png", "",
    ]  # fmt: skip
    assert results["rows"][0]["metrics"]["attack_success"]["denominator"] == 4
    stage = next(tmp_path.glob("cache/artifacts/stage/*/stage.json")).parent
    patch = read_patch(stage / "nest.safetensors")
    assert patch.num_rows > 0
    assert {part.module.rpartition(".layers.")[0] for part in patch.parts.values()} == {"language_model.model"}
    apply_patches(start, [stage / "nest.safetensors"], tmp_path / "patched")
    before, trained, patched = (
        load_file(folder / "model.safetensors") for folder in (start, stage / "model", tmp_path / "patched")
    )
    assert list(trained) == list(patched) == list(before)
    assert all(torch.equal(trained[name], patched[name]) for name in patched)
    changed = {name for name in before if not torch.equal(before[name], trained[name])}
    assert changed == {f"{part.module}.weight" for part in patch.parts.values()}
