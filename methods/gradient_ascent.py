"""Gradient ascent: unlearn harmful replies by raising their loss.

Formula: ``- CE(forget)`` in place of the loss of the stage's rows; ``CE(forget)`` is the mean over rows of the mean
negative log-likelihood of a reply token, over harmful requests with compliant replies. ``weight`` mixes the two:
``(1 - weight) task + weight (task_weight task - CE(forget))``. Bounded variant: with ``bound`` a token stops counting
once its negative log-likelihood is above it, ``- min(nll, bound)``.

Points: ``prepare`` (read the forget rows), ``loss_term``.

Reference: Knowledge Unlearning, Jang et al., ACL 2023, arXiv:2210.01504, eq. 1; as code locuslab/open-unlearning
``trainer/unlearn/grad_ascent.py`` (formula only, re-derived).

Deviations: the mean is over rows, each by its own length (the code: over the tokens of a batch); a forget row is drawn
for each row of the stage instead of passing over them in turn. ``bound`` and ``task_weight`` are ours: the loss has no
least value, so that without them the model is destroyed sooner or later.

Cost: one more forward and backward pass a step, over as many rows as the step has.

Does not compose with: strategies that cut the weights; with ``task_weight`` 0 whatever is to be learnt from the
stage's rows; with ``task_weight`` other than 1 another method that changes the factor of the task loss.

Defaults: ``weight`` 1, ``task_weight`` 0 and no ``bound``, the published loss. A useful bound is some nats, at most
the logarithm of the vocabulary's size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from framework.composition import StepContext
from framework.errors import ConfigError
from framework.registry import register_method
from framework.unlearning import Unlearning, mean_row_loss, number_problems, paired_outputs, row_problems

__all__ = ["GradientAscent", "GradientAscentConfig"]


@dataclass(frozen=True)
class GradientAscentConfig:
    """Settings of gradient ascent."""

    weight: float = 1.0
    """Share of the unlearning loss, from 0 (plain training on the stage's rows) to 1."""
    source: str = "alpaca_mix"
    """Harmful requests with compliant replies: a registered set or a file of pairs."""
    count: int | None = None
    """Forget rows, >= 1; null takes all of the source."""
    bound: float | None = None
    """Negative log-likelihood in nats above which a token is left alone, > 0; null: never."""
    task_weight: float = 0.0
    """Times the loss of the stage's rows, >= 0; 0 is the published loss."""

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: lists every problem.
        """
        bounds = () if self.bound is None else ("bound",)
        problems = [*row_problems(self), *number_problems(self, positive=bounds, not_negative=("task_weight",))]
        if problems:
            raise ConfigError(problems)


@register_method("gradient_ascent", config=GradientAscentConfig)
class GradientAscent(Unlearning):
    """Raise the loss of harmful replies."""

    config: GradientAscentConfig

    def loss_term(self, ctx: StepContext) -> torch.Tensor | None:
        """Return the negated loss of the forget rows, less the part of the task loss that is not kept."""
        batch, outputs = paired_outputs(ctx, self._forget_rows())
        num_rows = batch.input_ids.shape[0]
        bound = self.config.bound
        loss = mean_row_loss(outputs.nll, outputs.rows, num_rows=num_rows, bound=bound)
        counting = outputs.nll.detach()
        if bound is not None:
            # A token above the bound adds the bound to the loss, but no gradient.
            counting = counting.where(counting <= bound, torch.zeros_like(counting))
        acting = mean_row_loss(counting, outputs.rows, num_rows=num_rows)
        if self._shows(ctx):
            self.report("forget_loss", mean_row_loss(outputs.nll.detach(), outputs.rows, num_rows=num_rows))
        return self._joined(-loss, self._task_parts(ctx, self.config.task_weight), acting=acting)
