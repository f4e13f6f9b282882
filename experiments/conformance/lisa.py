"""Lisa derived again in float64: a clock wound back at every switch, and what each state kept when it was left."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from datamodules.finetune import FineTuneDataModule
from experiments.conformance_table import Deviation
from experiments.contract.tiny import make_tokenizer, task_examples
from framework.chat import ChatEncoder
from methods.lisa import LisaConfig, block_start, half_square_distance, is_alignment_step, rows_of_steps

__all__ = ["deviations", "states", "trajectory"]

PAPER = "arXiv:2405.18641 algorithm 1; code git-disl/Lisa@2e9c24c"
TURNS = ((1, 1), (2, 3), (3, 2), (1, 9), (5, 4))
TOTAL = 41
RHO, RATE, SIZE = 0.7, 0.05, 12
BOUND = 1e-12


def states(alignment_steps: int, task_steps: int) -> list[bool]:
    """Return whether each step is one on alignment data, by a clock that is wound back at every switch."""
    found, is_alignment, clock = [], True, 0
    for _ in range(TOTAL):
        if clock == (alignment_steps if is_alignment else task_steps):
            is_alignment, clock = not is_alignment, 0
        found.append(is_alignment)
        clock += 1
    return found


def trajectory(alignment_steps: int, task_steps: int, *, skipped: float) -> list[torch.Tensor]:
    """Return the weights after every step of plain gradient descent on two quadratics, the gradient written out.

    Each state holds the weights near those that the other state kept when it was left, the start before that.
    """
    w = torch.linspace(-1, 1, SIZE, dtype=torch.float64)
    kept = {True: w.clone(), False: w.clone()}
    was, path = True, []
    for step, is_alignment in enumerate(states(alignment_steps, task_steps)):
        if is_alignment != was:
            kept[was], was = w.clone(), is_alignment
        gradient = _task_gradient(w, is_alignment)
        if step >= skipped * TOTAL:
            gradient = gradient + RHO * (w - kept[not is_alignment])
        w = w - RATE * gradient
        path.append(w)
    return path


def deviations(folder: Path) -> Iterator[Deviation]:
    """Yield differences in states, weights along the way, and mismatches in the data each state trains on."""
    wrong, worst, cases = 0, 0.0, 0
    for alignment_steps, task_steps in TURNS:
        turns = {"alignment_steps": alignment_steps, "task_steps": task_steps}
        wrong += sum(is_alignment_step(i, **turns) != s for i, s in enumerate(states(alignment_steps, task_steps)))
        for skipped in (0.0, 0.1):
            ours = _ours(alignment_steps, task_steps, skipped=skipped)
            theirs = trajectory(alignment_steps, task_steps, skipped=skipped)
            worst = max(worst, max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)))
            cases += TOTAL
    yield Deviation("state of every step", PAPER, wrong, 0, len(TURNS) * TOTAL)
    yield Deviation("weights after every step, proximal term included", PAPER, worst, BOUND, cases)
    yield Deviation("rows of another state in a step", PAPER, _wrong_rows(folder), 0, len(TURNS) * TOTAL)


def _task_gradient(w: torch.Tensor, is_alignment: bool) -> torch.Tensor:
    """Gradient of 1/2 ||w - target||^2, another target for each state."""
    return w - (2.0 if is_alignment else -3.0) * torch.linspace(0, 1, SIZE, dtype=torch.float64)


def _ours(alignment_steps: int, task_steps: int, *, skipped: float) -> list[torch.Tensor]:
    """The same descent with the project's own functions and autograd."""
    turns = {"alignment_steps": alignment_steps, "task_steps": task_steps}
    w = torch.linspace(-1, 1, SIZE, dtype=torch.float64).requires_grad_()
    anchor, anchored_at, path = {"w": w.detach().clone()}, 0, []
    for step in range(TOTAL):
        if (start := block_start(step, **turns)) != anchored_at:
            anchor, anchored_at = {"w": w.detach().clone()}, start
        gradient = _task_gradient(w.detach(), is_alignment_step(step, **turns))
        if step >= skipped * TOTAL:
            (proximal,) = torch.autograd.grad(RHO * half_square_distance({"w": w}, anchor), w)
            gradient = gradient + proximal
        with torch.no_grad():
            w -= RATE * gradient
        path.append(w.detach().clone())
    return path


def _wrong_rows(folder: Path) -> int:
    """Return how many rows of another state are laid out, and how unevenly the passes of a state go round."""
    path = folder / "refusals.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"harm {i}", "response": "No."}) + "\n" for i in range(5)))
    data = FineTuneDataModule(ChatEncoder(make_tokenizer()), batch_size=4, total_steps=TOTAL, max_length=200)
    data.add_source("task", task_examples(7))
    data.add_source("lisa", data.find_examples("safety", str(path)))
    is_safety = [row.kind == "safety" for row in data.rows]
    sides = [[i for i, safety in enumerate(is_safety) if safety is side] for side in (True, False)]
    return sum(_mismatches(sides, is_safety, *turns) for turns in TURNS)


def _mismatches(
    sides: Sequence[Sequence[int]], is_safety: Sequence[bool], alignment_steps: int, task_steps: int
) -> int:
    config = LisaConfig(alignment_steps=alignment_steps, task_steps=task_steps)
    rows = rows_of_steps(
        *sides,
        alignment_steps=config.alignment_steps,
        task_steps=config.task_steps,
        total_steps=TOTAL,
        batch_size=4,
        seed=3,
    )
    expected = [state for state in states(alignment_steps, task_steps) for _ in range(4)]
    wrong = sum(is_safety[row] != state for row, state in zip(rows, expected, strict=True))
    for side in sides:
        counts = [rows.count(row) for row in side]
        wrong += max(counts) - min(counts) > 1
    return wrong
