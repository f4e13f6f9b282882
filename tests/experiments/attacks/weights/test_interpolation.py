"""Interpolation: exact at both ends, one folder at a time, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from experiments.attacks.registry import create_attack
from experiments.contract.tiny import make_model
from framework.errors import ConfigError, WiringError
from framework.model_files import read_model
from tests.experiments.attacks.tiny_targets import make_target, same_bits, weights, with_base, write_model


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return with_base(tmp_path_factory.mktemp("interpolation"))


def test_both_ends_equal_the_two_models_bit_for_bit(target, tmp_path):
    attack = create_attack("interpolation", {"factors": [0.0, 0.5, 1.0]})
    assert attack.num_models == 3
    seen = []
    for made in attack.make(target, tmp_path):
        seen.append(made.setting["factor"])
        if made.setting["factor"] == 0.0:
            assert made.folder == target.folder
        elif made.setting["factor"] == 1.0:
            assert same_bits(made.folder, target.base)
        else:
            ours, theirs, middle = weights(target.folder), weights(target.base), weights(made.folder)
            assert all(torch.allclose(middle[n], (ours[n] + theirs[n]) / 2, atol=1e-7) for n in middle)
            assert made.facts["tensors_changed"] > 0
            assert made.cost["seconds"] > 0
    assert seen == [0.0, 0.5, 1.0]
    assert target.folder.is_dir()
    assert list(tmp_path.iterdir()) == []


def test_each_model_is_complete_and_gone_when_the_next_is_asked_for(target, tmp_path):
    made = create_attack("interpolation", {"factors": [0.25, 0.75]}).make(target, tmp_path)
    first = next(made)
    assert read_model(first.folder, dtype=torch.float32).config.vocab_size == 260
    second = next(made)
    assert second.folder.is_dir()
    assert not first.folder.exists()
    made.close()
    assert not second.folder.exists()


def test_a_target_without_its_unaligned_model_is_refused(target, tmp_path):
    attack = create_attack("interpolation")
    lonely = replace(target, base=None)
    assert attack.missing(target) is None
    assert "Name the folder of the unaligned model with `target.base`" in attack.missing(lonely)
    with pytest.raises(ConfigError, match="come with its unaligned model to go towards it"):
        next(attack.make(lonely, tmp_path))


def test_models_of_other_shapes_are_refused(target, tmp_path):
    other = write_model(tmp_path / "other", make_model(hidden=16))
    with pytest.raises(WiringError, match=r"to have equal shapes, but `model\.embed_tokens\.weight` is \(260, 32\)"):
        next(create_attack("interpolation").make(replace(target, base=other), tmp_path))


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ([1.5], "share between 0 and 1, but got 1.5"),
        ([-0.1], "share between 0 and 1, but got -0.1"),
        ([], "`factors` to hold at least one value, but got none"),
        ([0.5, 0.5], "`factors` to hold each value once"),
    ],
)
def test_bad_factors_are_refused(factors, message):
    with pytest.raises(ConfigError, match=message):
        create_attack("interpolation", {"factors": factors})


def test_the_target_stays_as_it_was(target, tmp_path):
    before = weights(target.folder)
    list(create_attack("interpolation", {"factors": [0.5]}).make(target, tmp_path))
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(target.folder).items())
    assert make_target(tmp_path / "again", read_model(target.folder, dtype=torch.float32)).fingerprint


def test_an_unaligned_model_that_is_the_target_is_refused(target, tmp_path):
    made = create_attack("interpolation", {"factors": [0.0, 0.5]}).make(replace(target, base=target.folder), tmp_path)
    assert next(made).facts == {"tensors_changed": 0}
    with pytest.raises(WiringError, match=r"`interpolation 0\.5` to change the model, but every "):
        next(made)
