"""NPO derived again: the ratio of whole replies' probabilities under two models, every row alone, in float64."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from experiments.conformance.grad_diff import compared, make_unlearning_case, prepared, reply_losses, task_loss
from experiments.conformance.pact import ROWS
from experiments.conformance_table import Deviation
from methods.npo import NPO, NPOConfig

__all__ = ["deviations"]

PAPER = "arXiv:2404.05868 eq. 3 (`- 2 / beta log sigmoid(- beta log(p / p_start))`)"


def deviations(folder: Path) -> Iterator[Deviation]:
    """Yield how far loss and gradient are off, the reference cached and live, at two strengths."""
    made = make_unlearning_case(folder)
    for reference in ("cached", "live"):
        for beta in (0.1, 2.0):
            method = NPO(NPOConfig(source=made.forget, beta=beta, reference=reference, alpha=0.8))
            prepared(made, method)
            rows = made.beside(method._forget, 0)
            ours = [-loss.sum() for loss in reply_losses(made.case.model, rows)]
            with torch.no_grad():
                theirs = [-loss.sum() for loss in reply_losses(made.case.start, rows)]
            ratios = torch.stack(ours) - torch.stack(theirs)
            # log sigmoid(-z) is minus the logarithm of 1 + e^z.
            forget = (2 / beta) * torch.log1p((beta * ratios).exp()).mean()
            value, gradient = compared(made, method, 0.8 * task_loss(made.case) + forget)
            name = f"{reference}, beta {beta:g}"
            yield Deviation(f"loss, {name}", PAPER, value, 1e-5, ROWS)
            yield Deviation(f"its gradient, {name}", PAPER, gradient, 1e-5, ROWS)
