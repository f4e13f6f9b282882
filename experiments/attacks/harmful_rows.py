"""Harmful requests with compliant replies for attacks that train: sampled on this machine, or from a file.

Nothing of the kind is kept with the project. Replies to the embedded requests of the split ``poison`` are sampled from
the unaligned model, as for a poisoned task, and stay in this machine's cache.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from datamodules.catalog import evaluation_prompts, harmful_examples
from experiments.attacks.interface import ModelTarget
from experiments.attacks.model_folders import missing_base
from experiments.stage_data import poison_examples
from framework.errors import ConfigError, DataError
from framework.examples import Example
from framework.files import ArtifactStore, cache_root
from framework.models import ModelSpec, find_model, model_fingerprint

__all__ = ["SAMPLED", "first_rows", "harmful_rows", "missing_rows"]

SAMPLED = "sampled"
USE = "sample compliant replies"


def missing_rows(target: ModelTarget, source: str, *, attack: str) -> str | None:
    """Return the sentence for a target without the model that replies are sampled from, else None.

    Args:
        target: may come with it.
        source: only ``sampled`` needs it.
        attack: who asks.
    """
    lacking = missing_base(target, attack=attack, use=USE) if source == SAMPLED else None
    return None if lacking is None else f"{lacking} A file of pairs will do as well."


def harmful_rows(target: ModelTarget, source: str, *, count: int) -> list[Example]:
    """Return harmful requests with compliant replies, at least ``count`` if there are.

    Args:
        target: comes with its unaligned model where replies are sampled.
        source: ``sampled``, a registered set or a file of pairs.
        count: rows to sample; the others are returned whole.

    Raises:
        ConfigError: there is no unaligned model to sample from, or the set is not known.
        DataError: the model does not comply often enough, or the file cannot be read.
    """
    if source != SAMPLED:
        return harmful_examples(source, seed=target.seed)
    if target.base is None:
        raise ConfigError(str(missing_rows(target, source, attack="fine-tuning")))
    dtype: object = target.dtype
    base = find_model(ModelSpec(str(target.base))).folder
    return poison_examples(
        evaluation_prompts("embedded", kind="safety", split="poison"),
        count=count,
        model=ModelSpec(str(base), dtype),  # type: ignore[arg-type]
        model_fingerprint=model_fingerprint(base),
        system=target.system,
        artifacts=ArtifactStore(cache_root()),
        accelerator=target.accelerator,
    )


def first_rows(rows: Sequence[Example], count: int, *, seed: int, name: str) -> list[Example]:
    """Return so many rows in the order of the seed; fewer rows are a part of more.

    Args:
        rows: to choose from.
        count: how many.
        seed: decides the order.
        name: of the rows, for the message.

    Raises:
        DataError: there are fewer.
    """
    if len(rows) < count:
        raise DataError(
            f"Expected at least {count} {name} rows, but got {len(rows)}. Lower `examples`, or name a larger set."
        )
    order = list(rows)
    random.Random(f"attack rows {seed}").shuffle(order)
    return order[:count]
