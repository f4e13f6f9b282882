"""RMU derived again: layers called one after another on every row alone, in float64."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from experiments.conformance.grad_diff import compared, make_unlearning_case, prepared
from experiments.conformance.pact import ROWS
from experiments.conformance_table import Deviation
from framework.chat import EncodedExample
from methods.rmu import RMU, RMUConfig

__all__ = ["deviations", "row_states"]

PAPER = "arXiv:2403.03218 §4 (`L_forget + alpha L_retain`); locuslab/open-unlearning rmu.py"
SEED, C, ALPHA = 3, 2.5, 4.0


def row_states(model: Any, row: EncodedExample) -> list[torch.Tensor]:
    """Return the states after every layer for a row without padding, ``(seq, hidden)`` each.

    Args:
        model: a llama, with LoRA or without.
        row: its ids.
    """
    inner = (model.base_model.model if hasattr(model, "peft_config") else model).model
    ids = torch.tensor([row.input_ids])
    state, places = inner.embed_tokens(ids), torch.arange(ids.shape[1])[None]
    turns = inner.rotary_emb(state, places)
    states = []
    for layer in inner.layers:
        state = layer(state, attention_mask=None, position_ids=places, position_embeddings=turns)
        state = state[0] if isinstance(state, tuple) else state
        states.append(state[0])
    return states


def deviations(folder: Path) -> Iterator[Deviation]:
    """Yield how far loss and gradient are off after each layer, the states of retain rows cached and live."""
    made = make_unlearning_case(folder)
    model, start = made.case.model, made.case.start
    drawn = torch.rand(32, generator=torch.Generator().manual_seed(SEED), dtype=torch.float64)
    target = C * drawn / drawn.square().sum().sqrt()
    for layer, reference, retain, bound in (
        (0, "live", "stage", 1e-9),
        (1, "live", made.retain, 1e-9),
        (1, "cached", "stage", 1e-5),
    ):
        settings: dict[str, Any] = {"layer": layer, "reference": reference, "retain": retain}
        method = RMU(RMUConfig(source=made.forget, c=C, alpha=ALPHA, seed=SEED, **settings))
        prepared(made, method)
        if method._references is not None:
            method._references.attach(made.case.data.encoded)
        forget = _row_mean(model, made.beside(method._forget, 0), layer, target)
        kept = made.case.data.encoded[:ROWS] if retain == "stage" else made.beside(method._retain, 0)
        expected = forget + ALPHA * _row_mean(model, kept, layer, start)
        value, gradient = compared(made, method, expected)
        name = f"layer {layer}, {reference}, {'stage' if retain == 'stage' else 'own'} rows retained"
        yield Deviation(f"loss, {name}", PAPER, value, max(bound, 1e-6), ROWS)
        yield Deviation(f"its gradient, {name}", PAPER, gradient, bound, ROWS)


def _row_mean(model: Any, rows: Sequence[EncodedExample], layer: int, target: Any) -> torch.Tensor:
    """Return the mean over rows of the mean over reply tokens of ``||h - target||^2 / d``; a model gives its states."""
    means = []
    for row in rows:
        at = slice(row.num_prompt_tokens, None)
        goal = target
        if not isinstance(target, torch.Tensor):
            with torch.no_grad():
                goal = row_states(target, row)[layer][at]
        off = row_states(model, row)[layer][at] - goal
        means.append((off * off).sum(-1).mean() / off.shape[-1])
    return torch.stack(means).mean()
