"""Benign drift: train on ordinary requests alone (p = 0) and see how much safety that costs.

The same training as ``harmful_finetuning`` with rows that hold no harm at all: what a user who means well does.

Reference: Qi et al., ICLR 2024, arXiv:2310.03693, section 4.4 (Alpaca and Dolly, one epoch).

Deviations: the embedded instructions with their answers unless a set is named; LoRA by default; a constant rate; the
budget is counted in optimizer steps.

Cost: ``max(steps)`` optimizer steps a rate and number of examples; no query.

Needs: nothing but the weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from datamodules import embedded_sets
from datamodules.catalog import EMBEDDED, benign_examples
from experiments.attacks.harmful_rows import first_rows
from experiments.attacks.interface import ModelTarget, register_attack
from experiments.attacks.trajectory import FineTuningAttack, FineTuningConfig, Rows
from framework.fields import NOT_EMPTY, setting

__all__ = ["BenignDrift", "BenignDriftConfig"]


@dataclass(frozen=True)
class BenignDriftConfig(FineTuningConfig):
    """Settings of benign drift."""

    benign: str = setting(EMBEDDED, rule=NOT_EMPTY)
    """Ordinary requests with answers: ``embedded`` (without the look-alikes), a registered set or a file."""


@register_attack("benign_drift", config=BenignDriftConfig)
class BenignDrift(FineTuningAttack):
    """Training on ordinary rows."""

    config: BenignDriftConfig

    def rows(self, target: ModelTarget, count: int) -> Rows:
        """Return ordinary rows; a smaller number of them is a part of a larger one."""
        name = self.config.benign
        found = embedded_sets.benign_examples() if name == EMBEDDED else benign_examples(name, seed=target.seed)
        return Rows(first_rows(found, count, seed=target.seed, name="benign"))
