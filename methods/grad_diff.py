"""Gradient difference: raise the loss of harmful replies while the loss of rows to be retained falls.

Formula: ``alpha CE(retain) - gamma CE(forget)``; ``CE(forget)`` is the mean over rows of the mean negative
log-likelihood of a reply token, over harmful requests with compliant replies. With ``retain: stage`` the stage's own
rows are retained: ``alpha`` multiplies the loss they have anyway. With a named source its rows are retained beside the
stage's, which keep their loss. What is added to the loss of the stage is multiplied by ``weight``.

Points: ``prepare`` (read the forget rows, and the retain rows of a named source), ``loss_term``.

Reference: Continual Learning and Private Unlearning, Liu et al., CoLLAs 2022, arXiv:2203.12817; as in TOFU,
arXiv:2401.06121, section 3, and code locuslab/open-unlearning ``trainer/unlearn/grad_diff.py`` (formula only,
re-derived).

Deviations: means are over rows, each by its own length (the code: over the tokens of a batch); that of the stage's
rows is over the reply tokens of the step. A forget row is drawn for each row of the stage, as the code draws a retain
row for each forget row.

Cost: one more forward and backward pass a step, over as many rows as the step has; two with a named retain source.

Does not compose with: strategies that cut the weights; where the stage's rows are retained with ``alpha`` other than
1, another method that changes the factor of the task loss.

Defaults: ``gamma`` and ``alpha`` 1, those of the code; the loss has no least value there either.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from framework.composition import StepContext
from framework.errors import ConfigError
from framework.registry import register_method
from framework.unlearning import STAGE, Unlearning, mean_row_loss, number_problems, paired_outputs, row_problems

__all__ = ["GradDiff", "GradDiffConfig"]


@dataclass(frozen=True)
class GradDiffConfig:
    """Settings of gradient difference."""

    weight: float = 1.0
    """Share of the unlearning loss, from 0 (plain training on the stage's rows) to 1."""
    source: str = "alpaca_mix"
    """Harmful requests with compliant replies: a registered set or a file of pairs."""
    count: int | None = None
    """Forget rows, >= 1; null takes all of the source."""
    retain: str = STAGE
    """What is retained: ``stage``, or ordinary requests with answers of a registered set or a file."""
    gamma: float = 1.0
    """Times the loss of the forget rows, > 0."""
    alpha: float = 1.0
    """Times the loss of the retain rows, >= 0."""

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: lists every problem.
        """
        problems = [*row_problems(self), *number_problems(self, positive=("gamma",), not_negative=("alpha",))]
        if problems:
            raise ConfigError(problems)


@register_method("grad_diff", config=GradDiffConfig)
class GradDiff(Unlearning):
    """Raise the loss of forget rows, lower that of retain rows."""

    config: GradDiffConfig

    def loss_term(self, ctx: StepContext) -> torch.Tensor | None:
        """Return what the difference adds to the loss of the stage's rows."""
        batch, outputs = paired_outputs(ctx, self._forget_rows())
        forget = mean_row_loss(outputs.nll, outputs.rows, num_rows=batch.input_ids.shape[0])
        if self._shows(ctx):
            self.report("forget_loss", forget)
        return self._joined(-self.config.gamma * forget, self._retain_parts(ctx, self.config.alpha))
