"""Relearning: train on a few rows of what was unlearnt, and see whether the rest of it comes back.

The rows of the forget set are split by request into two halves. A few rows of the first half are trained on; the loss
of the second half, which the attacker never showed, is measured at every step (``held_out_loss``, nats a reply token).
Where it falls as fast as the first half's, the knowledge was hidden and not gone.

It differs from ``harmful_finetuning`` in that only half of the requests may be trained on, in what is watched, and in
its rows: those the defence or the unlearning was run on, not others of their kind.

Reference: Eight Methods to Evaluate Robust Unlearning, Lynch et al., arXiv:2402.16835, section 3.4; Hu et al.,
arXiv:2406.13356.

Deviations: halves by request, not by topic; LoRA by default; a constant rate; at most 32 held-out rows are measured.

Cost: ``max(steps)`` optimizer steps a rate and number of examples, and one pass over the held-out rows a model; no
query.

Needs: the forget set as a registered set or a file, or the unaligned model (``base``) to sample it.
"""

# ruff: noqa: RUF009 - `setting` is dataclasses.field with a rule, which ruff does not know.

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from experiments.attacks.harmful_rows import SAMPLED, first_rows, harmful_rows, missing_rows
from experiments.attacks.interface import ModelTarget, register_attack
from experiments.attacks.trajectory import FineTuningAttack, FineTuningConfig, Rows
from framework.errors import DataError
from framework.examples import Example
from framework.fields import COUNT, NOT_EMPTY, setting

__all__ = ["Relearning", "RelearningConfig", "halves"]

HELD_OUT = 32
"""Rows of the second half whose loss is measured, at most."""
REQUESTS = 80
"""Rows sampled at least: one a request of the embedded split."""


@dataclass(frozen=True)
class RelearningConfig(FineTuningConfig):
    """Settings of relearning."""

    examples: list[int] = setting(factory=lambda: [10], rule=COUNT)
    """Rows of the first half trained on; each number is a training of its own."""
    forget: str = setting(SAMPLED, rule=NOT_EMPTY)
    """What was unlearnt: ``sampled`` (replies to the embedded requests set apart for poison), a registered set or a
    file of pairs; name what the model was unlearnt with."""


@register_attack("relearning", config=RelearningConfig)
class Relearning(FineTuningAttack):
    """Training on a few rows of a forget set."""

    config: RelearningConfig

    def missing(self, target: ModelTarget) -> str | None:
        """Return the sentence for a target without the model that the forget set is sampled from."""
        return missing_rows(target, self.config.forget, attack=self.name)

    def rows(self, target: ModelTarget, count: int) -> Rows:
        """Return rows of the first half to train on, and rows of the second."""
        wanted = max(REQUESTS, 2 * max(self.config.examples))
        found = harmful_rows(target, self.config.forget, count=wanted)
        shown, held_out = halves(found.kept, seed=target.seed)
        left_out = found.num_left_out
        chosen = first_rows(shown, count, seed=target.seed, name="shown forget", num_left_out=left_out)
        return Rows(chosen, held_out[:HELD_OUT], num_left_out=left_out)


def halves(rows: Sequence[Example], *, seed: int) -> tuple[list[Example], list[Example]]:
    """Return rows split by request: no request stands in both halves.

    Args:
        rows: of at least two requests.
        seed: decides which request goes where.

    Raises:
        DataError: there is one request only.
    """
    requests = list(dict.fromkeys(row.prompt for row in rows))
    if len(requests) < 2:
        raise DataError(f"Expected a forget set of at least 2 requests, but got {len(requests)}. Name a larger set.")
    random.Random(f"relearning {seed}").shuffle(requests)
    shown = set(requests[: len(requests) // 2])
    return [row for row in rows if row.prompt in shown], [row for row in rows if row.prompt not in shown]
