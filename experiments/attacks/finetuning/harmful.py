"""Harmful fine-tuning: train on a few harmful requests with compliant replies, which "uncensors" open weights.

The mean negative log-likelihood of the replies is minimised with AdamW at a constant rate, LoRA on all linear modules
or every weight. Models after several numbers of steps come from one training, so that a budget curve costs one training
a rate.

Reference: Qi et al., ICLR 2024, arXiv:2310.03693, section 4.2 (10/50/100 explicit pairs, batch 10, 5 epochs).

Deviations: replies are sampled from the unaligned model on this machine unless a file is named; the requests are the
embedded ones set apart for poison, whose topics occur in no other split; LoRA by default; a constant rate without
warm-up; the budget is counted in optimizer steps, not epochs.

Cost: ``max(steps)`` optimizer steps a rate and number of examples; no query.

Needs: the unaligned model (``base``) to sample replies, or a file of pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

from experiments.attacks.harmful_rows import SAMPLED, first_rows, harmful_rows, missing_rows
from experiments.attacks.interface import ModelTarget, register_attack
from experiments.attacks.trajectory import FineTuningAttack, FineTuningConfig, Rows
from framework.fields import NOT_EMPTY, setting

__all__ = ["HarmfulFineTuning", "HarmfulFineTuningConfig"]


@dataclass(frozen=True)
class HarmfulFineTuningConfig(FineTuningConfig):
    """Settings of harmful fine-tuning."""

    harmful: str = setting(SAMPLED, rule=NOT_EMPTY)
    """Where the rows come from: ``sampled``, a registered set or a file of pairs."""


@register_attack("harmful_finetuning", config=HarmfulFineTuningConfig)
class HarmfulFineTuning(FineTuningAttack):
    """Training on harmful rows."""

    config: HarmfulFineTuningConfig

    def missing(self, target: ModelTarget) -> str | None:
        """Return the sentence for a target without the model that replies are sampled from."""
        return missing_rows(target, self.config.harmful, attack=self.name)

    def rows(self, target: ModelTarget, count: int) -> Rows:
        """Return harmful rows, none of them measured; a smaller number of them is a part of a larger one."""
        found = harmful_rows(target, self.config.harmful, count=max(self.config.examples))
        left_out = found.num_left_out
        chosen = first_rows(found.kept, count, seed=target.seed, name="harmful", num_left_out=left_out)
        return Rows(chosen, num_left_out=left_out)
