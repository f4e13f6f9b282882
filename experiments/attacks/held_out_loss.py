"""The loss of rows that an attacker never showed the model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from experiments.attacks.interface import ModelTarget
from experiments.attacks.model_folders import load_exact
from framework.batch import collate
from framework.chat import ChatEncoder
from framework.examples import Example
from framework.models import choose_device
from framework.module import forward_reply_tokens

__all__ = ["MAX_LENGTH", "mean_loss"]

MAX_LENGTH = 512
"""Tokens of a row in training and measuring; what is longer is cut."""


@torch.no_grad()
def mean_loss(folder: Path, rows: Sequence[Example], target: ModelTarget, *, batch_size: int = 8) -> float:
    """Return the mean negative log-likelihood a reply token of rows, in nats.

    Args:
        folder: the model.
        rows: at least one.
        target: says where and with which system message.
        batch_size: rows of one forward pass.
    """
    loaded = load_exact(folder)
    device = choose_device(target.accelerator)
    model: Any = loaded.model.to(device)  # type: ignore[arg-type]
    encoder = ChatEncoder(loaded.tokenizer, system=target.system)
    pad_id: Any = loaded.tokenizer.pad_token_id
    encoded = [encoder.encode_example(row, max_length=MAX_LENGTH) for row in rows]
    total, tokens = 0.0, 0
    for start in range(0, len(encoded), batch_size):
        part = encoded[start : start + batch_size]
        batch = collate(part, example_ids=range(len(part)), pad_id=pad_id, step_reply_tokens=1)
        nll = forward_reply_tokens(model, batch.to(device)).nll
        total, tokens = total + float(nll.double().sum()), tokens + nll.numel()
    return total / tokens
