"""Writers of the residual stream: found, silenced along a direction, in weights and in passing."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from experiments.attacks.residual_stream import (
    adding,
    find_layers,
    find_writers,
    last_logits,
    orthogonalise,
    pad_right,
    states_before,
    without_direction,
)
from experiments.contract.tiny import make_model
from framework.errors import WiringError

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [20, 21]]


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=260, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=1)
    model = GPT2LMHeadModel(config).eval()
    for name, parameter in model.named_parameters():  # biases of a fresh model are 0 and would hide a mistake
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model


def direction() -> torch.Tensor:
    r = torch.randn(32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return r / r.norm()


def largest_write(model, r):
    """Largest part along r of anything that a writer adds to the stream."""
    sizes = []
    hooks = [
        writer.module.register_forward_hook(lambda m, a, out: sizes.append(float((out.double() @ r).abs().max())))
        for writer in find_writers(model)
    ]
    with torch.no_grad():
        model(input_ids=torch.tensor([PROMPTS[1]]))
    for hook in hooks:
        hook.remove()
    return max(sizes)


@pytest.mark.parametrize("make", [make_model, gpt2])
def test_an_orthogonalised_model_writes_nothing_along_the_direction(make):
    model, r = make(), direction()
    assert largest_write(model, r) > 1e-2
    number = orthogonalise(model, r)
    assert number == len(find_writers(model)) == (5 if make is make_model else 6)
    assert largest_write(model, r) < 1e-5
    states = states_before(model, PROMPTS, positions=2, pad_id=0).double()
    assert float((states @ r).abs().max()) < 1e-5


@pytest.mark.parametrize("make", [make_model, gpt2])
def test_taking_it_out_in_passing_gives_the_same_states_and_leaves_the_weights(make):
    model, edited, r = make(), make(), direction()
    orthogonalise(edited, r)
    with without_direction(find_writers(model), r):
        passing = states_before(model, PROMPTS, positions=2, pad_id=0)
    assert torch.allclose(passing, states_before(edited, PROMPTS, positions=2, pad_id=0), atol=1e-5)
    assert largest_write(model, r) > 1e-2


def test_states_and_logits_are_those_of_each_prompt_alone():
    model = make_model()
    batched = states_before(model, PROMPTS, positions=2, pad_id=0)
    assert batched.shape == (3, 2, 2, 32)
    logits = last_logits(model, PROMPTS, pad_id=0, batch_size=2)
    with torch.no_grad():
        for row, ids in enumerate(PROMPTS):
            out = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
            assert torch.allclose(logits[row], out.logits[0, -1], atol=1e-5)
            for layer in range(2):
                assert torch.allclose(batched[row, :, layer], out.hidden_states[layer][0, -2:], atol=1e-5)


def test_adding_moves_the_stream_before_its_layer_only_inside_the_block():
    model, vector = make_model(), torch.ones(32)
    before = states_before(model, PROMPTS, positions=1, pad_id=0)
    with adding(find_layers(model)[1], vector):
        moved = last_logits(model, PROMPTS, pad_id=0)
        states = states_before(model, PROMPTS, positions=1, pad_id=0)
    assert torch.allclose(states[:, :, 0], before[:, :, 0])
    assert torch.allclose(states[:, :, 1], before[:, :, 1] + 1, atol=1e-5)
    assert not torch.allclose(moved, last_logits(model, PROMPTS, pad_id=0))


def test_padding_is_on_the_right():
    padded = pad_right([[3], [4, 5]], pad_id=9)
    assert padded.ids.tolist() == [[3, 9], [4, 5]]
    assert padded.mask.tolist() == [[1, 0], [1, 1]]
    assert padded.lengths.tolist() == [1, 2]


def test_models_without_layers_or_known_writers_are_refused():
    with pytest.raises(WiringError, match="to have numbered layers, but got none"):
        find_layers(nn.Linear(2, 2))
    model = make_model()
    attention = model.model.layers[1].self_attn
    attention.mixer = attention.o_proj
    del attention.o_proj
    with pytest.raises(WiringError, match=r"an attention output and an MLP output .* layer 1 has 1"):
        find_writers(model)
