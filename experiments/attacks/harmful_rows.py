"""Harmful requests with compliant replies for attacks that train: sampled on this machine, or from a file.

Nothing of the kind is kept with the project. Replies to the embedded requests of the split ``poison`` are sampled from
the unaligned model, as for a poisoned task, and stay in this machine's cache.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

from datamodules.catalog import evaluation_prompts, harmful_examples
from experiments.attacks.interface import ModelTarget
from experiments.attacks.model_folders import missing_base
from experiments.judge.overlap import OverlapIndex
from experiments.release.overlap import TrainingPrompts, find_overlap
from experiments.stage_data import poison_examples
from framework.errors import ConfigError, DataError
from framework.examples import Example
from framework.files import ArtifactStore, cache_root
from framework.models import ModelSpec, find_model, model_fingerprint

__all__ = ["SAMPLED", "Apart", "first_rows", "harmful_rows", "leave_out_measured", "missing_rows"]

SAMPLED = "sampled"
USE = "sample compliant replies"
T = TypeVar("T")


class Apart(NamedTuple, Generic[T]):
    """What an attack may train or probe on."""

    kept: list[T]
    num_left_out: int
    """Those that are among the measured requests, word for word or nearly."""


def leave_out_measured(target: ModelTarget, items: Sequence[T], *, text: Callable[[T], str]) -> Apart[T]:
    """Return the items without those whose prompt is, or nearly is, a request the attacked models are measured with.

    An attack that trained on them would be measured by what it was taught.

    Args:
        target: says what is measured.
        items: rows or prompts.
        text: gives the prompt of an item.
    """
    if not target.requests or not items:
        return Apart(list(items), 0)
    measured = tuple(request.text for request in target.requests)
    lines = [{"set": "", "id": n, "kind": "harmful", "prompt": text(item)} for n, item in enumerate(items)]
    out = find_overlap(lines, TrainingPrompts(measured, ())).excluded("near")
    index = OverlapIndex(measured)  # finds the measured requests that stand inside a longer prompt
    kept = [item for n, item in enumerate(items) if f"/{n}" not in out and not index.is_near(text(item))]
    return Apart(kept, len(items) - len(kept))


def missing_rows(target: ModelTarget, source: str, *, attack: str) -> str | None:
    """Return the sentence for a target without the model that replies are sampled from, else None.

    Args:
        target: may come with it.
        source: only ``sampled`` needs it.
        attack: who asks.
    """
    lacking = missing_base(target, attack=attack, use=USE) if source == SAMPLED else None
    return None if lacking is None else f"{lacking} A file of pairs will do as well."


def harmful_rows(target: ModelTarget, source: str, *, count: int) -> Apart[Example]:
    """Return harmful requests with compliant replies, at least ``count`` if there are; none is a measured one.

    Args:
        target: comes with its unaligned model where replies are sampled.
        source: ``sampled``, a registered set or a file of pairs.
        count: rows to sample; the others are returned whole.

    Raises:
        ConfigError: there is no unaligned model to sample from, or the set is not known.
        DataError: the model does not comply often enough, the file cannot be read, or every request is measured.
    """
    if source != SAMPLED:
        return leave_out_measured(target, harmful_examples(source, seed=target.seed), text=lambda row: row.prompt)
    if target.base is None:
        raise ConfigError(str(missing_rows(target, source, attack="fine-tuning")))
    dtype: object = target.dtype
    base = find_model(ModelSpec(str(target.base))).folder
    prompts = evaluation_prompts("embedded", kind="safety", split="poison")
    apart = leave_out_measured(target, prompts, text=lambda prompt: prompt.text)
    if not apart.kept:
        raise DataError(
            f"Expected an embedded request set apart for poison that is not measured, but got {len(prompts)} that "
            "are. Measure other `requests`, or name a file of pairs."
        )
    rows = poison_examples(
        apart.kept,
        count=count,
        model=ModelSpec(str(base), dtype),  # type: ignore[arg-type]
        model_fingerprint=model_fingerprint(base),
        system=target.system,
        artifacts=ArtifactStore(cache_root()),
        accelerator=target.accelerator,
    )
    return Apart(rows, apart.num_left_out)


def first_rows(rows: Sequence[Example], count: int, *, seed: int, name: str, num_left_out: int = 0) -> list[Example]:
    """Return so many rows in the order of the seed; fewer rows are a part of more.

    Args:
        rows: to choose from.
        count: how many.
        seed: decides the order.
        name: of the rows, for the message.
        num_left_out: rows that were left out before, for the message.

    Raises:
        DataError: there are fewer.
    """
    if len(rows) < count:
        left_out = f" ({num_left_out} more are among the measured requests)" if num_left_out else ""
        raise DataError(
            f"Expected at least {count} {name} rows, but got {len(rows)}{left_out}. Lower `examples`, or name a larger "
            "set."
        )
    order = list(rows)
    random.Random(f"attack rows {seed}").shuffle(order)
    return order[:count]
