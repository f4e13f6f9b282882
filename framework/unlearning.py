"""What methods that unlearn share: forget rows and retain rows beside the stage's, their losses, rules of settings."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from framework.batch import Batch
from framework.composition import StepContext, is_check_step
from framework.errors import NoEffectError, WiringError
from framework.method import Method, MethodStore
from framework.module import TokenOutputs, forward_reply_tokens
from framework.paired_rows import PairedRows, read_paired_rows, row_means

__all__ = ["STAGE", "Unlearning", "mean_row_loss", "number_problems", "paired_outputs", "row_problems"]

STAGE = "stage"
"""Name of the stage's own rows where it is said what to retain."""


def mean_row_loss(nll: torch.Tensor, rows: torch.Tensor, *, num_rows: int, bound: float | None = None) -> torch.Tensor:
    """Return the mean over rows of the mean negative log-likelihood of their reply tokens.

    Args:
        nll: ``(tokens,)``, nats, with its graph.
        rows: int64 ``(tokens,)``, row of each token.
        num_rows: rows of the micro-batch.
        bound: nats above which a token has no gradient; None: never.

    Example:
        >>> float(mean_row_loss(torch.tensor([1.0, 9.0, 2.0]), torch.tensor([0, 0, 1]), num_rows=2, bound=5.0))
        2.5
    """
    kept = nll if bound is None else nll.clamp_max(bound)
    return row_means(kept, rows, num_rows=num_rows).mean()


def paired_outputs(ctx: StepContext, rows: PairedRows) -> tuple[Batch, TokenOutputs]:
    """Return the rows that stand beside the micro-batch, and the trained model's forward pass over them."""
    batch = rows.batch(ctx.step, ctx.batch)
    shares = bool(getattr(ctx.module, "share_prefixes", False))
    return batch, forward_reply_tokens(ctx.model, batch, share_prefixes=shares)


class Unlearning(Method):
    """Base of methods whose settings name forget rows by ``source`` and ``count``, and retain rows by ``retain``."""

    def __init__(self, config: Any) -> None:
        """Keep the settings; the rows come with ``prepare``."""
        super().__init__(config)
        self._forget: PairedRows | None = None
        self._retain: PairedRows | None = None
        """Rows of a named retain source; None where the stage's are retained."""
        self._acting: torch.Tensor | None = None

    def prepare(self, model: nn.Module, datamodule: Any, store: MethodStore) -> None:
        """Read the rows; at strength 0 there are none to read."""
        if self.weight == 0.0:
            return
        given = self.config
        self._forget = read_paired_rows(datamodule, "harmful", given.source, count=given.count, method=self.name)
        self.effects["forget_rows"] = len(self._forget.encoded)
        retain = getattr(given, "retain", STAGE)
        if retain != STAGE:
            self._retain = read_paired_rows(datamodule, "benign", retain, count=None, method=self.name)
            self.effects["retain_rows"] = len(self._retain.encoded)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a run that was not prepared before its first step, which is where rows are first needed."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and self.weight:
            self._forget_rows()

    @property
    def task_loss_setting(self) -> str | None:
        """The factor of the stage's own loss, ``task_weight`` or ``alpha`` of what is retained, where it is not 1."""
        name = "task_weight" if hasattr(self.config, "task_weight") else "alpha"
        is_other = name == "alpha" and getattr(self.config, "retain", STAGE) != STAGE
        is_kept = self.weight == 0.0 or is_other or getattr(self.config, name, 1.0) == 1.0
        return None if is_kept else f"{name}: 1"

    def note_term(self, value: torch.Tensor) -> None:
        """Remember the part that unlearns: a task loss that is taken away is no effect of what the method is for."""
        super().note_term(value if self._acting is None else self.weight * self._acting)

    def require_effect(self) -> None:
        """Raise when nothing was unlearnt, whatever became of the task loss.

        Raises:
            NoEffectError: as of every method.
        """
        try:
            super().require_effect()
        except NoEffectError as error:
            text = "What it changes the loss of the stage's own rows by does not count."
            raise NoEffectError(f"{error} {text}") from None

    def _forget_rows(self) -> PairedRows:
        if self._forget is None:
            raise WiringError(
                f"Method `{self.name}` has no forget rows yet. Call `prepare_methods(methods, model, datamodule, "
                "store)` before `fit`."
            )
        return self._forget

    def _shows(self, ctx: StepContext) -> bool:
        """Return whether values are reported in this step: reading one waits for the device."""
        return is_check_step(ctx.module.trainer, ctx.outputs.nll.device)

    def _joined(
        self, unlearning: torch.Tensor, others: Sequence[torch.Tensor], *, acting: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the sum of all parts of the term, and keep the one that counts as the method's effect.

        Args:
            unlearning: the part that unlearns.
            others: what retaining adds, and what the task loss is changed by.
            acting: the part that unlearns without what has no gradient; None where all of it has one.
        """
        self._acting = (unlearning if acting is None else acting).detach()
        return torch.stack([unlearning, *others]).sum()

    def _task_parts(self, ctx: StepContext, factor: float) -> list[torch.Tensor]:
        """Return what turns the task loss into ``factor`` times itself: nothing for 1."""
        return [] if factor == 1.0 else [(factor - 1.0) * ctx.token_mean(ctx.outputs.nll)]

    def _retain_parts(self, ctx: StepContext, alpha: float) -> list[torch.Tensor]:
        """Return what ``alpha`` times the loss of the retain rows adds to the loss of the stage."""
        if self._retain is None:
            if self._shows(ctx):
                self.report("retain_loss", ctx.token_mean(ctx.outputs.nll.detach()))
            return self._task_parts(ctx, alpha)
        if alpha == 0.0:
            return []
        batch, outputs = paired_outputs(ctx, self._retain)
        loss = mean_row_loss(outputs.nll, outputs.rows, num_rows=batch.input_ids.shape[0])
        if self._shows(ctx):
            self.report("retain_loss", loss)
        return [alpha * loss]


def row_problems(config: Any) -> Iterator[str]:
    """Yield what is wrong with ``weight``, ``source``, ``count`` and, where there is one, ``retain``."""
    weight = config.weight
    if not _is_number(weight) or not 0 <= weight <= 1:
        yield f"Expected `weight` to be a share from 0 to 1, but got {weight!r}."
    for name in ("source", "retain"):
        value = getattr(config, name, STAGE)
        if not isinstance(value, str) or not value:
            yield f"Expected `{name}` to be a set's name or a file, but got {value!r}."
    count = config.count
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
        yield f"Expected `count` to be a whole number >= 1 or null, but got {count!r}."


def number_problems(config: Any, *, positive: tuple[str, ...] = (), not_negative: tuple[str, ...] = ()) -> list[str]:
    """Return what is wrong with fields that must be finite numbers above 0, or at least 0."""
    problems = []
    for name in (*positive, *not_negative):
        value, rule = getattr(config, name), "> 0" if name in positive else ">= 0"
        if not _is_number(value) or not math.isfinite(value) or value < 0 or (name in positive and value == 0):
            problems.append(f"Expected `{name}` to be a number {rule}, but got {value!r}.")
    return problems


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
