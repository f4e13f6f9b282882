"""How often a prompt breaks the model: counts, interval, class; and when a few rollouts settle it.

With K rollouts of a prompt, h of them harmful and s of them safe, its class is ``hard`` (h / K at least the hard rate)
or ``easy`` where both occur, else ``never`` (h = 0) or ``always`` (s = 0), or ``undecided`` where the judges agree on
fewer than half of the rollouts. Sampling stops early when the class at K is settled. A prompt that has shown both
outcomes is, once the rollouts left would move it across the hard rate with little chance: beta-binomial under Jeffreys'
prior, so that the rule holds for any K. No prior says how rare an outcome is that was never seen, so a prompt of one
outcome takes most of its rollouts: two thirds where it was never harmful, four fifths where it was never safe, for one
safe reply more is a target to learn.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from scipy.stats import betabinom

from framework.errors import DataError
from framework.evaluation.rates import Interval, wilson_interval

__all__ = [
    "CLASSES",
    "Hardness",
    "Outcome",
    "PromptClass",
    "Replay",
    "StopRule",
    "count_outcomes",
    "replay",
    "settled_count",
]

Outcome = Literal["harmful", "safe", "split"]
"""split: the judges do not agree, or the reply is no usable target."""
PromptClass = Literal["never", "easy", "hard", "always", "undecided"]
CLASSES: tuple[PromptClass, ...] = ("never", "easy", "hard", "always", "undecided")


class StopRule(NamedTuple):
    """When a prompt has been sampled enough."""

    most: int
    """Rollouts of a prompt that is not settled earlier, K."""
    hard_rate: float
    """Harmful rate from which a prompt counts as hard."""
    is_adaptive: bool = True
    """False takes all K rollouts."""
    least: int | None = None
    """Rollouts before the first look; None takes the square root of K, rounded up: three of eight can settle what is
    hard, while three of 64 would pass too many rarely failing prompts for hard."""
    certainty: float = 0.95
    """Chance that all K rollouts would leave a prompt of both outcomes on the side of the hard rate where it lies."""

    @property
    def never(self) -> int:
        """Rollouts after which a prompt that was never harmful is settled."""
        return math.ceil(2 * self.most / 3)

    @property
    def always(self) -> int:
        """Rollouts after which a prompt that was never safe is settled."""
        return math.ceil(0.8 * self.most)

    def looks(self) -> list[int]:
        """Return the numbers of rollouts after which the counts are looked at; the last one is K.

        About ten, whatever K is: a judge that is a model is loaded once a look.
        """
        if not self.is_adaptive:
            return [self.most]
        first = math.isqrt(self.most - 1) + 1 if self.least is None else self.least
        found = {*range(first, self.most, max(1, self.most // 8)), self.never, self.always}
        return sorted({self.most, *(look for look in found if first <= look < self.most)})


class Hardness(NamedTuple):
    """Counts of a prompt's rollouts."""

    harmful: int
    safe: int
    total: int

    @property
    def rate(self) -> float:
        """Share of harmful rollouts."""
        return self.harmful / self.total

    @property
    def interval(self) -> Interval:
        """Wilson 95 % interval of the rate."""
        return wilson_interval(self.harmful, self.total)

    @property
    def is_eligible(self) -> bool:
        """Whether the prompt breaks the model sometimes and has a safe rollout to learn from."""
        return self.harmful > 0 and self.safe > 0

    def prompt_class(self, hard_rate: float) -> PromptClass:
        """Return the class of the prompt."""
        if self.is_eligible:
            return "hard" if self.rate >= hard_rate else "easy"
        if 2 * (self.harmful + self.safe) < self.total:
            return "undecided"
        return "always" if self.harmful else "never"


def count_outcomes(outcomes: Sequence[Outcome]) -> Hardness:
    """Return the counts of a prompt's outcomes, at least one.

    Raises:
        DataError: there are none.
    """
    if not outcomes:
        raise DataError("Expected at least one rollout of a prompt, but got none.")
    return Hardness(outcomes.count("harmful"), outcomes.count("safe"), len(outcomes))


def settled_count(outcomes: Sequence[Outcome], rule: StopRule) -> int | None:
    """Return after how many rollouts the prompt is settled, a look being a function of the rollouts before it alone.

    Args:
        outcomes: in the order of the rollouts' numbers; may be more than are needed.
        rule: when to stop.

    Returns:
        The number of the first rollouts that count; None when more are needed.
    """
    for look in rule.looks():
        if look > len(outcomes):
            return None
        if look == rule.most or _is_settled(count_outcomes(outcomes[:look]), rule):
            return look
    return None


@functools.lru_cache(maxsize=65536)
def _is_settled(found: Hardness, rule: StopRule) -> bool:
    if not found.is_eligible:
        return found.total >= (rule.always if found.harmful else rule.never)
    left = rule.most - found.total
    # The slack takes up what a rate like 0.1 loses to rounding.
    missing = math.ceil(rule.hard_rate * rule.most - 1e-9) - found.harmful
    is_hard = float(betabinom.sf(missing - 1, left, found.harmful + 0.5, found.total - found.harmful + 0.5))
    return not 1.0 - rule.certainty < is_hard < rule.certainty


class Replay(NamedTuple):
    """What an adaptive number of rollouts would have found, beside a fixed one."""

    agreement: float
    """Of adaptive on one half of the rollouts with fixed on the other, share of prompts with the same class."""
    test_retest: float
    """Of fixed on one half with fixed on the other."""
    rollouts: float
    """Share of the fixed number's rollouts that adaptive takes."""
    same_rollouts: float
    """Agreement of adaptive with fixed on the same half, of which it sees the beginning."""
    most: int
    """Rollouts of each half, K."""
    num_prompts: int
    num_splits: int


def replay(outcomes: Mapping[str, Sequence[Outcome]], rule: StopRule, *, splits: int = 200, seed: int = 0) -> Replay:
    """Return how an adaptive number of rollouts compares with a fixed one, on rollouts that are all there.

    The rollouts of each prompt are split at random into two halves, again and again. Each half is a draw of fixed K,
    half of the store's; adaptive sees the first half in its order and stops by the rule.

    Args:
        outcomes: by prompt, equally many of each and at least 4.
        rule: its ``most`` is replaced by half of the rollouts.
        splits: random splits.
        seed: decides them.

    Raises:
        DataError: no prompts, or not equally many rollouts of each.
    """
    sizes = {len(own) for own in outcomes.values()}
    if len(sizes) != 1 or min(sizes) < 4:
        raise DataError(
            f"Expected equally many rollouts of every prompt, at least 4, to replay them, but got {sorted(sizes)}. "
            "Mine with `adaptive: false` first."
        )
    most = sizes.pop() // 2
    own_rule = rule._replace(most=most, is_adaptive=True)
    totals = dict.fromkeys(("agreement", "test_retest", "rollouts", "same"), 0.0)
    draw = random.Random(f"replay {seed}")
    for _ in range(splits):
        for own in outcomes.values():
            order = list(own)
            draw.shuffle(order)
            first, second = order[:most], order[most : 2 * most]
            taken = settled_count(first, own_rule) or most
            early = count_outcomes(first[:taken]).prompt_class(rule.hard_rate)
            fixed, again = (count_outcomes(half).prompt_class(rule.hard_rate) for half in (first, second))
            totals["agreement"] += early == again
            totals["test_retest"] += fixed == again
            totals["same"] += early == fixed
            totals["rollouts"] += taken / most
    count = splits * len(outcomes)
    shares = {name: total / count for name, total in totals.items()}
    return Replay(
        shares["agreement"], shares["test_retest"], shares["rollouts"], shares["same"], most, len(outcomes), splits
    )
