"""Circuit breakers derived again: layers called one after another on every row alone, in float64."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from experiments.conformance.grad_diff import compared, make_unlearning_case, prepared
from experiments.conformance.pact import ROWS
from experiments.conformance.rmu import row_states
from experiments.conformance_table import Deviation
from methods.circuit_breakers import CircuitBreakers, CircuitBreakersConfig

__all__ = ["deviations"]

PAPER = "arXiv:2406.04313 algorithm 1 (`c_s L_s + c_r L_r`)"
ALPHA, TOTAL = 10.0, 8


def deviations(folder: Path) -> Iterator[Deviation]:
    """Yield how far loss and gradient are off at three steps of the schedule, for two sets of layers."""
    made = make_unlearning_case(folder)
    for step, layers, retain in ((0, (1,), "stage"), (3, (0, 1), "stage"), (8, (0,), made.retain)):
        settings: dict[str, Any] = {"layers": layers, "retain": retain, "schedule_steps": TOTAL}
        method = CircuitBreakers(CircuitBreakersConfig(source=made.forget, alpha=ALPHA, **settings))
        prepared(made, method)
        kept = made.case.data.encoded[:ROWS] if retain == "stage" else made.beside(method._retain, step)
        model, start = made.case.model, made.case.start
        reroute, hold = [], []
        for row in made.beside(method._forget, step):
            ours, theirs = row_states(model, row), row_states(start, row)
            cosines = [
                (ours[i] * theirs[i]).sum(-1) / (ours[i].square().sum(-1) * theirs[i].square().sum(-1)).sqrt()
                for i in layers
            ]
            reroute.append(torch.stack([cosine.clamp_min(0.0).mean() for cosine in cosines]).mean())
        for row in kept:
            ours, theirs = row_states(model, row), row_states(start, row)
            off = [(one - other).square().sum(-1).sqrt().mean() for one, other in zip(ours, theirs, strict=True)]
            hold.append(torch.stack(off).mean())
        share = step / (2 * TOTAL)
        expected = ALPHA * (1 - share) * torch.stack(reroute).mean() + ALPHA * share * torch.stack(hold).mean()
        value, gradient = compared(made, method, expected, step=step)
        name = f"step {step} of {TOTAL}, layers {', '.join(map(str, layers))}"
        yield Deviation(f"loss, {name}", PAPER, value, 1e-6, ROWS)
        yield Deviation(f"its gradient, {name}", PAPER, gradient, 1e-8, ROWS)
