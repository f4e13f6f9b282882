"""Booster derived again in float64: the three gradients of a step, each by itself, at weights moved for good."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from experiments.conformance.vaccine import first_rows, row_nll, trainable
from experiments.conformance_table import Deviation
from experiments.contract.fitting import FitSpec, build_data, build_model, fit
from experiments.contract.outcome import relative_difference
from framework.chat import EncodedExample
from framework.files import ArtifactStore
from framework.method import MethodStore
from methods.booster import Booster, BoosterConfig

__all__ = ["booster_gradient", "deviations"]

PAPER = "arXiv:2409.01586 eq. 3 and algorithm 1; code git-disl/Booster (BoosterAlignmentTrainer)"
SETTINGS = ((5.0, 0.1), (1.0, 0.5), (20.0, 0.01))
"""Strength and length of the harmful step."""
CUTS = (8, 2, 1)
PAIRS = 6
BOUND = 1e-4
"""The method subtracts two gradients of nearby weights in float32."""


def booster_gradient(
    model: nn.Module, rows: Sequence[EncodedExample], harmful: Sequence[EncodedExample], *, weight: float, alpha: float
) -> dict[str, torch.Tensor]:
    """Return ``grad f(w) + weight (grad h(w) - grad h(w'))`` with ``w' = w - alpha grad h / ||grad h||``.

    Args:
        model: float64, at w.
        rows: of the step.
        harmful: of the step.
        weight: lambda.
        alpha: length of the harmful step.
    """
    task, harm = _gradient(model, rows), _gradient(model, harmful)
    length = torch.cat([gradient.flatten() for gradient in harm.values()]).norm()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in trainable(other).items():
            parameter.sub_(alpha * harm[name] / length)
    after = _gradient(other, harmful)
    return {name: task[name] + weight * (harm[name] - after[name]) for name in task}


def deviations(folder: Path) -> Iterator[Deviation]:
    """Yield the relative difference of the first step's gradient, for all settings and ways to cut the step."""
    path = folder / "harmful.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"harm {i}", "response": "Sure." + "!" * i}) + "\n" for i in range(PAIRS))
    )
    store = MethodStore(ArtifactStore(folder / "store"))
    data = build_data(FitSpec())
    harmful = [data.encoder.encode_example(pair) for pair in data.find_examples("harmful", str(path))]
    worst = 0.0
    for weight, alpha in SETTINGS:
        expected: dict[str, torch.Tensor] = {}
        for size in CUTS:
            method = Booster(BoosterConfig(weight=weight, alpha=alpha, harmful=str(path), batch_size=PAIRS))
            fitted = fit(FitSpec(steps=1, micro_batch_size=size), [method], store)
            if not expected:
                model = build_model(FitSpec()).double()
                expected = booster_gradient(model, first_rows(fitted), harmful, weight=weight, alpha=alpha)
            worst = max(worst, relative_difference(fitted.recorder.gradient, expected))
    cases = len(SETTINGS) * len(CUTS)
    yield Deviation("gradient of a step, whole and in micro-batches, relative", PAPER, worst, BOUND, cases)


def _gradient(model: nn.Module, rows: Sequence[EncodedExample]) -> dict[str, torch.Tensor]:
    """Return the gradient of the mean loss over the reply tokens of all rows, by plain name."""
    parameters = trainable(model)
    loss = torch.stack([row_nll(model, row) for row in rows]).sum() / sum(row.num_reply_tokens for row in rows)
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
