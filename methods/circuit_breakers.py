"""Circuit breakers: turn the hidden states of harmful replies away from where the starting model has them.

Formula: ``c_cb reroute + c_r retain``. ``reroute = mean relu(cos(h_l, h_l,start))`` over the tokens of harmful requests
with compliant replies, at the target layers ``l``; ``retain = mean || h - h_start ||_2`` over the tokens of the retain
rows, after every layer; ``c_cb = alpha (1 - t / 2 T)`` and ``c_r = alpha t / 2 T`` at step ``t`` of ``T``. ``weight``
mixes: ``(1 - weight) task + weight (task_weight task + c_cb reroute + c_r retain)``.

Points: ``prepare`` (read the rows, find the layers), ``loss_term``.

Reference: Improving Alignment and Robustness with Circuit Breakers, Zou et al., NeurIPS 2024, arXiv:2406.04313,
algorithm 1 (representation rerouting); the original code was not at hand (formula only, re-derived).

Deviations: means are over rows, each by its own length, padding left out, and then over layers (the reference: over
all tokens of a batch). A harmful row is drawn for each row of the stage. Layers are counted from 0, and those above
the last target are trained if the adapter sits on them: their states are held only. ``task_weight`` is ours.

Cost: four more forward passes a step, two of them with gradients, no head; those over harmful rows end at the last
target layer. No second model in memory with ``reference: live``, one with ``copy``.

Does not compose with: strategies that cut the weights; ``live`` with full fine-tuning and with methods that train
something outside the adapter; with ``task_weight`` other than 1 another method that changes the factor of the task
loss.

Limits: where training starts at the reference itself, as a fresh adapter does, every cosine is 1 and its gradient is
rounding; the first steps go where rounding points, and only then does the loss take hold. A ``task_weight`` above 0
gives them a direction.

Defaults: ``alpha`` 10, layers 10 and 20 of 32 (here 9 and 19, scaled to the model's depth) are those of the reference
for a model of 8 billion, with LoRA of rank 16 on all linear modules, a rate of 1e-4 and 150 steps of 16 rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import pytorch_lightning as pl
import torch
from torch import nn

from framework.batch import Batch
from framework.composition import StepContext
from framework.errors import ConfigError, describe_unknown
from framework.layer_states import check_layers, layer_states, numbered_layers, scaled_layer
from framework.method import MethodStore, _model_of
from framework.paired_rows import row_means
from framework.reference import check_adapter_off, frozen_copy, reference_mode
from framework.registry import register_method
from framework.unlearning import STAGE, Unlearning, number_problems, row_problems

__all__ = [
    "CircuitBreakers",
    "CircuitBreakersConfig",
    "Strengths",
    "reroute_loss",
    "retain_loss",
    "scheduled_strengths",
]

DEPTHS = (10 / 32, 20 / 32)
"""Target layers of the reference, counted from 1, as shares of its model's layers."""
Reference = Literal["live", "copy"]


@dataclass(frozen=True)
class CircuitBreakersConfig:
    """Settings of circuit breakers."""

    weight: float = 1.0
    """Share of the loss, from 0 (plain training on the stage's rows) to 1."""
    source: str = "alpaca_mix"
    """Harmful requests with compliant replies: a registered set or a file of pairs."""
    count: int | None = None
    """Harmful rows, >= 1; null takes all of the source."""
    retain: str = STAGE
    """Rows whose states are held: ``stage``, or ordinary requests with answers of a registered set or a file."""
    layers: tuple[int, ...] | None = None
    """Target layers from 0; null: 9 and 19 of 32, scaled to the model's depth."""
    alpha: float = 10.0
    """Strength of both parts together, > 0."""
    schedule_steps: int | None = None
    """Steps over which half of it moves from rerouting to retaining, >= 1; null: all steps of the stage."""
    task_weight: float = 0.0
    """Times the loss of the stage's rows, >= 0; 0 is the published loss."""
    reference: Reference = "live"
    """live: the model with its adapter off; copy: a second model in memory."""

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: lists every problem.
        """
        if isinstance(self.layers, list):
            object.__setattr__(self, "layers", tuple(self.layers))
        problems = [
            *row_problems(self),
            *number_problems(self, positive=("alpha",), not_negative=("task_weight",)),
            *self._count_problems(),
        ]
        if self.reference not in get_args(Reference):
            problems.append(describe_unknown("reference", str(self.reference), get_args(Reference)))
        if problems:
            raise ConfigError(problems)

    def _count_problems(self) -> Iterator[str]:
        chosen, steps = self.layers, self.schedule_steps
        if chosen is not None and not (isinstance(chosen, tuple) and chosen and all(map(_is_count, chosen))):
            yield f"Expected `layers` to be a list of whole numbers >= 0 or null, but got {chosen!r}."
        if steps is not None and not (_is_count(steps) and steps):
            yield f"Expected `schedule_steps` to be a whole number >= 1 or null, but got {steps!r}."


class Strengths(NamedTuple):
    """How much the two parts weigh in a step."""

    reroute: float
    retain: float


def scheduled_strengths(step: int, *, total_steps: int, alpha: float) -> Strengths:
    """Return ``alpha (1 - t / 2 T)`` and ``alpha t / 2 T``; after ``total_steps`` both stay at half of alpha.

    Args:
        step: optimizer steps done.
        total_steps: length of the schedule.
        alpha: both together.

    Example:
        >>> scheduled_strengths(50, total_steps=100, alpha=10.0)
        Strengths(reroute=7.5, retain=2.5)
    """
    moved = alpha * min(step, total_steps) / (2 * total_steps)
    return Strengths(alpha - moved, moved)


def reroute_loss(states: Sequence[torch.Tensor], reference: Sequence[torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
    """Return the mean of ``relu(cos(h, h_start))``, over the tokens of a row, then rows, then layers.

    Args:
        states: ``(batch, seq, hidden)`` for each target layer, with their graph.
        reference: those of the starting model.
        mask: ``(batch, seq)``, 0 at padding.

    Example:
        >>> states, start = torch.tensor([[[3.0, 0.0]]]), torch.tensor([[[3.0, 4.0]]])
        >>> round(float(reroute_loss([states], [start], torch.ones(1, 1))), 4)
        0.6
    """
    return _token_mean([cosine.relu() for cosine in token_cosines(states, reference, mask)], mask)


def retain_loss(states: Sequence[torch.Tensor], reference: Sequence[torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
    """Return the mean of ``|| h - h_start ||_2``, over the tokens of a row, then rows, then layers.

    Args:
        states: ``(batch, seq, hidden)`` for each layer, with their graph.
        reference: those of the starting model.
        mask: ``(batch, seq)``, 0 at padding.

    Example:
        >>> float(retain_loss([torch.ones(1, 2, 4)], [torch.zeros(1, 2, 4)], torch.ones(1, 2)))
        2.0
    """
    at = mask.bool()
    distances = [
        torch.linalg.vector_norm(_wide(h[at]) - _wide(start[at]), dim=-1)
        for h, start in zip(states, reference, strict=True)
    ]
    return _token_mean(distances, mask)


def token_cosines(
    states: Sequence[torch.Tensor], reference: Sequence[torch.Tensor], mask: torch.Tensor
) -> list[torch.Tensor]:
    """Return the cosines at the tokens that are no padding, ``(tokens,)`` for each layer."""
    at = mask.bool()
    return [
        torch.cosine_similarity(_wide(h[at]), _wide(start[at]), dim=-1)
        for h, start in zip(states, reference, strict=True)
    ]


@register_method("circuit_breakers", config=CircuitBreakersConfig)
class CircuitBreakers(Unlearning):
    """Representation rerouting."""

    config: CircuitBreakersConfig

    def __init__(self, config: CircuitBreakersConfig) -> None:
        """Keep the settings; rows and layers come with ``prepare``."""
        super().__init__(config)
        self._layers: tuple[int, ...] = ()
        self._all_layers: tuple[int, ...] = ()
        self._total_steps = 0
        # A list keeps the copy out of the module tree and of checkpoints.
        self._copies: list[nn.Module] = []

    def prepare(self, model: nn.Module, datamodule: Any, store: MethodStore) -> None:
        """Read the rows and find the target layers."""
        super().prepare(model, datamodule, store)
        if self.weight == 0.0:
            return
        depth = len(numbered_layers(model, method=self.name))
        given = self.config.layers
        if given is None:
            given = tuple(max(0, scaled_layer(share, depth) - 1) for share in DEPTHS)
        check_layers(given, depth=depth, name="layers")
        self._layers = tuple(sorted(set(given)))
        self._all_layers = tuple(range(depth))
        self._total_steps = self.config.schedule_steps or datamodule.total_steps

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Take the copy, or see that there is an adapter to switch off, once every method has set the model up."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit" or self.weight == 0.0:
            return
        model = _model_of(pl_module)
        if self.config.reference == "live":
            check_adapter_off(model, method=self.name)
        else:
            self._copies = [frozen_copy(model)]
            self.count("stored_numbers", sum(p.numel() for p in model.parameters()))

    def loss_term(self, ctx: StepContext) -> torch.Tensor | None:
        """Return both parts at the strengths of this step, and what the task loss is changed by."""
        given = self.config
        strengths = scheduled_strengths(ctx.step, total_steps=self._total_steps, alpha=given.alpha)
        batch = self._forget_rows().batch(ctx.step, ctx.batch)
        states, start = self._both(ctx, batch, self._layers)
        with torch.autocast(ctx.outputs.nll.device.type, enabled=False):
            reroute = reroute_loss(states, start, batch.attention_mask)
            if self._shows(ctx):
                self.report("forget_loss", reroute)
                cosines = token_cosines(states, start, batch.attention_mask)
                self.report("cosine", torch.cat(cosines).detach().mean())
                self.report("retain_strength", strengths.retain)
        others = self._task_parts(ctx, given.task_weight)
        if strengths.retain:
            others.append(strengths.retain * self._retain_loss(ctx))
        return self._joined(strengths.reroute * reroute, others)

    def _retain_loss(self, ctx: StepContext) -> torch.Tensor:
        batch = ctx.batch if self._retain is None else self._retain.batch(ctx.step, ctx.batch)
        states, start = self._both(ctx, batch, self._all_layers)
        with torch.autocast(ctx.outputs.nll.device.type, enabled=False):
            loss = retain_loss(states, start, batch.attention_mask)
            if self._shows(ctx):
                self.report("retain_loss", loss)
        return loss

    def _both(
        self, ctx: StepContext, batch: Batch, layers: Sequence[int]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return the states of the trained model and of the starting one."""
        if self._copies:
            self._copies[0] = self._copies[0].to(batch.input_ids.device)
        model = self._copies[0] if self._copies else ctx.model
        with reference_mode(model):
            start = layer_states(model, batch, layers, method=self.name)
        return layer_states(ctx.model, batch, layers, method=self.name), start


def _token_mean(values: Sequence[torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
    rows = mask.bool().nonzero(as_tuple=True)[0]
    return torch.stack([row_means(v, rows, num_rows=mask.shape[0]).mean() for v in values]).mean()


def _wide(values: torch.Tensor) -> torch.Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
