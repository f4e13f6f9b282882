"""Vaccine derived again in float64: a zero added to every attention output, row by row, and its gradient."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from experiments.conformance_table import Deviation
from experiments.contract.fitting import FitSpec, Fitted, build_model, fit
from experiments.contract.outcome import relative_difference
from framework.chat import EncodedExample
from framework.files import ArtifactStore
from framework.method import MethodStore
from framework.parameters import clean_name
from methods.vaccine import Vaccine, VaccineConfig

__all__ = ["deviations", "first_rows", "row_nll", "trainable", "vaccine_gradient"]

PAPER = "arXiv:2402.01109 algorithm 1; code git-disl/Lisa@2e9c24c (VaccineTrainer)"
RHOS = (0.5, 2.0, 5.0)
CUTS = (8, 2, 1)
"""Rows of one micro-batch."""
BOUND = 1e-5
"""The method computes in float32."""


def row_nll(model: nn.Module, row: EncodedExample) -> torch.Tensor:
    """Return the summed negative log-likelihood of a row's reply, from all logits of the model."""
    ids = torch.tensor([row.input_ids])
    logs = model(ids).logits[0].log_softmax(dim=-1)
    reply = range(row.num_prompt_tokens, len(row.input_ids))
    return -torch.stack([logs[place - 1, row.input_ids[place]] for place in reply]).sum()


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return what is trained, by plain name."""
    return {clean_name(name): p for name, p in model.named_parameters() if p.requires_grad}


def first_rows(fitted: Fitted) -> list[EncodedExample]:
    """Return the rows of the first optimizer step."""
    return [fitted.data.encoded[row] for step, rows in fitted.recorder.served if step == 0 for row in rows]


def vaccine_gradient(model: nn.Module, rows: Sequence[EncodedExample], *, rho: float) -> dict[str, torch.Tensor]:
    """Return the gradient of the loss of a step with every attention output shifted, by plain name.

    Args:
        model: float64.
        rows: of the whole step.
        rho: norm of the shifts.
    """
    blocks = [m for name, m in model.named_modules() if name.endswith("self_attn")]
    tokens = sum(row.num_reply_tokens for row in rows)
    plain = [_with_shifts(model, blocks, row, None) for row in rows]
    slopes = [torch.autograd.grad(nll / tokens, zeros) for nll, zeros in plain]
    length = torch.cat([slope.flatten() for row in slopes for slope in row]).norm()
    shifted = [
        _with_shifts(model, blocks, row, [rho * slope / length for slope in own])[0]
        for row, own in zip(rows, slopes, strict=True)
    ]
    parameters = trainable(model)
    found = torch.autograd.grad(torch.stack(shifted).sum() / tokens, list(parameters.values()))
    return dict(zip(parameters, found, strict=True))


def deviations(folder: Path) -> Iterator[Deviation]:
    """Yield the relative difference of the first step's gradient, for every norm and every way to cut the step."""
    store = MethodStore(ArtifactStore(folder / "store"))
    worst = 0.0
    for rho in RHOS:
        expected: Mapping[str, torch.Tensor] = {}
        for size in CUTS:
            fitted = fit(FitSpec(steps=1, micro_batch_size=size), [Vaccine(VaccineConfig(rho=rho))], store)
            if not expected:
                expected = vaccine_gradient(build_model(FitSpec()).double(), first_rows(fitted), rho=rho)
            worst = max(worst, relative_difference(fitted.recorder.gradient, expected))
    yield Deviation(
        "gradient of a step, whole and in micro-batches, relative", PAPER, worst, BOUND, len(RHOS) * len(CUTS)
    )


def _with_shifts(
    model: nn.Module, blocks: Sequence[nn.Module], row: EncodedExample, shifts: Sequence[torch.Tensor] | None
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return a row's loss with something added to every block's output, zeros when None, and what was added."""
    config: Any = model.config
    shape = (1, len(row.input_ids), config.hidden_size)
    added = list(shifts) if shifts is not None else [torch.zeros(shape).double().requires_grad_() for _ in blocks]

    def adding(number: int) -> Any:
        return lambda module, args, output: (output[0] + added[number], *output[1:])

    handles = [block.register_forward_hook(adding(number)) for number, block in enumerate(blocks)]
    try:
        return row_nll(model, row), added
    finally:
        for handle in handles:
            handle.remove()
