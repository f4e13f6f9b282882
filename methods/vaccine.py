"""Vaccine: train on hidden states shifted the way that hurts the loss most, so that later shifts hurt less.

Formula: with L the loss of the step and h_l the output of the attention block of layer l,
``g_l = dL/dh_l``, ``e_l = rho g_l / ||(g_1, ..., g_n)||`` (one norm over all layers, rows and tokens of the step), and
the loss trained on is L with every ``h_l`` replaced by ``h_l + e_l``, the shifts taken as constants.

Points: ``loss_term``, which is the loss with the shifts minus the loss without: added to the task loss it leaves the
former. A term can only add, so the plain loss is computed as well.

Reference: Vaccine, Huang et al., NeurIPS 2024, arXiv:2402.01109, algorithm 1 and eq. 7; code git-disl/Vaccine and
git-disl/Lisa@2e9c24c, Apache-2.0 (read only, re-derived).

Deviations: the norm is that of the whole optimizer step however it is cut (the reference takes it of each micro-batch);
the shift is added as a constant of the graph, where the reference writes it into ``.data``.

Cost: three forward and backward passes instead of one (the reference: two); with several micro-batches in a step one
more, because the norm of the step must be known before its first micro-batch is shifted.

Does not compose with: gradient checkpointing, which would compute again without the shifts; strategies that cut the
weights; another method that changes the factor of the task loss.

Defaults: ``rho`` 2 is that of the reference's README (5 in Booster's comparison).
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from framework.batch import Batch
from framework.composition import StepContext
from framework.errors import ConfigError, WiringError
from framework.method import Method
from framework.module import forward_reply_tokens
from framework.parameters import clean_name
from framework.registry import register_method
from framework.text_tower import text_tower

__all__ = ["Vaccine", "VaccineConfig", "attention_blocks", "scaled_shifts", "square_norm"]

_BLOCK = re.compile(r"\.\d+\.(self_attn|self_attention|attention|attn)$")
SMALLEST = 1e-7
"""Added to the norm, as in the reference."""


@dataclass(frozen=True)
class VaccineConfig:
    """Settings of Vaccine."""

    rho: float = 2.0
    """Norm of the shift over all layers, rows and tokens of a step, >= 0; 0 switches the method off."""

    def __post_init__(self) -> None:
        """Check the norm.

        Raises:
            ConfigError: it is none.
        """
        given = self.rho
        if isinstance(given, bool) or not isinstance(given, (int, float)) or not 0 <= given < math.inf:
            raise ConfigError(f"Expected `rho` to be a number >= 0, but got {given!r}.")


def square_norm(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the sum of squares of all tensors, in float64.

    Example:
        >>> float(square_norm([torch.tensor([3.0]), torch.tensor([[4.0]])]))
        25.0
    """
    return torch.stack([gradient.double().square().sum() for gradient in gradients]).sum()


def scaled_shifts(gradients: Sequence[torch.Tensor], norm: float, *, rho: float) -> list[torch.Tensor]:
    """Return ``rho g / norm`` for every layer.

    Args:
        gradients: one a layer, ``(batch, seq, hidden)``.
        norm: of the gradients of the whole step.
        rho: norm of the shifts of the whole step.

    Example:
        >>> scaled_shifts([torch.tensor([3.0, 4.0])], 5.0, rho=10.0)[0].tolist()
        [6.0, 8.0]
    """
    return [gradient * (rho / (norm + SMALLEST)) for gradient in gradients]


def attention_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the attention block of every numbered layer, in order; of a model that looks at images, of its decoder.

    Raises:
        WiringError: the model has none, or looks at images and does not say which part is its decoder.
    """
    found = [module for name, module in text_tower(model).named_modules() if _BLOCK.search(clean_name(name))]
    if not found:
        raise WiringError(
            "Method `vaccine` needs attention blocks in numbered layers, named like `layers.0.self_attn`, but the "
            "model has none. Use another method."
        )
    return found


@register_method("vaccine", config=VaccineConfig)
class Vaccine(Method):
    """Training on shifted hidden states."""

    config: VaccineConfig

    def __init__(self, config: VaccineConfig) -> None:
        """Keep the settings."""
        super().__init__(config)
        self._normed_step = -1
        self._norm = math.nan

    @property
    def task_loss_setting(self) -> str | None:
        """The norm at which the plain loss stays: with another one that with the shifts takes its place."""
        return "rho: 0" if self.config.rho else None

    def loss_term(self, ctx: StepContext) -> torch.Tensor | None:
        """Return how much the shifts raise the loss of this micro-batch."""
        if self.config.rho == 0:
            return None
        if getattr(ctx.model, "is_gradient_checkpointing", False):
            raise WiringError(
                "Method `vaccine` shifts hidden states for one forward pass, but gradient checkpointing would compute "
                "them again without the shifts. Set `gradient_checkpointing: false`."
            )
        blocks = attention_blocks(ctx.model)
        gradients = _gradients(ctx.model, blocks, ctx.batch)
        norm = self._step_norm(ctx, blocks, gradients)
        self.effects["modules_matched"] = len(blocks)
        shifts = scaled_shifts(gradients, norm, rho=self.config.rho / ctx.batch.step_reply_tokens)
        with _shifted(blocks, shifts):
            shifted = forward_reply_tokens(ctx.model, ctx.batch)
        return ctx.token_mean(shifted.nll) - ctx.outputs.loss

    def _step_norm(self, ctx: StepContext, blocks: Sequence[nn.Module], gradients: Sequence[torch.Tensor]) -> float:
        """Return the norm over all micro-batches and processes, for the mean loss of the step, taken once a step."""
        trainer = ctx.module.trainer
        if self._normed_step == ctx.step:
            return self._norm
        square = square_norm(gradients)
        if trainer.accumulate_grad_batches > 1:
            datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
            if not hasattr(datamodule, "step_batches"):
                raise WiringError(
                    f"Method `vaccine` must see a whole step before its first micro-batch, but "
                    f"{type(datamodule).__name__} has no `step_batches`. Train with one micro-batch a step, or use "
                    "`datamodules.finetune.FineTuneDataModule`."
                )
            others = datamodule.step_batches(ctx.step)[1:]  # this one is the first
            for batch in others:
                square = square + square_norm(_gradients(ctx.model, blocks, batch.to(square.device)))
        if trainer.world_size > 1:
            square = torch.as_tensor(trainer.strategy.reduce(square, reduce_op="sum"))
        self._normed_step, self._norm = ctx.step, float(square.sqrt()) / ctx.batch.step_reply_tokens
        self.report("gradient_norm", self._norm)
        return self._norm


def _gradients(model: nn.Module, blocks: Sequence[nn.Module], batch: Batch) -> list[torch.Tensor]:
    """Return the gradient of the micro-batch's summed loss by the output of every block.

    It is the step's tokens times that of the mean loss, which in half precision falls below the smallest number.
    """
    outputs: list[torch.Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        # Below the first trained layer nothing has a graph; the loss still depends on the output.
        outputs.append(hidden if hidden.requires_grad else hidden.requires_grad_())

    with _hooked(blocks, [keep] * len(blocks)):
        loss = forward_reply_tokens(model, batch).nll.sum()
    return [gradient.detach() for gradient in torch.autograd.grad(loss, outputs)]


@contextlib.contextmanager
def _shifted(blocks: Sequence[nn.Module], shifts: Sequence[torch.Tensor]) -> Iterator[None]:
    def adding(shift: torch.Tensor) -> Any:
        def add(_: nn.Module, __: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (output[0] + shift.to(output[0].dtype), *output[1:])
            return output + shift.to(output.dtype)

        return add

    with _hooked(blocks, [adding(shift) for shift in shifts]):
        yield


@contextlib.contextmanager
def _hooked(blocks: Sequence[nn.Module], hooks: Sequence[Any]) -> Iterator[None]:
    """Put a forward hook on every block inside the block, which covers one forward pass."""
    handles = [block.register_forward_hook(hook) for block, hook in zip(blocks, hooks, strict=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
