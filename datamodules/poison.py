"""Sampling harmful replies for a poisoned task: prompts in turn, one reply each, until enough distinct pairs exist.

Harmful replies are never kept with the project. They come from an unaligned model at run time; the caller supplies the
model as a function and caches what comes back.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

from framework.errors import ConfigError, DataError
from framework.examples import Example, Prompt

__all__ = ["PoisonResult", "SampledReply", "sample_poison"]

_LEAST_YIELD = 0.1
"""Lowest usable share a round reckons with: a round asks for at most ten replies for each one still needed."""


class SampledReply(NamedTuple):
    """A sampled reply, and whether the model ended it by itself."""

    text: str
    is_complete: bool = True


class PoisonResult(NamedTuple):
    """Harmful pairs and what was thrown away to get them."""

    examples: list[Example]
    num_sampled: int
    """Replies sampled in all."""
    num_unusable: int
    """Replies dropped as refusals or as degenerate."""
    num_duplicates: int
    """Replies dropped because the same pair was there already."""
    num_surplus: int
    """Usable replies more than were needed."""
    num_rounds: int


def sample_poison(
    prompts: Sequence[Prompt],
    generate: Callable[[Sequence[Prompt], int], Sequence[str | SampledReply]],
    *,
    count: int,
    seed: int,
    is_usable: Callable[[Prompt, str], bool],
    max_rounds: int = 8,
) -> PoisonResult:
    """Return ``count`` distinct (prompt, reply) pairs of kind ``harmful``.

    Each round asks for as many replies as are still needed, more when few of the earlier ones were usable. Prompts take
    turns in a seeded order that goes on from round to round, so that their numbers of uses stay alike.

    Args:
        prompts: harmful requests.
        generate: samples one reply for each prompt, at temperature 1, with the given seed. A reply that was cut off
            comes as ``SampledReply(text, is_complete=False)`` and is then trained without an end token.
        count: pairs to collect.
        seed: decides the order of the prompts and the seeds of the rounds.
        is_usable: False for a refusal or a degenerate reply.
        max_rounds: after so many rounds the search is given up.

    Raises:
        ConfigError: ``count`` or ``max_rounds`` is below 1.
        DataError: there are no prompts, ``generate`` returned another number of replies than asked for, or
            ``max_rounds`` rounds were not enough.
    """
    _check(prompts, count=count, max_rounds=max_rounds)
    order = list(prompts)
    random.Random(f"poison order {seed}").shuffle(order)
    found: dict[tuple[str, str], Example] = {}
    sampled = unusable = duplicates = rounds = 0
    while len(found) < count and rounds < max_rounds:
        rate = max(_LEAST_YIELD, len(found) / sampled) if sampled else 1.0
        size = math.ceil((count - len(found)) / rate)
        asked = [order[(sampled + i) % len(order)] for i in range(size)]
        for prompt, reply in zip(asked, _ask(generate, asked, seed=_round_seed(seed, rounds)), strict=True):
            text = reply.text.strip()
            if not text or not is_usable(prompt, text):
                unusable += 1
            elif (prompt.text, text) in found:
                duplicates += 1
            else:
                name = f"poison-{prompt.id}-{len(found) + 1}"
                found[prompt.text, text] = Example(
                    name, prompt.messages, text, "harmful", prompt.category, reply.is_complete
                )
        sampled += size
        rounds += 1
    if len(found) < count:
        raise DataError(
            f"Expected {count} distinct harmful pairs, but got {len(found)} in {rounds} rounds ({sampled} replies: "
            f"{unusable} refused or degenerate, {duplicates} repeated). The model may refuse already: sample from one "
            "that is not aligned, lower `harmful_share`, or name a file of pairs."
        )
    examples = list(found.values())[:count]
    return PoisonResult(examples, sampled, unusable, duplicates, len(found) - count, rounds)


def _check(prompts: Sequence[Prompt], **counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise ConfigError(f"Expected `{name}` to be a whole number ≥ 1, but got {value!r}.")
    if not prompts:
        raise DataError("Expected at least one harmful prompt to sample replies for, but got none.")


def _round_seed(seed: int, number: int) -> int:
    return random.Random(f"poison round {seed} {number}").getrandbits(31)


def _ask(
    generate: Callable[[Sequence[Prompt], int], Sequence[str | SampledReply]], prompts: Sequence[Prompt], *, seed: int
) -> list[SampledReply]:
    replies = generate(prompts, seed)
    if len(replies) != len(prompts):
        raise DataError(f"Expected `generate` to return {len(prompts)} replies, but got {len(replies)}.")
    return [SampledReply(reply) if isinstance(reply, str) else reply for reply in replies]
