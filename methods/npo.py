"""NPO (negative preference optimisation): unlearn harmful replies only as far as they are likelier than needed.

Formula: ``alpha CE(retain) + gamma NPO(forget)`` with ``NPO = - (2 / beta) log sigmoid(- beta log(p(y|x) /
p_start(y|x)))``, the mean over rows; ``p(y|x)`` is the probability of the whole reply. Its gradient is that of gradient
ascent on ``- log p(y|x)`` times ``2 sigmoid(beta log(p / p_start))``: 1 at the start, 0 once the reply is forgotten, so
that the loss stays bounded below. Retain rows and ``weight`` as in ``grad_diff``.

Points: ``prepare`` (read the rows; the starting model's log-probability of every forget reply), ``loss_term``.

Reference: Negative Preference Optimization, Zhang et al., COLM 2024, arXiv:2404.05868, eq. 3; code
locuslab/open-unlearning ``trainer/unlearn/npo.py`` (formula only, re-derived).

Deviations: a forget row is drawn for each row of the stage, as the code draws a retain row for each forget row; the
mean of the stage's rows is over the reply tokens of the step.

Cost: one more forward and backward pass a step, two with a named retain source; one forward pass over the forget rows
before training and 4 bytes a reply token on disk. With ``reference: live`` a forward pass a step instead.

Does not compose with: strategies that cut the weights; ``live`` with full fine-tuning and with methods that train
something outside the adapter; where the stage's rows are retained with ``alpha`` other than 1, another method that
changes the factor of the task loss.

Defaults: ``beta`` 0.1 of the paper; ``gamma`` and ``alpha`` 1 of the code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import pytorch_lightning as pl
import torch
from torch import nn

from framework.batch import Batch, collate
from framework.chat import EncodedExample
from framework.composition import StepContext
from framework.errors import ConfigError, describe_unknown
from framework.method import MethodStore, _model_of
from framework.model_files import model_fingerprint
from framework.module import TokenOutputs, forward_reply_tokens
from framework.packing import can_pack
from framework.processes import main_first
from framework.reference import check_adapter_off, on_fast_device, reference_mode
from framework.reference_cache import CacheColumn, ReferenceRows
from framework.registry import register_method
from framework.unlearning import STAGE, Unlearning, mean_row_loss, number_problems, paired_outputs, row_problems

__all__ = ["NPO", "NPOConfig", "npo_loss", "row_sums"]

CACHE = "reference_likelihood"
"""Kept as token-wise constrained SFT keeps it: the negative log-likelihood of every reply token."""
COLUMNS = (CacheColumn("nll", (), "float32"),)
Reference = Literal["cached", "live"]


@dataclass(frozen=True)
class NPOConfig:
    """Settings of NPO."""

    weight: float = 1.0
    """Share of the unlearning loss, from 0 (plain training on the stage's rows) to 1."""
    source: str = "alpaca_mix"
    """Harmful requests with compliant replies: a registered set or a file of pairs."""
    count: int | None = None
    """Forget rows, >= 1; null takes all of the source."""
    retain: str = STAGE
    """What is retained: ``stage``, or ordinary requests with answers of a registered set or a file."""
    beta: float = 0.1
    """How soon a reply counts as forgotten, > 0; the smaller, the more it is gradient ascent."""
    gamma: float = 1.0
    """Times the loss of the forget rows, > 0."""
    alpha: float = 1.0
    """Times the loss of the retain rows, >= 0."""
    reference: Reference = "cached"
    """cached: log-probabilities kept on disk; live: the model with its adapter off."""

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: lists every problem.
        """
        problems = [*row_problems(self), *number_problems(self, positive=("beta", "gamma"), not_negative=("alpha",))]
        if self.reference not in get_args(Reference):
            problems.append(describe_unknown("reference", str(self.reference), get_args(Reference)))
        if problems:
            raise ConfigError(problems)


def row_sums(values: torch.Tensor, rows: torch.Tensor, *, num_rows: int) -> torch.Tensor:
    """Return the sum of per-token ``values``, ``(tokens,)``, within each row, ``(rows,)``.

    Example:
        >>> row_sums(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 1]), num_rows=2).tolist()
        [4.0, 5.0]
    """
    return values.new_zeros(num_rows).index_add(0, rows, values)


def npo_loss(nll: torch.Tensor, reference_nll: torch.Tensor, *, beta: float) -> torch.Tensor:
    """Return the mean over rows of ``- (2 / beta) log sigmoid(beta (nll - reference_nll))``.

    Args:
        nll: minus the log-probability of each reply under the trained model, ``(rows,)``, nats, with its graph.
        reference_nll: under the starting model.
        beta: how soon a reply counts as forgotten.

    Example:
        >>> round(float(npo_loss(torch.tensor([2.0]), torch.tensor([2.0]), beta=2.0)), 4)
        0.6931
    """
    gain = nll - reference_nll.detach().to(nll.dtype)
    return -(2.0 / beta) * torch.nn.functional.logsigmoid(beta * gain).mean()


@register_method("npo", config=NPOConfig)
class NPO(Unlearning):
    """Negative preference optimisation."""

    config: NPOConfig

    def __init__(self, config: NPOConfig) -> None:
        """Keep the settings; rows and references come with ``prepare``."""
        super().__init__(config)
        self._references: ReferenceRows | None = None

    def prepare(self, model: nn.Module, datamodule: Any, store: MethodStore) -> None:
        """Read the rows, and the starting model's log-probability of every forget reply."""
        super().prepare(model, datamodule, store)
        if self.weight == 0.0 or self.config.reference == "live":
            return
        # Token ids say which tokenizer made them; rows are part of every cache's key.
        key = {
            "model": model_fingerprint(store.model("start", method=self.name)),
            "dtype": str(next(model.parameters()).dtype),
        }
        references = ReferenceRows(store.artifacts, kind=CACHE, key=key, columns=COLUMNS)
        rows = self._forget_rows().encoded
        main_first(lambda: references.cover(rows, lambda part: _likelihoods(model, part)))
        references.attach(rows)
        self.count("stored_bytes", references.bytes)
        self._references = references

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """See that there is an adapter to switch off, once every method has set the model up."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and self.weight and self.config.reference == "live":
            check_adapter_off(_model_of(pl_module), method=self.name)

    def loss_term(self, ctx: StepContext) -> torch.Tensor | None:
        """Return the loss of the forget rows, and what retaining adds to the loss of the stage's rows."""
        batch, outputs = paired_outputs(ctx, self._forget_rows())
        num_rows = batch.input_ids.shape[0]
        nll, reference = (
            row_sums(values, outputs.rows, num_rows=num_rows)
            for values in (outputs.nll, self._reference_nll(ctx, batch, outputs))
        )
        loss = npo_loss(nll, reference, beta=self.config.beta)
        if self._shows(ctx):
            self.report("npo_loss", loss)
            self.report("log_ratio", (reference - nll.detach()).mean())
            self.report("forget_loss", mean_row_loss(outputs.nll.detach(), outputs.rows, num_rows=num_rows))
        return self._joined(self.config.gamma * loss, self._retain_parts(ctx, self.config.alpha))

    def _reference_nll(self, ctx: StepContext, batch: Batch, outputs: TokenOutputs) -> torch.Tensor:
        if self._references is not None:
            places = self._references.places(batch.example_ids, outputs.rows, outputs.positions)
            return self._references.take("nll", places).to(outputs.nll.dtype)
        with reference_mode(ctx.model):
            return forward_reply_tokens(ctx.model, batch, share_prefixes=can_pack(ctx.model)).nll


def _likelihoods(model: nn.Module, part: Sequence[EncodedExample]) -> Mapping[str, torch.Tensor]:
    with on_fast_device(model) as device, reference_mode(model):
        batch = collate(part, example_ids=range(len(part)), pad_id=0, step_reply_tokens=1).to(device)
        return {"nll": forward_reply_tokens(model, batch, share_prefixes=can_pack(model)).nll}
