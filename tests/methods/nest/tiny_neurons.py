"""Tiny models whose neurons tell two kinds of prompts apart, and NeST prepared on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, Phi3Config, Phi3ForCausalLM

from datamodules.finetune import FineTuneDataModule
from experiments.contract.tiny import make_model, make_tokenizer, task_examples
from framework.chat import ChatEncoder
from framework.composition import prepare_methods
from framework.files import ArtifactStore
from framework.method import MethodStore
from methods.nest import NeST, NeSTConfig

SETTINGS: dict[str, Any] = {"held_out": 0.5, "threshold": 1.5, "min_rows": 4}
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def write_prompts(folder: Path, *, count: int = 30) -> dict[str, str]:
    """Two sets of prompts that differ in their letters."""
    texts = {"safety": "XZ", "benign": "ab"}
    for name, letters in texts.items():
        rows = [{"prompt": f"{letters[i % 2] * 12} ask {i}", "response": "Reply."} for i in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {name: str(folder / f"{name}.jsonl") for name in texts}


def make_data(*, steps: int = 3) -> FineTuneDataModule:
    data = FineTuneDataModule(
        ChatEncoder(make_tokenizer()), batch_size=4, total_steps=steps, max_length=512, overflow="truncate_left"
    )
    data.add_source("task", task_examples(8))
    return data


def make_store(folder: Path, model: nn.Module) -> MethodStore:
    model.save_pretrained(folder / "start")
    return MethodStore(ArtifactStore(folder / "store"), models={"start": folder / "start"})


def prepared(folder: Path, model: nn.Module, **settings: Any) -> NeST:
    """NeST after ``prepare`` on a model that is written to ``folder`` first, without its adapter."""
    method = NeST(NeSTConfig(**{**SETTINGS, **write_prompts(folder), **settings}))
    store = make_store(folder, make_model() if hasattr(model, "peft_config") else model)
    prepare_methods([method], model, make_data(), store)
    return method


def move_vectors(model: nn.Module, *, size: float = 0.3, seed: int = 0) -> None:
    """Give the shared vectors random values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for vector in model.nest_vectors.values():
            vector.copy_(size * torch.randn(vector.shape, generator=generator))


def logits(model: nn.Module) -> torch.Tensor:
    ids = torch.arange(4, 24).reshape(2, 10)
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits.double()


def make_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=260, n_positions=512, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1)
    return GPT2LMHeadModel(config).eval()


def make_neox() -> GPTNeoXForCausalLM:
    torch.manual_seed(0)
    return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=260, bos_token_id=1, eos_token_id=1, **SIZES)).eval()


def make_phi3() -> Phi3ForCausalLM:
    torch.manual_seed(0)
    config = Phi3Config(vocab_size=260, pad_token_id=0, bos_token_id=1, eos_token_id=1, num_key_value_heads=2, **SIZES)
    return Phi3ForCausalLM(config).eval()
