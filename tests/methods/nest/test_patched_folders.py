"""Patches trained on models with patches on them, and files that come back byte by byte."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch

from framework.errors import ConfigError, ModelError
from framework.model_files import model_fingerprint, read_model
from framework.weight_files import WeightFiles
from methods.nest.patch import build_patch, read_patch, write_patch
from methods.nest.patched_folders import apply_patches, read_record, remove_patch
from methods.nest.selection import Group, Neurons, Selection
from methods.nest.sites import find_projections, find_sites
from tests.conftest import make_model
from tests.methods.nest.test_weight_copies import reorder
from tests.methods.nest.tiny_neurons import make_gpt2, make_phi3

MODELS = {
    "llama": make_model,
    "transposed": make_gpt2,
    "fused": make_phi3,
    "bfloat16": lambda: make_model().to(torch.bfloat16),
}


def patch_for(start, path, *, rows=(1, 4), seed=0):
    """The patch of random vectors for some rows of every projection of the model in a folder."""
    projections = find_projections(read_model(start, dtype=torch.float32))
    sites = find_sites(projections)
    neurons = [Neurons(s, tuple(s.start + r for r in rows), (0, 1), s.key, (4.0, 4.0), 1.0, True) for s in sites]
    groups = [Group(site.key, 2, projections[site.module].width) for site in sites]
    generator = torch.Generator().manual_seed(seed)
    patch = build_patch(
        path.stem,
        asdict(Selection(tuple(neurons), tuple(groups), 20, 10)),
        {group.key: torch.randn(2, group.width, generator=generator) for group in groups},
        base=model_fingerprint(start),
        files=WeightFiles(start),
        transposed=frozenset(name for name, one in projections.items() if one.is_transposed),
    )
    write_patch(patch, path)
    return path


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def start(tmp_path):
    make_model().save_pretrained(tmp_path / "start")
    return tmp_path / "start"


@pytest.fixture
def stacked(tmp_path, start):
    """A folder with ``first`` and, trained on top of it and of the same rows, ``second``; ``one`` has the first."""
    first = patch_for(start, tmp_path / "first.safetensors")
    apply_patches(start, [first], tmp_path / "one", keep_originals=True)
    second = patch_for(tmp_path / "one", tmp_path / "second.safetensors", seed=1)
    apply_patches(tmp_path / "one", [second], tmp_path / "two", keep_originals=True)
    return tmp_path / "two"


def test_a_patch_trained_on_a_patched_model_goes_on_and_comes_off_byte_by_byte(tmp_path, stacked):
    second = read_patch(tmp_path / "second.safetensors")
    assert second.base == model_fingerprint(tmp_path / "one") != read_record(stacked).base
    weights = (WeightFiles(tmp_path / name) for name in ("one", "two"))
    part = next(iter(second.parts.values()))
    below, on = (one.read(f"{part.module}.weight").tensor[part.rows] for one in weights)
    assert torch.equal(on, below + second.updates(next(iter(second.parts))))
    remove_patch(stacked, "second", tmp_path / "without")
    remove_patch(stacked, "second", tmp_path / "with_base", base=tmp_path / "one")
    assert content(tmp_path / "without") == content(tmp_path / "with_base") == content(tmp_path / "one")
    with pytest.raises(ModelError, match=r"to be the model the patch 'second' was trained on \(.*\), but got"):
        remove_patch(stacked, "second", tmp_path / "no", base=tmp_path / "start")


def test_a_patch_stays_on_while_another_one_needs_it(tmp_path, start, stacked):
    third = patch_for(stacked, tmp_path / "third.safetensors", rows=(2, 3))
    other = patch_for(start, tmp_path / "other.safetensors", rows=(6, 7))
    apply_patches(stacked, [third, other], tmp_path / "all", keep_originals=True)
    assert read_record(tmp_path / "all").needs == {
        "first": (),
        "second": ("first",),
        "third": ("first", "second"),
        "other": (),
    }
    with pytest.raises(
        ModelError, match=r"on top of 'first', but got third, second\. Take them off first, in this order"
    ):
        remove_patch(tmp_path / "all", "first", tmp_path / "no")
    with pytest.raises(ModelError, match=r"on top of 'second', but got third\. Take it off first"):
        remove_patch(tmp_path / "all", str(tmp_path / "second.safetensors"), tmp_path / "no")
    assert not (tmp_path / "no").exists()
    place = tmp_path / "all"
    for number, name in enumerate(("third", "other", "second", "first")):
        remove_patch(place, name, tmp_path / f"off{number}")
        place = tmp_path / f"off{number}"
    assert content(place) == content(start)


def test_patches_of_the_base_still_keep_to_rows_of_their_own(tmp_path, start, stacked):
    again = patch_for(start, tmp_path / "again.safetensors", rows=(4, 5), seed=2)
    with pytest.raises(ConfigError, match="`first` and `again` share 4 in 4 modules"):
        apply_patches(stacked, [again], tmp_path / "no")


def test_a_patch_of_another_state_of_the_patches_is_refused(tmp_path, start, stacked):
    second = tmp_path / "second.safetensors"
    with pytest.raises(ModelError, match=r"\(base \w+\), but got one for the base \w+. .* if that one had patches"):
        apply_patches(start, [second], tmp_path / "no")
    other = patch_for(start, tmp_path / "other.safetensors", rows=(6, 7))
    apply_patches(start, [other], tmp_path / "elsewhere")
    with pytest.raises(ModelError, match=r"\(base \w+, with its patches \w+\), but got one for the base"):
        apply_patches(tmp_path / "elsewhere", [second], tmp_path / "no")


def test_a_record_without_what_patches_need_is_read(tmp_path, start):
    first = patch_for(start, tmp_path / "first.safetensors")
    apply_patches(start, [first], tmp_path / "one", keep_originals=True)
    record = json.loads((tmp_path / "one" / "patches.json").read_text())
    for entry in record["patches"]:
        del entry["needs"]
    (tmp_path / "one" / "patches.json").write_text(json.dumps(record))
    assert read_record(tmp_path / "one").needs == {"first": ()}
    remove_patch(tmp_path / "one", "first", tmp_path / "off")
    assert content(tmp_path / "off") == content(start)


@pytest.mark.parametrize("name", MODELS)
def test_weight_files_in_a_foreign_order_come_back_byte_by_byte(tmp_path, name):
    start = tmp_path / "start"
    MODELS[name]().save_pretrained(start)
    reorder(start / "model.safetensors")
    before = content(start)
    path = patch_for(start, tmp_path / "mend.safetensors")
    apply_patches(start, [path], tmp_path / "on")
    assert model_fingerprint(tmp_path / "on") != model_fingerprint(start)
    remove_patch(tmp_path / "on", "mend", tmp_path / "off", base=start)
    assert model_fingerprint(tmp_path / "off") == model_fingerprint(start)
    assert content(tmp_path / "off") == before == content(start)
    apply_patches(tmp_path / "off", [path], tmp_path / "again")
    again, on = (tmp_path / one / "model.safetensors" for one in ("again", "on"))
    assert again.read_bytes() == on.read_bytes()


def test_files_that_must_not_be_written_are_copied_all_the_same(tmp_path, start):
    path = patch_for(start, tmp_path / "mend.safetensors")
    (start / "model.safetensors").chmod(0o444)
    apply_patches(start, [path], tmp_path / "on")
    assert (tmp_path / "on" / "model.safetensors").stat().st_mode & 0o200
