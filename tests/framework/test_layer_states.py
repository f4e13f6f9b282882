from __future__ import annotations

import pytest
import torch
from torch import nn

from experiments.conformance.rmu import row_states
from framework.chat import EncodedExample
from framework.errors import WiringError
from framework.layer_states import check_layers, layer_states, numbered_layers, scaled_layer
from framework.module import FineTuneModule
from tests.conftest import make_model
from tests.tiny_runs import make_batch, make_lora
from tests.tiny_vision import make_image_text_model


def test_states_are_those_of_the_layers_called_one_by_one():
    model, batch = make_lora(make_model()).double(), make_batch(3)
    found = layer_states(model, batch, [1, 0], method="m")
    for i in range(3):
        length = int(batch.attention_mask[i].sum())
        expected = row_states(model, EncodedExample(tuple(batch.input_ids[i, :length].tolist()), 1))
        torch.testing.assert_close(found[0][i, :length], expected[1])
        torch.testing.assert_close(found[1][i, :length], expected[0])
    assert found[0].requires_grad
    assert not any(module._forward_hooks for module in model.modules())


def test_nothing_above_the_last_layer_is_computed():
    model, seen = make_model(), []
    model.model.layers[1].register_forward_hook(lambda *_: seen.append(1))
    layer_states(model, make_batch(2), [0], method="m")
    assert seen == []


def test_checkpointed_layers_give_the_same_gradient():
    gradients = []
    for checkpoint in (False, True):
        model = make_lora(make_model())
        FineTuneModule(model, learning_rate=1e-3, total_steps=1, gradient_checkpointing=checkpoint)
        model.train()
        (states,) = layer_states(model, make_batch(2), [0], method="m")
        states.square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(gradients[1][: len(gradients[0])], gradients[0])


def test_layers_are_found_by_number_and_experts_are_not():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(2, 2)])

    model = nn.Module()
    model.layers = nn.ModuleList([Layer(), Layer()])
    assert numbered_layers(model, method="m") == list(model.layers)
    with pytest.raises(WiringError, match="Method `m` needs numbered layers, but no module of the model is one"):
        numbered_layers(nn.Linear(2, 2), method="m")


def test_layers_outside_the_model_are_refused():
    check_layers((0, 1), depth=2, name="layers")
    with pytest.raises(WiringError, match=r"Expected `layers` to be from 0 to 1, but got 2\."):
        check_layers((0, 2), depth=2, name="layers")
    assert [scaled_layer(1.0, depth) for depth in (1, 2)] == [0, 1]


def test_layers_of_a_vision_tower_do_not_count():
    model = make_image_text_model()
    assert numbered_layers(model, method="m") == list(model.model.language_model.layers)
    adapted = make_lora(model)
    assert numbered_layers(adapted, method="m") == list(model.model.language_model.layers)
