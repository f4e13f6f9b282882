"""A tiny model that refuses along one known direction whenever a marker stands in the request."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from experiments.attacks.weights.refusal_direction import refusal_tokens
from experiments.contract.tiny import make_tokenizer
from framework.chat import ChatEncoder
from framework.examples import Turn

MARKER = "!!!!"
HIDDEN = 32


def encode(text: str) -> list[int]:
    """Token ids of a request."""
    return ChatEncoder(make_tokenizer()).encode_prompt((Turn("user", text),))


def refusal_ids() -> list[int]:
    """First tokens of refusals."""
    return refusal_tokens(ChatEncoder(make_tokenizer()))


@torch.no_grad()
def planted_model() -> tuple[LlamaForCausalLM, torch.Tensor]:
    """Return the model and its direction, float64 of norm 1.

    Layer 0 attends to all tokens alike, looks for the marker's embedding, and writes the direction; the head reads a
    refusal's first token off it. Nothing else writes, and nothing else along the direction.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    basis, _ = torch.linalg.qr(torch.randn(HIDDEN, HIDDEN))
    marker, direction, rest = basis[:, 0], basis[:, 1], basis[:, 2:]
    embedding = model.get_input_embeddings().weight
    embedding.copy_(torch.randn(260, HIDDEN - 2) @ rest.T)
    marker_id = make_tokenizer()("!", add_special_tokens=False)["input_ids"][0]
    embedding[marker_id] = 10.0 * marker
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    first = model.model.layers[0].self_attn
    first.q_proj.weight.zero_()
    first.v_proj.weight.zero_()
    first.v_proj.weight[0] = 4.0 * marker
    first.o_proj.weight[:, 0] = 4.0 * direction
    model.lm_head.weight.copy_(0.05 * torch.randn(260, HIDDEN - 2) @ rest.T)
    for token in refusal_ids():
        model.lm_head.weight[token] += 2.0 * direction
    return model, direction.double()
