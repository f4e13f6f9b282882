from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from framework.errors import ConfigError, ModelError
from framework.model_files import model_fingerprint
from methods.nest.patch import read_patch, write_patch
from methods.nest.patched_folders import apply_patches, read_record, remove_patch
from tests.conftest import make_model, make_tokenizer
from tests.methods.nest.tiny_neurons import make_gpt2, move_vectors, prepared


def make_patch(folder, model, *, name="mend", **settings):
    """The patch of random vectors on a model that lies in ``folder/start`` afterwards."""
    method = prepared(folder, model, max_rows=5, **settings)
    make_tokenizer().save_pretrained(folder / "start")
    method.prepare_model(model)
    move_vectors(model)
    method.edit_weights(model)
    path = folder / f"{name}.safetensors"
    write_patch(method._patch, path)
    return path


@pytest.fixture(params=["llama", "gpt2", "bfloat16"])
def model(request):
    made = make_gpt2() if request.param == "gpt2" else make_model()
    return made.to(torch.bfloat16) if request.param == "bfloat16" else made


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(ours, theirs):
    return list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_patch_goes_on_and_comes_off_bit_by_bit(tmp_path, model):
    path = make_patch(tmp_path, model)
    start, on, off = tmp_path / "start", tmp_path / "on", tmp_path / "off"
    base = weights(start)
    done = apply_patches(start, [path], on)
    patch = read_patch(path)
    assert done.rows == patch.num_rows
    changed = weights(on)
    for key, part in patch.parts.items():
        name = f"{part.module}.weight"
        now, was = (w[name].T if part.is_transposed else w[name] for w in (changed, base))
        assert now.dtype == was.dtype
        assert torch.equal(now[part.rows], (was.float()[part.rows] + patch.updates(key)).to(was.dtype))
        rest = torch.ones(len(now), dtype=torch.bool)
        for other in patch.parts.values():
            rest[other.rows] &= other.module != part.module
        assert torch.equal(now[rest], was[rest])
    modules = {f"{part.module}.weight" for part in patch.parts.values()}
    assert same(
        {n: v for n, v in changed.items() if n not in modules}, {n: v for n, v in base.items() if n not in modules}
    )
    assert (done.rounding == 0) == (base[next(iter(modules))].dtype == torch.float32)
    assert remove_patch(on, "mend", off, base=start) == patch.num_rows
    assert same(weights(off), base)
    assert model_fingerprint(off) == model_fingerprint(start)
    assert read_record(off) is None
    assert sorted(p.name for p in off.iterdir()) == sorted(p.name for p in start.iterdir())


def test_a_patch_comes_off_without_the_base_when_originals_were_kept(tmp_path, model):
    path = make_patch(tmp_path, model)
    apply_patches(tmp_path / "start", [path], tmp_path / "on", keep_originals=True)
    remove_patch(tmp_path / "on", str(path), tmp_path / "off")
    assert same(weights(tmp_path / "off"), weights(tmp_path / "start"))


def test_originals_may_come_with_the_patch(tmp_path):
    path = make_patch(tmp_path, make_model(), store_originals=True)
    apply_patches(tmp_path / "start", [path], tmp_path / "on")
    remove_patch(tmp_path / "on", "mend", tmp_path / "off")
    assert same(weights(tmp_path / "off"), weights(tmp_path / "start"))


def test_without_base_and_originals_a_patch_stays_on(tmp_path):
    apply_patches(tmp_path / "start", [make_patch(tmp_path, make_model())], tmp_path / "on")
    with pytest.raises(ModelError, match="rows as they were to be stored with the patch 'mend', but they are not"):
        remove_patch(tmp_path / "on", "mend", tmp_path / "off")
    assert not (tmp_path / "off").exists()
    assert not [p for p in tmp_path.iterdir() if "partial" in p.name]


def test_patches_of_other_rows_go_on_together_and_come_off_in_any_order(tmp_path):
    gate = make_patch(tmp_path, make_model(), name="gate", projections="gate")
    up = make_patch(tmp_path, make_model(), name="up", projections="up")
    start = tmp_path / "start"
    apply_patches(start, [gate, up], tmp_path / "both")
    apply_patches(start, [gate], tmp_path / "one")
    apply_patches(tmp_path / "one", [up], tmp_path / "two")
    assert same(weights(tmp_path / "both"), weights(tmp_path / "two"))
    assert [entry["name"] for entry in read_record(tmp_path / "two").patches] == ["gate", "up"]
    remove_patch(tmp_path / "both", "gate", tmp_path / "only_up", base=start)
    apply_patches(start, [up], tmp_path / "up_alone")
    assert same(weights(tmp_path / "only_up"), weights(tmp_path / "up_alone"))
    remove_patch(tmp_path / "only_up", "up", tmp_path / "none", base=start)
    assert same(weights(tmp_path / "none"), weights(start))


def test_patches_that_share_rows_are_named(tmp_path):
    first = make_patch(tmp_path, make_model(), name="first")
    second = make_patch(tmp_path, make_model(), name="second", projections="gate")
    message = r"`first` and `second` share \d+ in 2 modules \(`model.layers.0.mlp.gate_proj` rows \["
    with pytest.raises(ConfigError, match=message):
        apply_patches(tmp_path / "start", [first, second], tmp_path / "on")
    apply_patches(tmp_path / "start", [first], tmp_path / "on")
    with pytest.raises(ConfigError, match=message):
        apply_patches(tmp_path / "on", [second], tmp_path / "more")


def test_two_patches_of_one_name_are_refused(tmp_path):
    first = make_patch(tmp_path, make_model(), name="mend", projections="gate")
    (tmp_path / "x").mkdir()
    second = tmp_path / "x" / "mend.safetensors"
    second.write_bytes(make_patch(tmp_path, make_model(), name="other", projections="up").read_bytes())
    with pytest.raises(ConfigError, match="its own name, but got 'mend' twice"):
        apply_patches(tmp_path / "start", [first, second], tmp_path / "on")


def test_another_base_is_refused(tmp_path):
    path = make_patch(tmp_path, make_model())
    make_model(1).save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match=r"to be a patch for `.*other` \(base .*\), but got one for the base"):
        apply_patches(tmp_path / "other", [path], tmp_path / "on")
    apply_patches(tmp_path / "start", [path], tmp_path / "on")
    with pytest.raises(ModelError, match="to be the model the patch 'mend' was trained on"):
        remove_patch(tmp_path / "on", "mend", tmp_path / "off", base=tmp_path / "other")


def test_rows_that_are_not_those_of_the_base_are_refused(tmp_path, monkeypatch):
    path = make_patch(tmp_path, make_model())
    monkeypatch.setattr("methods.nest.patched_folders.model_fingerprint", lambda folder: read_patch(path).base)
    make_model(1).save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match="to be those the patch was trained on, but got others"):
        apply_patches(tmp_path / "other", [path], tmp_path / "on")
    apply_patches(tmp_path / "start", [path], tmp_path / "on")
    with pytest.raises(ModelError, match="as they were before the patch, but got others"):
        remove_patch(tmp_path / "on", "mend", tmp_path / "off", base=tmp_path / "other")


def test_a_model_whose_weights_were_changed_afterwards_is_refused(tmp_path):
    apply_patches(tmp_path / "start", [make_patch(tmp_path, make_model())], tmp_path / "on")
    tensors = weights(tmp_path / "on")
    tensors["model.norm.weight"] += 1
    save_file(tensors, tmp_path / "on" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"to be as patches left it .*: its weights were changed"):
        read_record(tmp_path / "on")


def test_a_patch_replaced_in_the_folder_is_refused(tmp_path):
    first = make_patch(tmp_path, make_model(), name="mend", projections="gate")
    other = make_patch(tmp_path, make_model(), name="other", projections="up")
    apply_patches(tmp_path / "start", [first], tmp_path / "on")
    (tmp_path / "on" / "patches" / "mend.safetensors").write_bytes(other.read_bytes())
    with pytest.raises(ModelError, match="to hold the patch 'mend' that was put on it, but got another one"):
        remove_patch(tmp_path / "on", "mend", tmp_path / "off", base=tmp_path / "start")


def test_a_patch_that_is_not_there_is_refused(tmp_path):
    path = make_patch(tmp_path, make_model())
    with pytest.raises(ModelError, match="to carry the patch 'mend', but it carries none"):
        remove_patch(tmp_path / "start", "mend", tmp_path / "off")
    apply_patches(tmp_path / "start", [path], tmp_path / "on")
    with pytest.raises(ModelError, match="to carry the patch 'men', but it carries mend"):
        remove_patch(tmp_path / "on", "men", tmp_path / "off")
    with pytest.raises(ConfigError, match=r"`--output` to be a new folder, but got .* which exists"):
        apply_patches(tmp_path / "start", [path], tmp_path / "on")


def test_a_weight_that_is_missing_is_named(tmp_path, monkeypatch):
    path = make_patch(tmp_path, make_model())
    (tmp_path / "short").mkdir()
    tensors = {n: t for n, t in weights(tmp_path / "start").items() if "layers.1.mlp.up" not in n}
    save_file(tensors, tmp_path / "short" / "model.safetensors")
    (tmp_path / "short" / "config.json").write_text("{}")
    monkeypatch.setattr("methods.nest.patched_folders.model_fingerprint", lambda folder: read_patch(path).base)
    with pytest.raises(ModelError, match=r"to hold the weight of `model.layers.1.mlp.up_proj`"):
        apply_patches(tmp_path / "short", [path], tmp_path / "on")


# ---- files ---------------------------------------------------------------------------------------------------------


def rewritten(path, *, tensors=None, manifest=None):
    """Write the file again with something changed, as a text editor or a bad disk would."""
    with safe_open(path, "pt") as file:
        metadata, held = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if manifest:
        metadata["manifest"] = json.dumps(json.loads(metadata["manifest"]) | manifest, sort_keys=True)
    if tensors:
        name = next(name for name in held if name.startswith(tensors))
        held[name] = held[name] + 1
    save_file(held, path, metadata=metadata)


@pytest.mark.parametrize("change", [{"tensors": "vectors/"}, {"tensors": "rows/"}, {"manifest": {"base": "0" * 16}}])
def test_a_changed_file_is_refused(tmp_path, change):
    path = make_patch(tmp_path, make_model())
    rewritten(path, **change)
    with pytest.raises(ModelError, match="its checksum differs: the file was changed"):
        read_patch(path)


def test_files_that_are_no_patches_are_refused(tmp_path):
    path = make_patch(tmp_path, make_model())
    with pytest.raises(ModelError, match="to be a patch file, but got other tensors"):
        read_patch(tmp_path / "start" / "model.safetensors")
    with pytest.raises(ModelError, match="to be a patch file, but got no such file"):
        read_patch(tmp_path / "none.safetensors")
    (tmp_path / "half.safetensors").write_bytes(path.read_bytes()[:100])
    with pytest.raises(ModelError, match="to be a patch file, but it cannot be read"):
        read_patch(tmp_path / "half.safetensors")
    rewritten(path, manifest={"format": 9})
    with pytest.raises(ModelError, match="to be a patch of format 1, but got 9"):
        read_patch(path)


def test_the_identity_depends_on_what_a_patch_does_and_not_on_its_name(tmp_path):
    from dataclasses import replace

    patch = read_patch(make_patch(tmp_path, make_model(), store_originals=True))
    plain = replace(patch, name="x", parts={k: p._replace(originals=None) for k, p in patch.parts.items()})
    moved = replace(patch, vectors={group: value + 1 for group, value in patch.vectors.items()})
    assert plain.identity == patch.identity
    assert moved.identity != patch.identity
