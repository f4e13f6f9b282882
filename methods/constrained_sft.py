"""Token-wise constrained SFT: learn the first tokens of a reply only as long as they are no likelier than at the start.

Formula: ``- sum_t (2 / beta_t) log sigmoid(beta_t D_t)`` with ``D_t = log p(y_t) - log p_start(y_t)``, in the form of
its gradient: the task loss of a token times ``w_t = max(2 (1 - sigmoid(beta_t D_t)), floor)``, held constant. The term
is the mean over reply tokens of ``(w_t - 1) (- log p(y_t))``; with ``weight`` 1 it turns the task loss into the
published one. beta is large on the first tokens: ``beta first_factor`` on the first, ``beta early_factor`` on those up
to ``early_tokens``, ``beta`` on the rest.

Points: ``prepare`` (the starting model's log-probability of every reply token), ``loss_term``.

Reference: Safety Alignment Should Be Made More Than Just a Few Tokens Deep, ICLR 2025, arXiv:2406.05946, section 4;
code Unispac/shallow-vs-deep-alignment (read only, re-derived).

Deviations: the mean is over the reply tokens of the whole optimizer step (the reference: of a batch); ``weight``
between 0 and 1 mixes the constrained with the plain loss.

Cost: one forward pass over the rows before training; 4 bytes a reply token on disk, 12 a row; nothing in a step. With
``reference: live`` a forward pass a step instead.

Does not compose with: strategies that cut the weights; ``live`` with full fine-tuning and with methods that train
something outside the adapter; a method that changes the factor of the task loss too.

Defaults: all from the reference code.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import pytorch_lightning as pl
import torch
from torch import nn

from framework.batch import collate
from framework.chat import EncodedExample
from framework.composition import StepContext
from framework.errors import ConfigError, WiringError, describe_unknown
from framework.method import Method, MethodStore, _model_of
from framework.model_files import model_fingerprint
from framework.module import forward_reply_tokens
from framework.packing import can_pack
from framework.processes import main_first
from framework.reference import check_adapter_off, on_fast_device, reference_mode
from framework.reference_cache import CacheColumn, ReferenceRows, training_rows
from framework.registry import register_method

__all__ = ["ConstrainedSFT", "ConstrainedSFTConfig", "token_betas", "token_weights"]

CACHE = "reference_likelihood"
COLUMNS = (CacheColumn("nll", (), "float32"),)
SHOWN_POSITIONS = (0, 1, 4, 8, 16)
Reference = Literal["cached", "live"]


@dataclass(frozen=True)
class ConstrainedSFTConfig:
    """Settings of token-wise constrained SFT."""

    weight: float = 1.0
    """Share of the constrained loss, from 0 (the plain task loss) to 1."""
    reference: Reference = "cached"
    """cached: log-probabilities kept on disk; live: the model with its adapter off."""
    beta: float = 0.1
    """Strength of the constraint on late tokens, > 0."""
    first_factor: float = 5.0
    """Times ``beta`` on the first token, > 0."""
    early_factor: float = 20.0
    """Times ``beta`` on the tokens after the first, up to ``early_tokens``, > 0."""
    early_tokens: int = 5
    """Tokens that count as early, >= 0; 0 gives ``beta`` everywhere."""
    floor: float = 1e-3
    """Least weight of a token, in [0, 1]."""

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: lists every problem.
        """
        problems = list(self._problems())
        if problems:
            raise ConfigError(problems)

    def _problems(self) -> Iterator[str]:
        for name in ("weight", "floor"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 <= value <= 1:
                yield f"Expected `{name}` to be a share from 0 to 1, but got {value!r}."
        for name in ("beta", "first_factor", "early_factor"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 < value < math.inf:
                yield f"Expected `{name}` to be a number > 0, but got {value!r}."
        count = self.early_tokens
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            yield f"Expected `early_tokens` to be a whole number >= 0, but got {count!r}."
        if self.reference not in get_args(Reference):
            yield describe_unknown("reference", str(self.reference), get_args(Reference))


def token_betas(
    positions: torch.Tensor, *, beta: float, first_factor: float, early_factor: float, early_tokens: int
) -> torch.Tensor:
    """Return beta by place in the reply, ``(tokens,)``.

    Args:
        positions: int64 ``(tokens,)``, 0-based.
        beta: on late tokens.
        first_factor: times beta on the first token.
        early_factor: times beta on the next ones.
        early_tokens: how many are early, the first one included.

    Example:
        >>> token_betas(torch.arange(4), beta=0.1, first_factor=5, early_factor=20, early_tokens=3).tolist()
        [0.5, 2.0, 2.0, 0.1]
    """
    betas = torch.full(positions.shape, beta, dtype=torch.float64, device=positions.device)
    betas = torch.where(positions < early_tokens, beta * early_factor, betas)
    return torch.where((positions == 0) & (positions < early_tokens), beta * first_factor, betas)


def token_weights(nll: torch.Tensor, reference_nll: torch.Tensor, betas: torch.Tensor, *, floor: float) -> torch.Tensor:
    """Return ``max(2 (1 - sigmoid(beta D)), floor)`` of every token, without a graph.

    Args:
        nll: negative log-likelihood under the trained model, ``(tokens,)``.
        reference_nll: under the starting model.
        betas: ``(tokens,)``.
        floor: least weight.

    Example:
        >>> zero = torch.zeros(1)
        >>> float(token_weights(zero, zero, zero + 2.0, floor=1e-3))
        1.0
    """
    difference = (reference_nll - nll).detach()
    return (2.0 * torch.sigmoid(-betas.to(difference.dtype) * difference)).clamp_min(floor)


@register_method("constrained_sft", config=ConstrainedSFTConfig)
class ConstrainedSFT(Method):
    """Token-wise constrained fine-tuning."""

    config: ConstrainedSFTConfig

    def __init__(self, config: ConstrainedSFTConfig) -> None:
        """Keep the settings; references come with ``prepare``."""
        super().__init__(config)
        self._references: ReferenceRows | None = None

    @property
    def task_loss_setting(self) -> str | None:
        """The strength at which the task loss stays whole."""
        return "weight: 0" if self.weight else None

    def prepare(self, model: nn.Module, datamodule: Any, store: MethodStore) -> None:
        """Read the starting model's log-probability of every reply token."""
        if self.weight == 0.0 or self.config.reference == "live":
            return
        if datamodule is None:
            raise WiringError("Method `constrained_sft` needs the stage's data module for its rows, but got none.")
        # Token ids say which tokenizer made them; rows are part of every cache's key.
        key = {
            "model": model_fingerprint(store.model("start", method=self.name)),
            "dtype": str(next(model.parameters()).dtype),
        }
        self._references = ReferenceRows(store.artifacts, kind=CACHE, key=key, columns=COLUMNS)
        self._cover(model, datamodule.encoded)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Look every row up once the data is complete: no point comes after ``configure_data`` of the other methods."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit" or self.weight == 0.0:
            return
        model = _model_of(pl_module)
        if self.config.reference == "live":
            check_adapter_off(model, method=self.name)
            return
        if self._references is None:
            raise WiringError(
                "Method `constrained_sft` has no reference yet. Call `prepare_methods(methods, model, datamodule, "
                "store)` before `fit`."
            )
        rows = training_rows(trainer, method=self.name)
        self.count("rows_added_later", self._cover(model, rows))
        self._references.attach(rows)
        self.count("stored_bytes", self._references.bytes)

    def loss_term(self, ctx: StepContext) -> torch.Tensor | None:
        """Return what the weights take from the task loss, as a mean over the reply tokens of the step."""
        given, outputs = self.config, ctx.outputs
        reference = self._reference_nll(ctx)
        with torch.autocast(outputs.nll.device.type, enabled=False):
            betas = token_betas(
                outputs.positions,
                beta=given.beta,
                first_factor=given.first_factor,
                early_factor=given.early_factor,
                early_tokens=given.early_tokens,
            )
            weights = token_weights(outputs.nll, reference.to(outputs.nll.dtype), betas, floor=given.floor)
            self._report(ctx, weights)
            return ctx.token_mean((weights - 1.0) * outputs.nll)

    def _reference_nll(self, ctx: StepContext) -> torch.Tensor:
        if self._references is not None:
            outputs = ctx.outputs
            places = self._references.places(ctx.batch.example_ids, outputs.rows, outputs.positions)
            return self._references.take("nll", places)
        with reference_mode(ctx.model):
            return forward_reply_tokens(ctx.model, ctx.batch, share_prefixes=can_pack(ctx.model)).nll

    def _cover(self, model: nn.Module, rows: Sequence[EncodedExample]) -> int:
        references = self._references
        if references is None:
            return 0

        def compute(part: Sequence[EncodedExample]) -> Mapping[str, torch.Tensor]:
            with on_fast_device(model) as device, reference_mode(model):
                batch = collate(part, example_ids=range(len(part)), pad_id=0, step_reply_tokens=1).to(device)
                return {"nll": forward_reply_tokens(model, batch, share_prefixes=can_pack(model)).nll}

        return main_first(lambda: references.cover(rows, compute))

    def _report(self, ctx: StepContext, weights: torch.Tensor) -> None:
        """Report the mean weight, over all tokens and by place, every ``log_every_n_steps``."""
        if weights.shape[0] == 0 or ctx.step % max(1, ctx.module.trainer.log_every_n_steps):  # type: ignore[attr-defined]
            return
        means = [weights.mean()]
        for position in SHOWN_POSITIONS:
            at = ctx.outputs.positions == position
            means.append((weights * at).sum() / at.sum())
        names = ["token_weight", *(f"token_weight/{position}" for position in SHOWN_POSITIONS)]
        for name, mean in zip(names, torch.stack(means).tolist(), strict=True):
            if mean == mean:  # no token of the micro-batch stands at that position
                self.report(name, mean)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
