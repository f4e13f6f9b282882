from __future__ import annotations

import json

import pytest
import pytorch_lightning as pl
import torch
from safetensors.torch import load_file
from torch import nn

from experiments.run import run_recipe
from framework.adapters import AdapterSpec, add_adapter
from framework.composition import apply_edits
from framework.config import load_run_config
from framework.errors import NoEffectError, WiringError
from framework.model_files import model_fingerprint
from framework.module import FineTuneModule
from framework.parameters import count_parameters, trainable_names
from methods.nest import NeST, NeSTConfig, read_patch
from methods.nest.method import _AddVectors, _Share
from methods.nest.patched_folders import apply_patches
from methods.nest.selection import load_selection, save_selection
from tests.conftest import make_model, make_tokenizer
from tests.methods.nest.tiny_neurons import (
    SETTINGS,
    logits,
    make_data,
    make_gpt2,
    make_neox,
    make_phi3,
    make_store,
    move_vectors,
    prepared,
    write_prompts,
)
from tests.tiny_runs import make_lora, run_fit

MODELS = {"llama": make_model, "gpt2": make_gpt2, "neox": make_neox, "phi3": make_phi3}


def frozen(model):
    return add_adapter(model, AdapterSpec(kind="none"))


class Watcher(pl.Callback):
    """Keeps what is trained and what the optimizer holds."""

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.trained = trainable_names(pl_module.model)
        self.optimizer = sum(v.numel() for s in trainer.optimizers[0].state.values() for v in s.values() if v.ndim)
        self.dtypes = {p.dtype for p in pl_module.parameters() if p.requires_grad}


# ---- hooked and folded ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("scope", ["module", "layer"])
def test_folded_logits_equal_hooked_ones_and_other_rows_keep_their_bits(tmp_path, name, scope):
    model = frozen(MODELS[name]())
    before, plain = {k: v.clone() for k, v in model.state_dict().items()}, logits(model)
    method = prepared(tmp_path, model, scope=scope, max_rows=6)
    method.prepare_model(model)
    torch.testing.assert_close(logits(model), plain, rtol=0, atol=0)
    move_vectors(model)
    hooked = logits(model)
    assert float((hooked - plain).abs().max()) > 1e-3
    method.edit_weights(model)
    assert float((logits(model) - hooked).abs().max() / hooked.abs().max()) < 1e-5
    after = model.state_dict()
    assert list(after) == list(before)
    chosen = {}
    for one in method._selection.neurons:
        chosen.setdefault(f"{one.site.module}.weight", set()).update(one.rows)
    for key, value in after.items():
        old = before[key]
        if name == "gpt2" and key in chosen:
            value, old = value.T, old.T
        changed = set((value != old).any(dim=1).nonzero().flatten().tolist()) if value.ndim == 2 else set()
        assert changed == chosen.get(key, set()), key
        assert value.ndim == 2 or torch.equal(value, old)


@pytest.mark.parametrize(
    ("settings", "vectors"), [({}, None), ({"clustering": "untied"}, 16), ({"scope": "layer"}, None)]
)
def test_the_number_of_parameters_is_clusters_times_width(tmp_path, settings, vectors):
    model = frozen(make_model())
    method = prepared(tmp_path, model, max_rows=4, **settings)
    method.prepare_model(model)
    added = count_parameters(model)[0]
    selection = method._selection
    assert added == selection.num_parameters == sum(group.num_clusters for group in selection.groups) * 32
    assert vectors is None or added == vectors * 32
    if settings.get("scope") == "layer":
        assert len(selection.groups) == 2


def test_rows_of_one_cluster_move_together_and_an_untied_row_alone(tmp_path):
    model = frozen(make_model())
    start = {k: v.clone() for k, v in model.state_dict().items()}
    method = prepared(tmp_path, model, clustering="fixed", clusters=2)
    method.prepare_model(model)
    move_vectors(model)
    method.edit_weights(model)
    for one in method._selection.neurons:
        name = f"{one.site.module}.weight"
        moved = (model.state_dict()[name] - start[name])[list(one.rows)]
        for label in set(one.clusters):
            alike = moved[[place for place, found in enumerate(one.clusters) if found == label]]
            torch.testing.assert_close(alike, alike[:1].expand_as(alike), rtol=0, atol=1e-6)


# ---- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["none", "full", "lora"])
def test_only_the_vectors_are_trained_and_the_optimizer_holds_nothing_else(tmp_path, kind):
    model = make_lora(make_model(), warm=False) if kind == "lora" else add_adapter(make_model(), AdapterSpec(kind=kind))
    method, watcher = prepared(tmp_path, model), Watcher()
    run_fit(model, [method], observers=[watcher])
    assert all("nest_vectors" in name for name in watcher.trained)
    assert watcher.optimizer == 2 * method._selection.num_parameters
    assert method.effects["parameters_folded"] == method._selection.num_parameters
    assert method.effects["rows_selected"] == method._selection.num_rows
    assert 1 <= method.effects["tensors_folded"] <= 4
    assert method.reports["accuracy"] > 0.8
    assert not hasattr(model, "nest_vectors")


def test_vectors_are_float32_on_a_bfloat16_base_and_the_fold_loses_nothing(tmp_path):
    model = frozen(make_model().to(torch.bfloat16))
    method, watcher = prepared(tmp_path, model), Watcher()
    run_fit(model, [method], observers=[watcher], precision="bf16-mixed")
    assert watcher.dtypes == {torch.float32}
    start = load_file(tmp_path / "start" / "model.safetensors")
    patch = method._patch
    for key, part in patch.parts.items():
        name = f"{part.module}.weight"
        found = model.state_dict()[name]
        assert found.dtype == torch.float32
        assert torch.equal(found[part.rows], start[name].float()[part.rows] + patch.updates(key))


def test_adapter_and_vectors_train_together(tmp_path):
    model = make_lora(make_model(), warm=False)
    method, watcher = prepared(tmp_path, model, train="deltas+adapter"), Watcher()
    run_fit(model, [method], observers=[watcher])
    assert {"nest_vectors", "lora_A"} <= {part for name in watcher.trained for part in name.split(".")}
    assert method._patch is None
    method.write_files(tmp_path)
    assert not (tmp_path / "nest.safetensors").exists()


def test_holding_rows_that_no_adapter_moves_is_refused(tmp_path):
    model = make_lora(make_model())
    method = prepared(tmp_path, model, train="all_but_neurons")
    with pytest.raises(WiringError, match=r"train some of the selected rows .* Add gate_proj and up_proj"):
        method.prepare_model(model)


def test_vectors_that_never_moved_are_an_error_unless_that_is_wanted(tmp_path):
    model = frozen(make_model())
    method = prepared(tmp_path, model)
    method.prepare_model(model)
    with pytest.raises(NoEffectError, match="its vectors are still zero after training"):
        method.edit_weights(model)
    model = frozen(make_model())
    method = prepared(tmp_path, model)
    method.allow_no_effect = True
    method.prepare_model(model)
    method.edit_weights(model)
    assert method.effects["tensors_folded"] == 0


def test_rows_keep_sharing_prefixes(tmp_path):
    model = frozen(make_model())
    run = run_fit(model, [prepared(tmp_path, model)])
    assert run.module.share_prefixes


class Packed(pl.Callback):
    """Whether each batch could share prefixes."""

    def __init__(self):
        self.found = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.found.append(batch.packed is not None and pl_module.share_prefixes)


def test_the_vectors_learn_the_same_on_shared_prefixes_as_on_padded_rows(tmp_path):
    runs = []
    for shares in (True, False):
        model, watcher = frozen(make_model()), Packed()
        method = prepared(tmp_path, model)
        module = FineTuneModule(model, learning_rate=1e-2, total_steps=3, share_prefixes=shares)
        runs.append(run_fit(model, [method], data=make_data(), module=module, observers=[watcher], max_steps=3))
        assert watcher.found == [shares] * 3
    for ours, theirs in zip(runs[0].gradients, runs[1].gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(runs[0].weights, runs[1].weights, rtol=1e-5, atol=1e-6)


def test_a_first_pass_under_inference_mode_elsewhere_does_not_stop_training():
    vectors = nn.ParameterDict({"one": nn.Parameter(torch.zeros(1, 4, device="meta"))})
    hook = _AddVectors(vectors, [_Share("one", torch.tensor([1]), torch.ones(1, 1))])
    inputs, output = torch.zeros(2, 4, device="meta"), torch.zeros(2, 3, device="meta")
    with torch.inference_mode():
        hook(nn.Identity(), (inputs,), output.clone())
    assert hook.shares[0].rows.device.type == "meta"
    hook(nn.Identity(), (inputs,), output.clone()).sum().backward()
    assert vectors["one"].grad.shape == (1, 4)


# ---- choosing ------------------------------------------------------------------------------------------------------


def test_random_rows_are_as_many_and_are_not_the_selected_ones(tmp_path):
    model = frozen(make_model())
    chosen, others = (prepared(tmp_path, model, random_rows=flag)._selection for flag in (False, True))
    for ours, theirs in zip(chosen.neurons, others.neurons, strict=True):
        assert len(ours.rows) == len(theirs.rows)
        assert not set(ours.rows) & set(theirs.rows)


@pytest.mark.parametrize("projections", ["gate", "up"])
def test_one_kind_of_projection(tmp_path, projections):
    model = frozen(make_model())
    method = prepared(tmp_path, model, projections=projections)
    assert {one.site.kind for one in method._selection.neurons} == {projections}
    method.prepare_model(model)
    assert method.effects["modules_matched"] == 2


def test_settings_change_what_is_selected(tmp_path):
    model = frozen(make_model())
    rows = {
        name: prepared(tmp_path, model, min_rows=0, **settings)._selection.num_rows
        for name, settings in {
            "default": {}, "lower": {"threshold": 1.0}, "two": {"sides": "two"}, "mean": {"score": "mean_difference"},
        }.items()
    }  # fmt: skip
    assert rows["lower"] > rows["default"]
    assert rows["two"] > rows["default"]
    assert rows["mean"] > 0


def test_nothing_above_the_threshold_is_refused(tmp_path):
    with pytest.raises(WiringError, match="some neuron to score above 50 standard deviations, but none does"):
        prepared(tmp_path, frozen(make_model()), threshold=50.0, min_rows=0)


def test_the_selection_is_found_again_and_a_new_one_made_when_settings_differ(tmp_path, monkeypatch):
    model = frozen(make_model())
    first = prepared(tmp_path, model)._selection
    monkeypatch.setattr("methods.nest.method.find_neurons", lambda *args, **kwargs: pytest.fail("probed again"))
    assert prepared(tmp_path, model, train="deltas+adapter")._selection == first
    with pytest.raises(pytest.fail.Exception):
        prepared(tmp_path, model, threshold=2.0)


def test_a_selection_survives_being_written(tmp_path):
    selection = prepared(tmp_path, frozen(make_model()))._selection
    save_selection(selection, tmp_path / "neurons.json")
    assert load_selection(tmp_path / "neurons.json") == selection
    assert set(selection.accuracy_by_layer) == {0, 1}


def test_probing_needs_data_and_training_needs_probing(tmp_path):
    model = frozen(make_model())
    method = NeST(NeSTConfig(**write_prompts(tmp_path)))
    with pytest.raises(WiringError, match="needs the stage's data module"):
        method.prepare(model, None, make_store(tmp_path, model))
    with pytest.raises(WiringError, match=r"has not found its neurons yet. Call `prepare_methods"):
        method.prepare_model(model)
    with pytest.raises(WiringError, match="acts in training"):
        apply_edits(model, [method])


def test_the_start_model_must_be_known_to_fold(tmp_path):
    model = frozen(make_model())
    method = prepared(tmp_path, model)
    method.prepare_model(model)
    method._start = None
    with pytest.raises(WiringError, match="does not know its start model"):
        method.edit_weights(model)


# ---- the patch -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keeps", [False, True])
def test_training_leaves_a_patch_of_what_it_changed(tmp_path, keeps):
    model = frozen(make_model())
    method = prepared(tmp_path, model, store_originals=keeps)
    run_fit(model, [method])
    method.write_files(tmp_path)
    patch = read_patch(tmp_path / "nest.safetensors")
    assert patch.has_originals == keeps
    assert patch.num_rows == method._selection.num_rows
    assert patch.num_parameters == method._selection.num_parameters
    assert patch.found() == method._selection
    start = make_model().state_dict()
    for key, part in patch.parts.items():
        name = f"{part.module}.weight"
        assert torch.equal(start[name][part.rows] + patch.updates(key), model.state_dict()[name][part.rows])
    assert (tmp_path / "nest.safetensors").stat().st_size < 64 * 1024


def test_a_copy_of_the_model_has_vectors_of_its_own(tmp_path):
    from framework.reference import frozen_copy

    model = frozen(make_model())
    method = prepared(tmp_path, model)
    method.prepare_model(model)
    plain, copied = logits(model), frozen_copy(model)
    move_vectors(model)
    torch.testing.assert_close(logits(copied), plain, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_leaves_the_patch_beside_the_model_and_counts_the_vectors(tmp_path, monkeypatch, dtype):
    monkeypatch.setenv("SEAWALL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    nest = json.dumps({**write_prompts(tmp_path), **SETTINGS})
    overrides = [
        f"model={tmp_path / 'model'}", "max_length=500", "max_steps=2", "batch_size=4",
        f"stages.align.methods={{nest: {nest}}}",
        "evaluate.limit=2", "evaluate.max_new_tokens=2", "evaluate.benign_nll=false", "evaluate.after=[align]",
        "tracking.wandb=off", "trainer.accelerator=cpu", "trainer.threads=1", f"model.dtype={dtype}",
    ]  # fmt: skip
    results = run_recipe(load_run_config("nest_align", overrides))
    record = next(stage for stage in results["stages"] if stage["stage"] == "align")
    stage = next(tmp_path.glob("cache/artifacts/stage/*/stage.json")).parent
    patch = read_patch(stage / "nest.safetensors")
    assert record["trainable_parameters"] == patch.num_parameters > 0
    assert patch.base == model_fingerprint(tmp_path / "model")
    left = tmp_path / "runs" / "nest_align" / "patches" / "nest.safetensors"
    assert left.read_bytes() == (stage / "nest.safetensors").read_bytes()
    apply_patches(tmp_path / "model", [stage / "nest.safetensors"], tmp_path / "patched")
    trained, patched = (load_file(folder / "model.safetensors") for folder in (stage / "model", tmp_path / "patched"))
    assert all(torch.equal(trained[name], patched[name]) for name in patched)
    start = load_file(tmp_path / "model" / "model.safetensors")
    chosen = {f"{part.module}.weight": part.rows for part in patch.parts.values()}
    for name, value in start.items():
        others = torch.ones(len(value), dtype=torch.bool)
        others[chosen.get(name, torch.zeros(0, dtype=torch.long))] = False
        assert torch.equal(trained[name][others], value[others]), name
    assert "patches_left_out" not in record["effects"]["nest"]
