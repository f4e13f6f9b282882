"""Tiny data with unequal reply lengths, a trainer without side effects, and one call that runs a fit."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from torch import nn

from framework.adapters import AdapterSpec, add_adapter
from framework.batch import Batch, collate
from framework.chat import EncodedExample
from framework.composition import StepContext, compose
from framework.method import Method
from framework.module import FineTuneModule

VOCAB = 260


def make_rows(count: int, *, seed: int = 0) -> list[EncodedExample]:
    """Random rows: prompts of 3 to 9 tokens, replies of 1 to 12."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        prompt, reply = draw.randint(3, 9), draw.randint(1, 12)
        rows.append(EncodedExample(tuple(draw.randint(4, VOCAB - 1) for _ in range(prompt + reply)), prompt))
    return rows


def make_batch(count: int = 4, *, seed: int = 0) -> Batch:
    """One batch that is a whole step."""
    rows = make_rows(count, seed=seed)
    tokens = sum(row.num_reply_tokens for row in rows)
    return collate(rows, example_ids=range(count), pad_id=0, step_reply_tokens=tokens)


class Steps:
    """A loader whose length is that of the whole run, also when it starts in the middle."""

    def __init__(self, batches: list[Batch], *, skip: int) -> None:
        self.batches = batches
        self.skip = skip

    def __len__(self) -> int:
        return len(self.batches)

    def state_dict(self) -> dict[str, Any]:
        """Tells Lightning that resuming in the middle is meant."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The step to start from comes from the trainer."""

    def __iter__(self):
        return iter(self.batches[self.skip :])


class TinyData(pl.LightningDataModule):
    """Serves the same optimizer steps however they are cut into micro-batches and processes."""

    def __init__(self, *, steps: int = 3, rows: int = 8, micro_batches: int = 1, seed: int = 0) -> None:
        super().__init__()
        self.steps = [make_rows(rows, seed=seed * 1000 + step) for step in range(steps)]
        self.micro_batches = micro_batches
        self.added: dict[str, Any] = {}

    @property
    def num_contributions(self) -> int:
        return len(self.added)

    def add_source(self, name: str, examples: Any, *, count: int | None = None) -> None:
        self.added[name] = (examples, count)

    def batches(self) -> list[Batch]:
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return [batch for rows in self.steps for batch in self._cut(rows, rank, world)]

    def _cut(self, rows: list[EncodedExample], rank: int, world: int) -> list[Batch]:
        share = list(range(len(rows)))[rank::world]
        size = len(share) // self.micro_batches
        return [
            collate(
                [rows[i] for i in share[start : start + size]],
                example_ids=share[start : start + size],
                pad_id=0,
                step_reply_tokens=sum(row.num_reply_tokens for row in rows),
                step_micro_batches=self.micro_batches,
            )
            for start in range(0, len(share), size)
        ]

    def train_dataloader(self) -> Steps:
        return Steps(self.batches(), skip=self.trainer.global_step * self.micro_batches)

    def val_dataloader(self) -> list[Batch]:
        return []


class GradientLog(pl.Callback):
    """Keeps the gradients and the weights of every optimizer step, as one vector each."""

    def __init__(self) -> None:
        self.gradients: list[torch.Tensor] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        parts = [p.grad.flatten() for p in pl_module.parameters() if p.grad is not None]
        self.gradients.append(torch.cat(parts).clone())


class Run(NamedTuple):
    trainer: pl.Trainer
    module: FineTuneModule
    gradients: list[torch.Tensor]

    @property
    def weights(self) -> torch.Tensor:
        return flat(self.module.model)


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def make_trainer(callbacks: Sequence[pl.Callback] = (), **options: Any) -> pl.Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "max_epochs": 1,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
    }
    return pl.Trainer(callbacks=list(callbacks), **(settings | options))


def run_fit(
    model: nn.Module,
    methods: Sequence[Method] = (),
    *,
    data: Any = None,
    order: Sequence[str] = (),
    observers: Sequence[pl.Callback] = (),
    writers: Sequence[pl.Callback] = (),
    ckpt_path: str | Path | None = None,
    learning_rate: float = 1e-2,
    total_steps: int = 6,
    module: pl.LightningModule | None = None,
    **options: Any,
) -> Run:
    """Fit ``model`` with ``methods`` on the tiny data and return what came of it."""
    data = TinyData() if data is None else data
    log = GradientLog()
    callbacks = compose(methods, observers=[log, *observers], writers=writers, order=order)
    if writers:
        options["enable_checkpointing"] = True
    options.setdefault("accumulate_grad_batches", getattr(data, "micro_batches", 1))
    trainer = make_trainer(callbacks, **options)
    model.train()
    module = module or FineTuneModule(model, learning_rate=learning_rate, total_steps=total_steps)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return Run(trainer, module, log.gradients)


@dataclass(frozen=True)
class Strength:
    """Config of the methods below."""

    weight: float = 1.0


class TokenTerm(Method):
    """A token-mean term: the square of the negative log-likelihood."""

    name = "token_term"

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__(Strength(weight))

    def loss_term(self, ctx: StepContext) -> torch.Tensor:
        return ctx.token_mean(ctx.outputs.nll.square())


class WeightTerm(Method):
    """A weight-space term: half the squared norm of the trainable weights."""

    name = "weight_term"

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__(Strength(weight))

    def loss_term(self, ctx: StepContext) -> torch.Tensor:
        return 0.5 * torch.stack([p.square().sum() for p in ctx.model.parameters() if p.requires_grad]).sum()


def make_lora(model: nn.Module, *, rank: int = 4, dropout: float = 0.0, seed: int = 0, warm: bool = True) -> nn.Module:
    """``model`` with LoRA on q and v; ``warm`` gives B random values, so that the update is not zero."""
    torch.manual_seed(seed)
    spec = AdapterSpec(rank=rank, alpha=8.0, dropout=dropout)
    wrapped = add_adapter(model, spec)
    if warm:
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.02)
    return wrapped


class OneLayer(Method):
    """Keeps the last layer trainable and freezes the rest."""

    name = "one_layer"

    def __init__(self) -> None:
        super().__init__(None)

    def select_parameters(self, names: frozenset[str]) -> set[str]:
        return {name for name in names if "layers.1." in name}
