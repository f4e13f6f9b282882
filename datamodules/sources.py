"""Named sources of training rows, mixing them by exact counts, and poisoning a task with a share of harmful rows."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from framework.errors import ConfigError, DataError
from framework.examples import Example

__all__ = ["DataSource", "mix", "poisoned"]


@dataclass(frozen=True)
class DataSource:
    """Rows under a name, and how many of them the mixture takes."""

    name: str
    examples: tuple[Example, ...]
    count: int | None = None
    """Rows in the mixture; None takes each row once. More than there are: rows come round again."""

    def __post_init__(self) -> None:
        """Refuse an empty source, an impossible count, and rows without a reply."""
        if not self.examples:
            raise DataError(f"Expected source `{self.name}` to have rows, but got none.")
        if self.count is not None and self.count < 1:
            raise ConfigError(f"Expected `count` of source `{self.name}` to be ≥ 1, but got {self.count!r}.")
        for number, example in enumerate(self.examples, start=1):
            if not example.reply.strip():
                raise DataError(
                    f"Expected every row of source `{self.name}` to have a reply, but got none in row {number} "
                    f"(id {example.id!r}). Remove the row or write its reply."
                )


def mix(sources: Sequence[DataSource], *, seed: int) -> list[Example]:
    """Return the rows of all sources, exactly as many of each as asked for, shuffled.

    What is drawn from a source depends on the seed and the source's name only, so adding a source does not change
    which rows the others give.

    Args:
        sources: with names that differ.
        seed: decides which rows are drawn and their order.

    Raises:
        DataError: there are no sources.
    """
    if not sources:
        raise DataError("Expected at least one data source, but got none. Add one with `add_source`.")
    rows = [row for source in sources for row in _draw(source, seed=seed)]
    random.Random(f"mix {seed}").shuffle(rows)
    return rows


def _draw(source: DataSource, *, seed: int) -> list[Example]:
    count = len(source.examples) if source.count is None else source.count
    rows: list[Example] = []
    number = 0
    while len(rows) < count:
        order = list(source.examples)
        random.Random(f"draw {seed} {source.name} {number}").shuffle(order)
        rows += order[: count - len(rows)]
        number += 1
    return rows


def poisoned(
    task_examples: Sequence[Example], poison_examples: Sequence[Example], *, share: float, seed: int
) -> list[Example]:
    """Return the task's rows with exactly ``round(share * n)`` of the ``n`` rows replaced by poison.

    Poison prompts are used in turn, each time with another of their replies, so no pair comes twice. With the same
    seed a larger share replaces the rows a smaller one does, and more.

    Args:
        task_examples: the ``n`` clean rows.
        poison_examples: harmful requests with compliant replies.
        share: harmful share of the rows, from 0 to 1.
        seed: decides which rows are replaced and in which order prompts are used.

    Raises:
        ConfigError: ``share`` is outside [0, 1].
        DataError: there are fewer distinct poison pairs than needed, or no task rows.
    """
    if not 0.0 <= share <= 1.0:
        raise ConfigError(f"Expected `harmful_share` to be from 0 to 1, but got {share!r}.")
    if not task_examples:
        raise DataError("Expected at least one task row to poison, but got none.")
    num_poison = round(share * len(task_examples))
    turns = _take_turns(poison_examples, seed=seed)
    if len(turns) < num_poison:
        raise DataError(
            f"Expected at least {num_poison} distinct harmful pairs ({share:g} of {len(task_examples)} rows), "
            f"but got {len(turns)}. Supply more, or lower `harmful_share`."
        )
    positions = list(range(len(task_examples)))
    random.Random(f"poison rows {seed}").shuffle(positions)
    rows = list(task_examples)
    for position, poison in zip(positions[:num_poison], turns, strict=False):
        rows[position] = poison
    return rows


def _take_turns(examples: Sequence[Example], *, seed: int) -> list[Example]:
    """Return the distinct (prompt, reply) pairs: one of every prompt, then a second of every prompt, and so on."""
    by_prompt: dict[object, dict[str, Example]] = {}
    for example in examples:
        by_prompt.setdefault(example.messages, {}).setdefault(example.reply, example)
    queues = [list(replies.values()) for replies in by_prompt.values()]
    random.Random(f"poison prompts {seed}").shuffle(queues)
    longest = max((len(queue) for queue in queues), default=0)
    return [queue[turn] for turn in range(longest) for queue in queues if turn < len(queue)]
