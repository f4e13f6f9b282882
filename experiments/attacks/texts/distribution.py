"""A distribution over compositions of text transforms that moves towards what worked.

What is drawn: a set of transforms, a strength for each, and one of the orders of groups. A draw comes from one of three
parts:

- *start* (a fifth): every transform, strength and order as likely as any other, whatever was seen;
- *repeating* (two fifths, once something has worked): a composition that worked, chosen by Thompson sampling (a draw
  from Beta(1 + successes, 1 + failures) for each; the highest is taken), with one of its transforms exchanged, added or
  dropped now and then;
- *independent*: every transform is in with its own probability, and has its own probabilities of strengths.

The independent part is learnt by the cross-entropy method (Rubinstein, 1999): after a round with n compositions that
worked, its probabilities move by ``rate`` n/(n + 4) towards their shares among these.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from experiments.attacks.texts.transforms import ORDERS, TRANSFORMS, Step, in_order

__all__ = ["LEVELS", "Composition", "Distribution"]

LEVELS = (0.25, 0.5, 0.75, 1.0)
"""Strengths that are drawn."""
START = 0.2
REPEATED = 0.4
"""Shares of draws from the start distribution, and of draws that repeat what worked, once something has."""
CHANGED = 0.4
"""Share of the repeated ones in which one transform is exchanged, added or dropped."""
PRIOR = 4.0
"""Successes a round needs to move the probabilities by half of ``rate``."""
ONCE = ("encoding", "wrapping")
"""Groups of which a composition has one transform at most: a code of a code is read by nobody."""


class Composition(NamedTuple):
    """Transforms with strengths, and the order of their groups."""

    steps: tuple[Step, ...]
    order: str

    @property
    def names(self) -> frozenset[str]:
        """Which transforms there are."""
        return frozenset(step.name for step in self.steps)

    def __str__(self) -> str:
        return "+".join(map(str, self.steps))


class _Record(NamedTuple):
    successes: int
    failures: int


@dataclass
class Distribution:
    """Probabilities of transforms, strengths and orders; learns from rounds."""

    names: Sequence[str] = tuple(TRANSFORMS)
    most: int = 3
    """Transforms in a composition, at most."""
    rate: float = 0.5
    """How far a round moves the probabilities, in (0, 1]."""
    include: dict[str, float] = field(init=False)
    levels: dict[str, list[float]] = field(init=False)
    orders: dict[str, float] = field(init=False)
    worked: dict[Composition, _Record] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        """Start with every transform, strength and order equally likely."""
        self.include = dict.fromkeys(self.names, self._at_start())
        self.levels = {name: [1 / len(LEVELS)] * len(LEVELS) for name in self.names}
        self.orders = dict.fromkeys(ORDERS, 1 / len(ORDERS))

    def explore(self, chance: random.Random) -> Composition:
        """Return a composition of one to ``most`` transforms as at the start, whatever was learnt."""
        return self._independent(chance, learnt=False)

    def draw(self, chance: random.Random) -> Composition:
        """Return a composition of one to ``most`` transforms."""
        part = chance.random()
        if part < START:
            return self.explore(chance)
        if self.worked and part < START + REPEATED:
            return self._repeated(chance)
        return self._independent(chance, learnt=True)

    def learn(self, tried: Sequence[tuple[Composition, bool]]) -> None:
        """Move towards what worked in a round.

        Args:
            tried: compositions with whether they worked.
        """
        for composition, is_success in tried:
            record = self.worked.get(composition)
            if is_success or record is not None:
                old = record or _Record(0, 0)
                self.worked[composition] = _Record(old.successes + is_success, old.failures + (not is_success))
        good = [composition for composition, is_success in tried if is_success]
        if not good:
            return
        step = self.rate * len(good) / (len(good) + PRIOR)
        for name in self.names:
            own = [one for one in good if name in one.names]
            self.include[name] += step * (len(own) / len(good) - self.include[name])
            if own:
                used = [next(step.strength for step in one.steps if step.name == name) for one in own]
                shares = [used.count(level) / len(own) for level in LEVELS]
                part = self.rate * len(own) / (len(own) + PRIOR)
                self.levels[name] = [
                    old + part * (new - old) for old, new in zip(self.levels[name], shares, strict=True)
                ]
        for order in self.orders:
            share = sum(one.order == order for one in good) / len(good)
            self.orders[order] += step * (share - self.orders[order])

    def to_dict(self) -> Mapping[str, Any]:
        """Return probabilities, and the compositions that worked with their counts, most successes first."""
        best = sorted(self.worked.items(), key=lambda item: (-item[1].successes, item[1].failures))
        return {
            "include": dict(self.include),
            "strengths": {
                name: dict(zip(map(str, LEVELS), shares, strict=True)) for name, shares in self.levels.items()
            },
            "orders": dict(self.orders),
            "worked": [
                {
                    "composition": str(one),
                    "order": one.order,
                    "successes": record.successes,
                    "failures": record.failures,
                }
                for one, record in best
            ],
        }

    def _at_start(self) -> float:
        return min(0.5, (1 + self.most) / 2 / len(self.names))

    def _independent(self, chance: random.Random, *, learnt: bool) -> Composition:
        start = self._at_start()
        chosen = [name for name in self.names if chance.random() < (self.include[name] if learnt else start)]
        if not chosen:
            weights = [self.include[name] + 1e-9 for name in self.names] if learnt else None
            chosen = chance.choices(list(self.names), weights)
        chance.shuffle(chosen)
        steps = [Step(name, self._level(name, chance, learnt=learnt)) for name in chosen]
        order = chance.choices(list(self.orders), list(self.orders.values()) if learnt else None)[0]
        return self._composition(steps, order)

    def _repeated(self, chance: random.Random) -> Composition:
        drawn = {one: chance.betavariate(1 + record[0], 1 + record[1]) for one, record in self.worked.items()}
        best = max(drawn, key=lambda one: drawn[one])
        if chance.random() >= CHANGED:
            return best
        steps = list(best.steps)
        chance.shuffle(steps)
        kind = chance.choice(("exchange", "add", "drop"))
        if kind == "drop" or (kind == "add" and len(steps) >= self.most):
            steps = steps[1:] if len(steps) > 1 else steps
        else:
            name = chance.choices(list(self.names), [self.include[name] + 1e-9 for name in self.names])[0]
            kept = [step for step in (steps[1:] if kind == "exchange" else steps) if step.name != name]
            steps = [Step(name, self._level(name, chance, learnt=True)), *kept]
        return self._composition(steps, best.order)

    def _level(self, name: str, chance: random.Random, *, learnt: bool) -> float:
        return chance.choices(LEVELS, self.levels[name] if learnt else None)[0]

    def _composition(self, steps: Sequence[Step], order: str) -> Composition:
        """Return the first steps that may stand together, in their order."""
        kept: list[Step] = []
        for step in steps:
            group = TRANSFORMS[step.name].group
            if group not in ONCE or all(TRANSFORMS[other.name].group != group for other in kept):
                kept.append(step)
        return Composition(tuple(in_order(kept[: self.most], order)), order)
