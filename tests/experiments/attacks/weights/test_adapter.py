"""Tampering with an adapter: what each operation leaves, against the arithmetic done by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experiments.attacks.interface import ModelTarget
from experiments.attacks.registry import create_attack
from experiments.contract.tiny import make_model
from framework.errors import ConfigError, ModelError
from framework.files import read_json, write_json
from framework.models import merge_adapter, save_adapter
from framework.parameters import lora_pairs
from tests.experiments.attacks.tiny_targets import make_target, same_bits, weights, write_model
from tests.tiny_runs import make_lora

CHANGED = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("adapter")


@pytest.fixture(scope="module")
def target(place) -> ModelTarget:
    wrapped = make_lora(make_model(), seed=1)
    save_adapter(wrapped, place / "own")
    other = make_lora(make_model(), seed=2)
    save_adapter(other, place / "other")
    made = make_target(place / "target", merge_adapter(wrapped).eval())
    return replace(made, adapter=place / "own", before_adapter=write_model(place / "before"))


def made_by(target, folder, **settings):
    """Setting to the changed weight of every model."""
    found = {}
    for made in create_attack("adapter", settings).make(target, folder):
        found[tuple(made.setting.values())] = weights(made.folder)[CHANGED]
    return found


def update_of(seed):
    pair = lora_pairs(make_lora(make_model(), seed=seed))[CHANGED.removesuffix(".weight")]
    return (pair.scale * pair.B @ pair.A).detach()


def test_every_operation_does_its_arithmetic(target, place, tmp_path):
    operations = ["dropped", "scaled", "swapped", "joined", "merged"]
    found = made_by(target, tmp_path, operations=operations, factors=[-1.0, 2.0], other=str(place / "other"))
    before, own, other = weights(target.before_adapter)[CHANGED], update_of(1), update_of(2)
    expected = {
        ("dropped",): before,
        ("scaled", -1.0): before - own,
        ("scaled", 2.0): before + 2 * own,
        ("swapped",): before + other,
        ("joined",): before + own + other,
        ("merged",): (before + own).bfloat16().float(),
    }
    assert set(found) == set(expected)
    for key, weight in expected.items():
        tolerance = 1e-2 * float(weight.abs().max()) if key == ("merged",) else 1e-6
        assert torch.allclose(found[key], weight, atol=tolerance), key
    assert torch.equal(found["merged",].bfloat16().float(), found["merged",])
    assert list(tmp_path.iterdir()) == []


def test_dropped_is_the_model_before_and_factor_one_the_target(target, tmp_path):
    attack = create_attack("adapter", {"operations": ["dropped", "scaled"], "factors": [1.0]})
    assert attack.num_models == 2
    dropped, scaled = attack.make(target, tmp_path), None
    assert next(dropped).folder == target.before_adapter
    scaled = next(dropped)
    assert same_bits(scaled.folder, target.folder)
    dropped.close()


def test_a_target_whose_adapter_is_not_apart_is_refused(target, tmp_path):
    attack = create_attack("adapter")
    merged = replace(target, adapter=None, before_adapter=None)
    assert attack.missing(target) is None
    assert "no `target.adapter` and no `target.before_adapter`" in attack.missing(merged)
    with pytest.raises(ConfigError, match="come with its adapter apart"):
        next(attack.make(merged, tmp_path))


def test_folders_without_a_lora_adapter_are_refused(target, place, tmp_path):
    attack = create_attack("adapter", {"operations": ["merged"]})
    with pytest.raises(ModelError, match=r"hold adapter_config\.json, but got none"):
        next(attack.make(replace(target, adapter=tmp_path), tmp_path))
    odd = tmp_path / "odd"
    odd.mkdir()
    write_json(odd / "adapter_config.json", read_json(place / "own" / "adapter_config.json") | {"peft_type": "IA3"})
    with pytest.raises(ModelError, match="hold a LoRA adapter, but got 'IA3'"):
        next(attack.make(replace(target, adapter=odd), tmp_path))
    write_json(odd / "adapter_config.json", read_json(place / "own" / "adapter_config.json"))
    with pytest.raises(ModelError, match="hold a complete adapter for this model"):
        next(attack.make(replace(target, adapter=odd), tmp_path))


def test_an_adapter_without_effect_is_refused(target, tmp_path):
    save_adapter(make_lora(make_model(), warm=False), tmp_path / "cold")
    attack = create_attack("adapter", {"operations": ["merged"]})
    with pytest.raises(ModelError, match="to change the model, but its update is zero"):
        next(attack.make(replace(target, adapter=tmp_path / "cold"), tmp_path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"factors": [3.0]}, "a number from -2 to 2, but got 3.0"),
        ({"operations": []}, "`operations` to hold at least one value"),
        ({"operations": ["scaled"], "factors": []}, "`factors` to hold at least one value"),
        ({"operations": ["swapped"]}, "`other` to name another adapter for swapped, but got None"),
        ({"operations": ["tuned"]}, "one of dropped, scaled, swapped, joined, merged, but got 'tuned'"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        create_attack("adapter", settings)


def test_a_model_and_an_adapter_that_do_not_make_the_target_are_refused(target, place, tmp_path):
    attack = create_attack("adapter", {"operations": ["dropped"]})
    with pytest.raises(ModelError, match=r"with `target\.adapter` to make the target, but got other numbers in `model"):
        next(attack.make(replace(target, adapter=place / "other"), tmp_path))
