"""Tiny random models of several families, sharp enough to say different things."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

SIZES = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}
SLIDING = ["sliding_attention", "full_attention"]
FAMILIES = ["llama", "qwen2", "qwen2-sliding", "gemma3"]


def build(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**SIZES))
    elif family == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**SIZES))
    elif family == "qwen2-sliding":
        config = Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=12, layer_types=SLIDING)
        model = Qwen2ForCausalLM(config)
    else:
        model = Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=12, layer_types=SLIDING))
    # Random weights of the default scale repeat one token for ever; larger ones vary.
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(4)
    return model.eval()


@pytest.fixture
def build_model():
    """Return the function from a family's name to its model."""
    return build


@pytest.fixture(params=FAMILIES)
def any_model(request) -> PreTrainedModel:
    return build(request.param)
