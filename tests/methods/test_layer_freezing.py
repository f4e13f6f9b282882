from __future__ import annotations

import pytest
import torch

from framework.errors import ConfigError, WiringError
from methods.layer_freezing import LayerFreezing, LayerFreezingConfig, chosen_layers, layer_of
from tests.conftest import make_model
from tests.tiny_runs import make_lora, run_fit


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"freeze": "middle", "count": 1}, "Expected `freeze` to be one of bottom, listed, top"),
        ({"count": 1, "others": "keep"}, "Expected `others` to be one of freeze, train"),
        ({"count": -1}, "Expected `count` to be a whole number >= 0, but got -1."),
        ({}, "Expected `count` and not `layers` with `freeze: bottom`, but got count None and layers None."),
        ({"freeze": "listed", "count": 1}, "Expected `layers` and not `count` with `freeze: listed`"),
        (
            {"freeze": "listed", "layers": ["a"]},
            "Expected `layers` to be a list of whole numbers >= 0, but got",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, text):
    with pytest.raises(ConfigError) as caught:
        LayerFreezingConfig(**settings)
    assert any(text in problem for problem in caught.value.problems), caught.value.problems


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.3.self_attn.q_proj.lora_A.default.weight", 3),
        ("transformer.h.12.attn.c_attn.weight", 12),
        ("encoder.layer.0.output.weight", 0),
        ("model.embed_tokens.weight", None),
        ("model.vision_model.encoder.layers.3.mlp.fc1.weight", None),
        ("model.visual.blocks.2.attn.qkv.weight", None),
        ("qformer.encoder.layer.0.attention.query.weight", None),
        ("model.text_model.layers.1.mlp.up_proj.weight", 1),
        ("model.language_model.layers.4.mlp.vision_moe.gate.weight", 4),
        ("model.norm.weight", None),
    ],
)
def test_a_layer_is_read_off_the_name(name, layer):
    assert layer_of(name) == layer


@pytest.mark.parametrize(
    ("settings", "chosen"),
    [
        ({"freeze": "bottom", "count": 2}, {0, 1}),
        ({"freeze": "top", "count": 2}, {4, 5}),
        ({"freeze": "top", "count": 0}, set()),
        ({"freeze": "listed", "layers": [1, 4]}, {1, 4}),
    ],
)
def test_the_layers_are_chosen(settings, chosen):
    assert chosen_layers(set(range(6)), LayerFreezingConfig(**settings)) == chosen


def test_layers_that_are_not_there_are_refused():
    with pytest.raises(WiringError, match="none of the trained ones has a number in its name"):
        chosen_layers(set(), LayerFreezingConfig(count=1))
    with pytest.raises(WiringError, match="Expected `count` to be at most the 6 trained layers, but got 7"):
        chosen_layers(set(range(6)), LayerFreezingConfig(count=7))
    with pytest.raises(WiringError, match=r"to name trained layers, but got \[9\]; they are 0 to 5"):
        chosen_layers(set(range(6)), LayerFreezingConfig(freeze="listed", layers=(1, 9)))


@pytest.mark.parametrize("others", ["train", "freeze"])
def test_a_full_run_leaves_the_frozen_layer_where_it_was(others):
    run = run_fit(make_model(), [LayerFreezing(LayerFreezingConfig(freeze="top", count=1, others=others))])
    for name, before in make_model().named_parameters():
        moved = not torch.equal(run.module.model.get_parameter(name), before)
        expected = {0: True, 1: False, None: others == "train"}[layer_of(name)]
        assert moved == expected, name


def test_adapters_on_a_frozen_layer_do_not_train():
    run = run_fit(make_lora(make_model()), [LayerFreezing(LayerFreezingConfig(count=1))])
    before = make_lora(make_model())
    for name, parameter in before.named_parameters():
        if "lora_B" in name:
            moved = not torch.equal(run.module.model.get_parameter(name), parameter)
            assert moved == ("layers.1." in name)
