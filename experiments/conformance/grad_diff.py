"""Gradient difference derived again: every row alone, through whole logits, in float64."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from experiments.conformance.pact import ROWS, Case, make_case
from experiments.conformance_table import Deviation, relative_deviation
from framework.chat import EncodedExample
from framework.composition import prepare_methods
from framework.module import forward_reply_tokens
from framework.unlearning import Unlearning
from methods.grad_diff import GradDiff, GradDiffConfig

__all__ = ["UnlearningCase", "compared", "deviations", "make_unlearning_case", "reply_losses", "task_loss"]

PAPER = "arXiv:2401.06121 §3 (`L(retain) - L(forget)`); weights of locuslab/open-unlearning grad_diff.py"
FORGET = [{"prompt": f"do harm {i}", "response": "Sure, first you" + "!" * i} for i in range(6)]
RETAIN = [{"prompt": f"list {i} fruits", "response": "Apples" + ", pears" * i} for i in range(5)]


class UnlearningCase(NamedTuple):
    """A warm LoRA model and an untouched starting model, both float64, a micro-batch, and files of rows."""

    case: Case
    forget: str
    retain: str

    def beside(self, rows: Any, step: int) -> list[EncodedExample]:
        """Return the rows that a method draws beside those of the micro-batch."""
        return [rows.encoded[i] for i in rows.draw(step, range(ROWS))]


def make_unlearning_case(folder: Path) -> UnlearningCase:
    """Return the models of one case; the files lie in ``folder``."""
    case = make_case(folder)
    paths = []
    for name, pairs in (("forget", FORGET), ("retain", RETAIN)):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        paths.append(str(path))
    return UnlearningCase(case, *paths)


def reply_losses(model: Any, rows: Sequence[EncodedExample]) -> list[torch.Tensor]:
    """Return the negative log-likelihoods of each row's reply tokens, from whole logits of that row alone."""
    found = []
    for row in rows:
        ids = torch.tensor([row.input_ids])
        log_p = model(input_ids=ids).logits[0].log_softmax(-1)
        places = range(row.num_prompt_tokens, len(row.input_ids))
        found.append(-torch.stack([log_p[i - 1, row.input_ids[i]] for i in places]))
    return found


def task_loss(case: Case) -> torch.Tensor:
    """Return the mean negative log-likelihood over the reply tokens of the stage's rows."""
    return torch.cat(reply_losses(case.model, case.data.encoded[:ROWS])).mean()


def mean_of_rows(losses: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the mean over rows of each row's mean."""
    return torch.stack([loss.mean() for loss in losses]).mean()


def prepared(unlearning: UnlearningCase, method: Unlearning) -> Unlearning:
    """Return the method with its rows read."""
    case = unlearning.case
    prepare_methods([method], case.model, case.data, case.store)
    return method


def compared(
    unlearning: UnlearningCase, method: Unlearning, expected: torch.Tensor, *, step: int = 0
) -> tuple[float, float]:
    """Return how far task loss and weighted term together are off, and their gradient by the adapter."""
    case = unlearning.case
    outputs = forward_reply_tokens(case.model, case.batch)
    module = SimpleNamespace(trainer=SimpleNamespace(log_every_n_steps=1, global_step=step))
    context: Any = SimpleNamespace(
        model=case.model, module=module, batch=case.batch, outputs=outputs, step=step, token_mean=lambda v: v.mean()
    )
    term = method.loss_term(context)
    total = outputs.nll.mean() + (0.0 if term is None else method.weight * term)
    pairs = zip(_gradient(case, total), _gradient(case, expected), strict=True)
    value, gradient = (relative_deviation(ours, theirs) for ours, theirs in pairs)
    return value, gradient


def deviations(folder: Path) -> Iterator[Deviation]:
    """Yield how far loss and gradient are off, the stage's rows retained and those of a named source."""
    made = make_unlearning_case(folder)
    for retain, name in (("stage", "the stage's rows"), (made.retain, "rows of their own")):
        method = GradDiff(GradDiffConfig(source=made.forget, retain=retain, gamma=0.6, alpha=0.8))
        prepared(made, method)
        model, task = made.case.model, task_loss(made.case)
        expected = -0.6 * mean_of_rows(reply_losses(model, made.beside(method._forget, 0)))
        if retain == "stage":
            expected = expected + 0.8 * task
        else:
            expected = expected + task + 0.8 * mean_of_rows(reply_losses(model, made.beside(method._retain, 0)))
        value, gradient = compared(made, method, expected)
        yield Deviation(f"loss, {name} retained", PAPER, value, 1e-5, ROWS)
        yield Deviation(f"its gradient, {name} retained", PAPER, gradient, 1e-5, ROWS)


def _gradient(case: Case, loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    parameters = [p for p in case.model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    filled = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
    return loss.detach(), torch.cat([gradient.flatten() for gradient in filled])
