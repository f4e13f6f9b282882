"""Whether the prompts a model was measured with also stood in its training data.

The training prompts are found again from the run's settings: every row of every source a stage draws from, more than a
run with few steps really saw, and of every set that a method names to probe with. What a method prepares from other
data is not known here and is named as such.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from datamodules.catalog import (
    CatalogKind,
    benign_examples,
    evaluation_prompts,
    find_examples,
    harmful_examples,
    look_alike_examples,
    safety_examples,
)
from datamodules.mining import MiningSettings, mining_pools
from experiments.judge.overlap import OverlapIndex, hash_prompt
from experiments.stage_data import task_rows
from framework.config import RunConfig, StageConfig
from framework.errors import DataError, SeawallError
from framework.examples import Example, ExampleKind, Turn
from framework.method import Method
from framework.registry import create_method

__all__ = ["Overlap", "OverlapKind", "TrainingPrompts", "find_overlap", "training_prompts"]

OverlapKind = Literal["exact", "near"]
PROBED: tuple[CatalogKind, ...] = ("safety", "benign")
"""Settings of methods that name the sets their preparation reads, called after the kind of their rows."""
NEAR_KINDS = ("harmful", "benign")
"""Prompts of a task are alike by nature: only the same one counts there."""


@dataclass(frozen=True)
class TrainingPrompts:
    """The prompts of a run's training data."""

    prompts: tuple[str, ...]
    unknown: tuple[str, ...]
    """What could not be looked at, one sentence each."""


@dataclass(frozen=True)
class Overlap:
    """Measured prompts that stood in the training data, by ``set/id``."""

    num_prompts: int
    """Measured."""
    num_training: int
    """Different training prompts they were compared with."""
    exact: tuple[str, ...] = ()
    """Same words in the same order; case and punctuation do not matter."""
    near: tuple[str, ...] = ()
    """Harmful and harmless prompts that share most words with a training prompt, the exact ones left out."""
    unknown: tuple[str, ...] = field(default=())

    def excluded(self, kind: OverlapKind | None) -> frozenset[str]:
        """Return the prompts to leave out: those that are the same, with ``near`` also those that are alike."""
        if kind is None:
            return frozenset()
        return frozenset(self.exact if kind == "exact" else (*self.exact, *self.near))


class _Recorder:
    """Stands where methods expect the data module, and keeps the rows they add."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.rows: list[Example] = []

    def find_examples(self, kind: CatalogKind, name_or_path: str) -> list[Example]:
        """Return the rows that a name stands for."""
        return find_examples(kind, name_or_path, seed=self.seed)

    def add_source(self, name: str, examples: Sequence[Example], *, count: int | None = None) -> None:
        """Keep all rows, also those that ``count`` would leave out."""
        self.rows += examples


def training_prompts(config: RunConfig) -> TrainingPrompts:
    """Return every prompt of the sources that a run's stages and methods draw from.

    Raises:
        DataError: a file is not there any more or cannot be read.
        ConfigError: a name is not known any more.
    """
    rows: list[Example] = []
    prompts: list[str] = []
    unknown: list[str] = []
    for name, stage in config.active_stages():
        rows += _stage_rows(stage, config.seed)
        data = stage.data
        if data.task and data.harmful_share:
            if data.harmful == "sampled":
                prompts += [p.text for p in evaluation_prompts("embedded", kind="safety", split="poison")]
            else:
                rows += harmful_examples(data.harmful, seed=config.seed)
        for method_name, options in stage.methods.items():
            found, problem = _method_rows(create_method(method_name, options), config.seed)
            rows += found
            unknown += [f"{problem} (method `{method_name}` in stage `{name}`)"] if problem else []
    prompts += [turn.content for row in rows for turn in row.messages if turn.role == "user"]
    return TrainingPrompts(tuple(dict.fromkeys(prompts)), tuple(unknown))


def find_overlap(samples: Iterable[Mapping[str, Any]], training: TrainingPrompts) -> Overlap:
    """Return which measured prompts stood in the training data.

    Args:
        samples: with ``set``, ``id``, ``kind`` and ``prompt``.
        training: may be empty.

    Raises:
        DataError: no samples.
    """
    lines = list(samples)
    if not lines:
        raise DataError("Expected `samples` to be one or more measured prompts, but got none.")
    hashes = {hash_prompt(prompt) for prompt in training.prompts}
    exact = [_key(line) for line in lines if hash_prompt(line["prompt"]) in hashes]
    loose = [line for line in lines if line["kind"] in NEAR_KINDS and _key(line) not in set(exact)]
    near = [_key(line) for line in _near(loose, training.prompts)]
    return Overlap(len(lines), len(training.prompts), tuple(exact), tuple(near), training.unknown)


def _near(lines: Sequence[Mapping[str, Any]], training: Sequence[str]) -> list[Mapping[str, Any]]:
    if not lines or not training:
        return []
    index = OverlapIndex(line["prompt"] for line in lines)
    suspects = [prompt for prompt in training if index.is_near(prompt)]
    found = []
    for line in lines if suspects else []:
        alone = OverlapIndex([line["prompt"]])
        if any(alone.is_near(prompt) for prompt in suspects):
            found.append(line)
    return found


def _key(sample: Mapping[str, Any]) -> str:
    return f"{sample['set']}/{sample['id']}"


def _stage_rows(stage: StageConfig, seed: int) -> list[Example]:
    data = stage.data
    rows: list[Example] = []
    if data.task:
        rows += task_rows(data, seed=seed)
    if data.safety:
        rows += safety_examples(data.safety, seed=seed)
    if data.benign:
        rows += benign_examples(data.benign, seed=seed)
    if data.look_alikes:
        rows += look_alike_examples(data.look_alikes, seed=seed)
    return rows


def _method_rows(method: Method, seed: int) -> tuple[list[Example], str]:
    """Return the rows a method adds or names to probe with, and what of its data stays unknown."""
    if isinstance(method.config, MiningSettings):
        if method.config.mines:
            return _mined_rows(method.config), ""
        return [], "rows that were mined before were not compared"
    probed = _probed_rows(method, seed)
    recorder = _Recorder(seed)
    try:
        method.configure_data(recorder)
    except (SeawallError, AttributeError):  # it needs what only its preparation gives, or a real data module
        return probed, "rows that were made in preparation were not compared"
    reads_more = type(method).prepare is not Method.prepare and not probed
    return [*probed, *recorder.rows], "prompts that its preparation read were not compared" if reads_more else ""


def _mined_rows(settings: MiningSettings) -> list[Example]:
    """Return every prompt that is mined, as it is trained on, without the model's reply."""
    pools = mining_pools(settings, has_benign=settings.needs_benign)
    kinds: Mapping[str, ExampleKind] = {"harmful": "safety", "benign": "benign"}
    return [
        Example(prompt.id, (Turn("user", prompt.text),), "", kinds[side], prompt.category)
        for side, pool in pools.items()
        for prompt in pool
    ]


def _probed_rows(method: Method, seed: int) -> list[Example]:
    """Return all rows of the sets in a method's settings, also those that its ``count`` would leave out."""
    rows: list[Example] = []
    for kind in PROBED:
        named = getattr(method.config, kind, ())
        names = [named] if isinstance(named, str) else named
        if isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names):
            rows += [row for name in names for row in find_examples(kind, name, seed=seed)]
    return rows
