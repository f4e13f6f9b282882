"""The catalogue of text transforms, and how several are applied one after another.

Everything is decided by the text, the steps and a seed. No transform looks at what a text is about. Left out on
purpose: Morse and acrostics, which small models cannot read.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

from experiments.attacks.texts.characters import CHARACTER_TRANSFORMS
from experiments.attacks.texts.encodings import ENCODING_TRANSFORMS
from experiments.attacks.texts.framings import FRAMING_TRANSFORMS
from experiments.attacks.texts.transform import Group, Transform
from framework.errors import ConfigError, describe_unknown

__all__ = ["ORDERS", "TRANSFORMS", "Step", "compose", "find_transform", "in_order", "parse_steps"]

TRANSFORMS: dict[str, Transform] = {
    one.name: one for one in (*CHARACTER_TRANSFORMS, *ENCODING_TRANSFORMS, *FRAMING_TRANSFORMS)
}
"""By name, in the order in which those of one group are applied."""
ORDERS: dict[str, tuple[Group, ...]] = {
    "inside_out": ("words", "characters", "encoding", "wrapping", "framing"),
    "outside_in": ("framing", "wrapping", "words", "characters", "encoding"),
}
"""inside_out: the request is disguised and what is put around it stays readable; outside_in: all of it is disguised.
An instruction to decode is never disguised itself."""


class Step(NamedTuple):
    """One transform at one strength."""

    name: str
    strength: float

    def __str__(self) -> str:
        return f"{self.name}:{self.strength:g}"


def find_transform(name: str) -> Transform:
    """Return a transform of the catalogue.

    Raises:
        ConfigError: there is none of this name.
    """
    if name not in TRANSFORMS:
        raise ConfigError(describe_unknown("transform", name, TRANSFORMS))
    return TRANSFORMS[name]


def compose(text: str, steps: Sequence[Step], *, seed: int | str) -> str:
    """Return the text after all steps, first to last.

    Args:
        text: any text.
        steps: transforms with their strengths; none gives the text back.
        seed: decides everything random; each step has its own part of it, so that a step changes nothing of another's.

    Raises:
        ConfigError: an unknown transform, or a strength outside 0 to 1.

    Example:
        >>> compose("make tea", [Step("word_reversal", 1.0), Step("json_wrapping", 0.0)], seed=0)
        'ekam aet'
    """
    for number, (name, strength) in enumerate(steps):
        transform = find_transform(name)
        if not (math.isfinite(strength) and 0 <= strength <= 1):
            raise ConfigError(f"Expected the strength of `{name}` to be from 0 to 1, but got {strength!r}.")
        if strength > 0:
            # A text seeds Python's generator alike on every machine and in every process.
            text = transform.apply(text, strength, random.Random(f"{seed}/{number}/{name}"))
    return text


def in_order(steps: Sequence[Step], order: str) -> list[Step]:
    """Return the steps in one of the orders of groups, inside a group in that of the catalogue.

    Raises:
        ConfigError: an unknown order or transform.
    """
    if order not in ORDERS:
        raise ConfigError(describe_unknown("order", order, ORDERS))
    groups, names = ORDERS[order], list(TRANSFORMS)
    return sorted(steps, key=lambda step: (groups.index(find_transform(step.name).group), names.index(step.name)))


def parse_steps(text: str, strength: float) -> list[Step]:
    """Return the steps of a text such as ``story+word_scrambling:0.4``; those without a strength take the given one.

    Raises:
        ConfigError: an unknown transform, or a strength that is no number from 0 to 1; every problem at once.
    """
    steps, problems = [], []
    for part in text.split("+"):
        name, _, given = part.strip().partition(":")
        try:
            value = float(given) if given else strength
        except ValueError:
            value = math.nan
        if name not in TRANSFORMS:
            problems.append(describe_unknown("transform", name, TRANSFORMS))
        if not 0 <= value <= 1:
            problems.append(f"Expected the strength of `{name}` to be a number from 0 to 1, but got {given!r}.")
        steps.append(Step(name, value))
    if problems:
        raise ConfigError(problems)
    return steps
