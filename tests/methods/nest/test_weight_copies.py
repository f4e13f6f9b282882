"""Copies of weight files with some tensors changed."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from framework.errors import ModelError, StorageError
from methods.nest.weight_copies import copy_changed, tensor_offsets


def reorder(path):
    """Write a file again as another program might: tensors in another order, more metadata, a padded header."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    metadata = header.pop("__metadata__", {})
    made, data = {"__metadata__": {"z": "last", **metadata, "a": "first"}}, b""
    for name, one in reversed(header.items()):
        start, stop = one["data_offsets"]
        made[name] = one | {"data_offsets": [len(data), len(data) + stop - start]}
        data += raw[8 + length + start : 8 + length + stop]
    text = json.dumps(made, indent=1).encode()
    text += b" " * (64 + -len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.fixture
def source(tmp_path):
    tensors = {
        "a": torch.arange(6.0).reshape(2, 3),
        "b": torch.arange(4).to(torch.bfloat16).reshape(2, 2),
        "c": torch.arange(3),
    }
    save_file(tensors, tmp_path / "source.safetensors", metadata={"format": "pt"})
    reorder(tmp_path / "source.safetensors")
    return tmp_path / "source.safetensors"


@pytest.mark.parametrize("name", ["a", "b"])
def test_only_the_bytes_of_the_changed_tensor_differ(tmp_path, source, name):
    before, target = source.read_bytes(), tmp_path / "target.safetensors"
    copy_changed(source, target, [name], lambda _, tensor: (tensor + 1).T.contiguous().T)
    now, was = load_file(target), load_file(source)
    assert torch.equal(now[name], was[name] + 1)
    assert all(torch.equal(now[other], was[other]) for other in was if other != name)
    place = slice(offset := tensor_offsets(source)[name], offset + was[name].nbytes)
    after = target.read_bytes()
    assert after[: place.start] == before[: place.start]
    assert after[place.stop :] == before[place.stop :]
    assert after[place] != before[place]
    copy_changed(target, target, [name], lambda _, tensor: tensor - 1)
    assert target.read_bytes() == before == source.read_bytes()


def test_without_changes_it_is_a_copy(tmp_path, source):
    copy_changed(source, tmp_path / "target.safetensors", [], lambda _, tensor: tensor)
    assert (tmp_path / "target.safetensors").read_bytes() == source.read_bytes()


def test_nothing_is_left_where_a_change_fails(tmp_path, source):
    def fail(name, tensor):
        raise ModelError("no")

    with pytest.raises(ModelError, match="no"):
        copy_changed(source, tmp_path / "target.safetensors", ["a"], fail)
    assert list(tmp_path.iterdir()) == [source]


def test_a_folder_that_cannot_be_written_is_named(tmp_path, source):
    with pytest.raises(StorageError, match=r"Expected `.*target.safetensors` to be writable, but got No such file"):
        copy_changed(source, tmp_path / "none" / "target.safetensors", ["a"], lambda _, tensor: tensor)
