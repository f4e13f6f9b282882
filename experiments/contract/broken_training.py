"""Methods that break a promise on training, each in a way seen in the field."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from experiments.contract.sound import ToyRows, ToyTerm, subject_of, toy_module
from experiments.contract.subject import Subject
from experiments.contract.tiny import task_examples
from framework.composition import StepContext, methods_of
from framework.method import Method

__all__ = ["BROKEN_TRAINING"]


class ActsAtZero(Method):
    """Changes gradients whatever its strength."""

    def edit_gradients(self, params: Mapping[str, nn.Parameter]) -> None:
        """Ignore the strength."""
        for parameter in params.values():
            if parameter.grad is not None:
                parameter.grad.clamp_(-1e-3, 1e-3)


class IsConstant(Method):
    """A term that has a value and no gradient: connected, logged, and without any influence."""

    def loss_term(self, ctx: StepContext) -> torch.Tensor:
        """Return a number."""
        return ctx.token_mean(ctx.outputs.nll.detach()) + 0.0 * ctx.outputs.nll.sum()


class IsUnseeded(Method):
    """Draws noise from outside the seed."""

    def loss_term(self, ctx: StepContext) -> torch.Tensor:
        """Weight tokens by chance."""
        generator = torch.Generator().manual_seed(int.from_bytes(os.urandom(4), "little"))
        nll = ctx.outputs.nll
        return ctx.token_mean(nll * torch.rand(nll.shape, generator=generator))


class IsMicroBatchMean(Method):
    """Averages over the micro-batch instead of the step."""

    def loss_term(self, ctx: StepContext) -> torch.Tensor:
        """Return the mean of what is there."""
        return ctx.outputs.nll.square().mean()


class KnowsItsRank(ToyTerm):
    """Acts differently in each process."""

    def loss_term(self, ctx: StepContext) -> torch.Tensor:
        """Scale by the rank."""
        return super().loss_term(ctx) * (1.0 + ctx.module.global_rank)


class ForgetsItsCount(ToyTerm):
    """Grows with a counter that no checkpoint holds."""

    def __init__(self, config: Any) -> None:
        """Start at 0."""
        super().__init__(config)
        self._calls = 0

    def loss_term(self, ctx: StepContext) -> torch.Tensor:
        """Grow."""
        self._calls += 1
        return super().loss_term(ctx) * self._calls


class ForgetsToLoad(ForgetsItsCount):
    """Saves its counter and does not take it back."""

    def state_dict(self) -> dict[str, Any]:
        """Hold the counter too."""
        return {**super().state_dict(), "calls": self._calls}


class MovesFrozen(Method):
    """Moves a matrix that nobody trains."""

    def prepare_model(self, model: nn.Module) -> None:
        """Keep the matrix."""
        self._matrix = toy_module(model).weight
        self.count("modules_matched")

    def project_weights(self, params: Mapping[str, nn.Parameter]) -> None:
        """Move it with the others."""
        for tensor in (*params.values(), self._matrix):
            tensor.round_(decimals=4)


class FreezesByGradient(Method):
    """Freezes by setting gradients to zero: weight decay goes on."""

    def edit_gradients(self, params: Mapping[str, nn.Parameter]) -> None:
        """Zero the first layer's."""
        for name, parameter in params.items():
            if "layers.0." in name and parameter.grad is not None:
                parameter.grad.zero_()


class OverflowsInBfloat16(Method):
    """Divides by a difference that bfloat16 rounds to zero."""

    def loss_term(self, ctx: StepContext) -> torch.Tensor:
        """Divide."""
        dtype = ctx.outputs.logits.dtype
        small = torch.tensor(1.0, dtype=dtype) + torch.tensor(1e-3, dtype=dtype) - 1.0
        return ctx.token_mean(ctx.outputs.nll / small.float()) * 1e-3


class MustBeFirst(ToyTerm):
    """Acts only when it is the first method of the list, and then twice."""

    def loss_term(self, ctx: StepContext) -> torch.Tensor:
        """Look at the list."""
        return super().loss_term(ctx) * (2.0 if methods_of(ctx.module.trainer)[0] is self else 1.0)


class LosesARow(ToyRows):
    """Adds one row less than it says."""

    def configure_data(self, datamodule: Any) -> None:
        """Add four."""
        if self.weight:
            datamodule.add_source(self.name, task_examples(5, seed=5), count=4)


class ShufflesByRank(ToyRows):
    """Draws its rows by the process it is in."""

    def configure_data(self, datamodule: Any) -> None:
        """Draw."""
        if self.weight:
            datamodule.add_source(self.name, task_examples(5, seed=int(os.environ.get("LOCAL_RANK", "0"))))


def _alone(method_class: type[Method], name: str, **fields: Any) -> Subject:
    return subject_of(method_class, f"broken_{name}", **fields)


BROKEN_TRAINING: dict[str, tuple[tuple[Subject, str], ...]] = {
    "neutral_is_plain": ((_alone(ActsAtZero, "at_zero"), r"neutral and plain: max \|difference\| .* > 0"),),
    "acting_differs": ((_alone(IsConstant, "constant"), "it does nothing"),),
    "repeats": ((_alone(IsUnseeded, "unseeded"), r"second and first run: max \|difference\| .* > 0"),),
    "accumulation": ((_alone(IsMicroBatchMean, "micro_batch_mean"), "1 x 8 and 8 x 1: .* > 1e-06"),),
    "two_processes": (
        (_alone(KnowsItsRank, "rank"), "two processes and one: .* > 1e-06"),
        (_alone(IsMicroBatchMean, "micro_batch_mean"), "two processes and one: .* > 1e-06"),
    ),
    "resume": ((_alone(ForgetsItsCount, "count"), r"resumed and uninterrupted: max \|difference\| .* > 0"),),
    "frozen_stays": (
        (_alone(MovesFrozen, "moves_frozen", no_neutral="it always rounds"), r"before and after training: .*down_proj"),
        (
            _alone(FreezesByGradient, "gradient_freeze", no_neutral="none", frozen=(r"layers\.0\.",)),
            r"before and after training: .*layers\.0\.",
        ),
    ),
    "bf16_finite": ((_alone(OverflowsInBfloat16, "bfloat16"), "to be finite, but got"),),
    "commutes": ((_alone(MustBeFirst, "first"), "companion first and last: .* > 1e-06"),),
    "state_round_trip": ((_alone(ForgetsToLoad, "load"), r"does not get back state\[calls\]"),),
    "exact_counts": ((_alone(LosesARow, "lost_row", rows_added=5), "expected 5 added rows, but found 4"),),
    "same_order": ((_alone(ShufflesByRank, "rank_rows", rows_added=5), "the rows differ"),),
}
"""By clause: broken methods, and what the clause must say of each."""
