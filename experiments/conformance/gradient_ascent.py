"""Gradient ascent derived again: every row alone, through whole logits, in float64."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from experiments.conformance.grad_diff import compared, make_unlearning_case, prepared, reply_losses, task_loss
from experiments.conformance.pact import ROWS
from experiments.conformance_table import Deviation
from methods.gradient_ascent import GradientAscent, GradientAscentConfig

__all__ = ["deviations"]

PAPER = "arXiv:2210.01504 eq. 1 (`- L(forget)`)"
OURS = "the card's formula: `- min(nll, bound)`, mixed by `weight`"
BOUND = 5.6


def deviations(folder: Path) -> Iterator[Deviation]:
    """Yield how far loss and gradient are off, as published and bounded and mixed with the task."""
    made = make_unlearning_case(folder)
    for name, source, settings in (
        ("as published", PAPER, {}),
        ("bounded and mixed", OURS, {"bound": BOUND, "weight": 0.4, "task_weight": 0.3}),
    ):
        method = GradientAscent(GradientAscentConfig(source=made.forget, **settings))  # type: ignore[arg-type]
        prepared(made, method)
        losses = reply_losses(made.case.model, made.beside(method._forget, 0))
        if not settings:
            expected = -sum((loss.mean() for loss in losses), torch.zeros(())) / len(losses)
        else:
            kept = [torch.minimum(loss, torch.full_like(loss, BOUND)).mean() for loss in losses]
            task = task_loss(made.case)
            expected = 0.6 * task + 0.4 * (0.3 * task - torch.stack(kept).mean())
        value, gradient = compared(made, method, expected)
        yield Deviation(f"loss, {name}", source, value, 1e-5, ROWS)
        yield Deviation(f"its gradient, {name}", source, gradient, 1e-5, ROWS)
