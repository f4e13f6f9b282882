"""Loaders of the embedded prompt sets: harmful requests, look-alikes, ordinary instructions, refusals, templates.

The files lie in ``datamodules/embedded``, are read through ``importlib.resources``, and hold requests only; what each
set is and how it was written stands in ``CARD.md`` there.
"""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any, Final

from framework.errors import ConfigError, DataError, describe_unknown
from framework.examples import Example, Prompt, PromptKind, Turn

__all__ = [
    "JailbreakTemplate",
    "benign_examples",
    "load_benign",
    "load_harmful",
    "load_look_alikes",
    "load_refusals",
    "load_templates",
    "look_alike_examples",
    "refusal_examples",
]

SLOT: Final = "{request}"


@dataclass(frozen=True)
class JailbreakTemplate:
    """A text that is wrapped around a request to talk a model out of refusing it."""

    id: str
    name: str
    template: str
    """Holds the slot ``{request}`` once."""

    def __post_init__(self) -> None:
        """Refuse a template without exactly one slot.

        Raises:
            DataError: the slot is missing or repeated.
        """
        if self.template.count(SLOT) != 1:
            raise DataError(
                f"Expected `template` to contain {SLOT} exactly once, but got {self.template!r}. "
                f"Write {SLOT} where the request belongs."
            )

    def apply(self, prompt: Prompt) -> Prompt:
        """Return ``prompt`` with its text placed in the slot; the id becomes ``<prompt id>+<template id>``."""
        return replace(prompt, id=f"{prompt.id}+{self.id}", text=self.template.replace(SLOT, prompt.text))


@functools.cache
def _rows(name: str) -> tuple[Mapping[str, Any], ...]:
    """Return the rows of ``embedded/<name>.jsonl`` in file order."""
    text = (resources.files("datamodules") / "embedded" / f"{name}.jsonl").read_text(encoding="utf-8")
    return tuple(json.loads(line) for line in text.splitlines())


def _split_rows(name: str, split: str) -> list[Mapping[str, Any]]:
    """Return the rows of one split.

    Raises:
        ConfigError: the set has no such split; the message lists those it has.
    """
    rows = _rows(name)
    known = {row["split"] for row in rows}
    if split not in known:
        raise ConfigError(f"Embedded set '{name}': {describe_unknown('split', split, known)}")
    return [row for row in rows if row["split"] == split]


def _prompts(name: str, split: str, kind: PromptKind) -> list[Prompt]:
    return [Prompt(row["id"], row["text"], kind, row["category"]) for row in _split_rows(name, split)]


def _answered(name: str, split: str) -> list[Example]:
    """Return the rows of a split as benign examples with the reply written for each."""
    return [
        Example(row["id"], (Turn("user", row["text"]),), row["reply"], "benign", row["category"])
        for row in _split_rows(name, split)
    ]


def load_harmful(split: str, *, more: bool = False) -> list[Prompt]:
    """Return harmful requests: split ``align`` (120), ``poison`` (80), ``validation`` (40) or ``test`` (80).

    No topic occurs in two splits; the category is the hazard category.

    Args:
        split: which.
        more: with 100 more; there are such for ``align`` alone.

    Raises:
        ConfigError: unknown split.
    """
    prompts = _prompts("harmful", split, "harmful")
    return [*prompts, *_prompts("more_harmful", split, "harmful")] if more else prompts


def load_look_alikes(split: str) -> list[Prompt]:
    """Return harmless requests that look harmful: split ``align`` (40), ``validation`` (20) or ``test`` (60).

    The category is one of ten types, each equally frequent in every split.

    Raises:
        ConfigError: unknown split.
    """
    return _prompts("look_alikes", split, "benign")


def load_benign(split: str) -> list[Prompt]:
    """Return ordinary instructions: split ``align`` (200) or ``validation`` (48).

    Raises:
        ConfigError: unknown split.
    """
    return _prompts("benign", split, "benign")


def look_alike_examples(*, more: bool = False) -> list[Example]:
    """Return the 40 look-alikes of split ``align`` with their helpful replies.

    Args:
        more: with 200 more, twenty of each type.
    """
    rows = _answered("look_alikes", "align")
    return [*rows, *_answered("more_look_alikes", "align")] if more else rows


def benign_examples(split: str = "align") -> list[Example]:
    """Return ordinary instructions with their replies: split ``align`` (200) or ``validation`` (48).

    Raises:
        ConfigError: unknown split.
    """
    return _answered("benign", split)


def load_refusals() -> list[str]:
    """Return the 48 refusals, none of which names a subject."""
    return [row["text"] for row in _rows("refusals")]


def refusal_examples(split: str = "align", *, seed: int, per_prompt: int = 1, more: bool = False) -> list[Example]:
    """Return each harmful request of ``split`` paired with ``per_prompt`` different refusals.

    Refusals are dealt like cards: the deck is shuffled by ``seed`` and dealt to its end before it is shuffled again, so
    that the numbers of uses differ by at most one.

    Args:
        split: a split of the harmful requests.
        seed: decides which refusal goes to which request.
        per_prompt: refusals per request; the k-th gets the id ``<request id>-refusal-<k>``.
        more: as for ``load_harmful``.

    Raises:
        ConfigError: unknown split, or ``per_prompt`` below 1 or above the number of refusals.
    """
    refusals = load_refusals()
    if not 1 <= per_prompt <= len(refusals):
        raise ConfigError(
            f"Expected `per_prompt` to be between 1 and {len(refusals)}, the number of refusals, "
            f"but got {per_prompt!r}."
        )
    prompts = load_harmful(split, more=more)
    dealt = _deal(refusals, rounds=len(prompts), hand=per_prompt, rng=random.Random(seed))
    return [
        Example(f"{prompt.id}-refusal-{k}", prompt.messages, refusal, "safety", prompt.category)
        for prompt, hand in zip(prompts, dealt, strict=True)
        for k, refusal in enumerate(hand)
    ]


def _deal(cards: list[str], *, rounds: int, hand: int, rng: random.Random) -> list[list[str]]:
    """Return ``rounds`` hands of ``hand`` different cards, every card used equally often up to one."""
    deck: list[str] = []
    hands: list[list[str]] = []
    for _ in range(rounds):
        drawn = deck[:hand]
        deck = deck[hand:]
        if len(drawn) < hand:
            fresh = rng.sample(cards, len(cards))
            missing = [card for card in fresh if card not in drawn][: hand - len(drawn)]
            deck = [card for card in fresh if card not in missing]
            drawn += missing
        hands.append(drawn)
    return hands


def load_templates(split: str, *, more: bool = False) -> list[JailbreakTemplate]:
    """Return jailbreak templates: split ``train`` (8) or ``test`` (4), of different families.

    Args:
        split: which.
        more: with 16 and 8 more, and a split ``validation`` of 4; no template stands in two splits.

    Raises:
        ConfigError: unknown split.
    """
    names = ("jailbreak_templates", "more_jailbreak_templates") if more else ("jailbreak_templates",)
    known = {row["split"] for name in names for row in _rows(name)}
    if split not in known:
        raise ConfigError(f"Embedded set '{names[-1]}': {describe_unknown('split', split, known)}")
    rows = [row for name in names for row in _rows(name) if row["split"] == split]
    return [JailbreakTemplate(row["id"], row["name"], row["template"]) for row in rows]
