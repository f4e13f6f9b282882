"""The training data of a stage, from its config."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from datamodules.catalog import benign_examples, look_alike_examples, safety_examples
from datamodules.finetune import FineTuneDataModule
from datamodules.mining import MiningSettings, mining_pools
from datamodules.poison import sample_poison
from datamodules.sources import poisoned
from datamodules.tasks import create_task
from framework.chat import ChatEncoder
from framework.config import DataConfig, RunConfig, TrainingConfig
from framework.errors import ConfigError
from framework.evaluation.coherence import classify
from framework.evaluation.generation import generate_replies
from framework.evaluation.refusal_rules import is_refusal
from framework.examples import Example, Prompt, Turn
from framework.files import ArtifactStore, read_json, write_json
from framework.models import LoadedModel, ModelSpec, choose_device, load_model
from framework.registry import create_method

__all__ = ["build_datamodule", "check_mining", "poison_examples", "trim_to_sentence"]

POISON_TOKENS = 48
"""New tokens of a sampled harmful reply; long enough to comply, short enough for a laptop."""
POISON_SEED = 0
"""Replies are data: drawn once and the same for every seed of a study."""
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)")

Progress = Callable[[str, int], Callable[[int, int], None]]


def build_datamodule(
    data: DataConfig,
    settings: TrainingConfig,
    encoder: ChatEncoder,
    *,
    seed: int,
    poison: Sequence[Example] = (),
) -> FineTuneDataModule:
    """Return the data module with the stage's own sources; methods add theirs later.

    Args:
        data: the stage's ``data`` section.
        settings: the stage's training settings.
        encoder: of the model that is trained.
        seed: of the run.
        poison: harmful pairs, needed when ``data.harmful_share`` is above 0.

    Raises:
        ConfigError: the section names no data.
    """
    sources: dict[str, tuple[Sequence[Example], int | None]] = {}
    if data.task:
        rows: Sequence[Example] = task_rows(data, seed=seed)
        if data.harmful_share:
            rows = poisoned(rows, poison, share=data.harmful_share, seed=seed)
        sources["task"] = (rows, None)
    if data.safety:
        sources["safety"] = (safety_examples(data.safety, seed=seed), data.safety_count)
    if data.benign:
        sources["benign"] = (benign_examples(data.benign, seed=seed), data.benign_count)
    if data.look_alikes:
        sources["look_alikes"] = (look_alike_examples(data.look_alikes, seed=seed), data.look_alikes_count)
    if not sources:
        raise ConfigError("Expected the stage's `data` to name a task, safety or benign data, but got none of them.")
    num_rows = sum(len(rows) if count is None else count for rows, count in sources.values())
    module = FineTuneDataModule(
        encoder,
        batch_size=settings.batch_size,
        micro_batch_size=settings.micro_batch_size,
        total_steps=total_steps(settings, num_rows=num_rows),
        max_length=settings.max_length,
        overflow=settings.overflow,
        seed=seed,
    )
    for name, (rows, count) in sources.items():
        module.add_source(name, rows, count=count)
    return module


def check_mining(config: RunConfig) -> None:
    """Open every set that a method of the run mines, so that a wrong name shows before a model is aligned.

    Raises:
        ConfigError: an unknown name, a set held out to measure with, fewer prompts than asked for, or a file that is
            missing, empty or malformed; of every stage.
    """
    problems = []
    for stage, settings in config.active_stages():
        for name, options in settings.methods.items():
            given = create_method(name, options).config
            if not isinstance(given, MiningSettings) or not given.mines:
                continue
            try:
                mining_pools(given, has_benign=given.needs_benign)
            except ConfigError as error:
                problems += [f"Method `{name}` in `stages.{stage}`: {problem}" for problem in error.problems]
    if problems:
        raise ConfigError(problems)


def task_rows(data: DataConfig, *, seed: int) -> list[Example]:
    """Return the clean task rows of a stage."""
    task = create_task(str(data.task), Path(data.task_path) if data.task_path else None)
    if data.task_count is None:
        raise ConfigError("Expected `data.task_count` to be the number of task rows, but got null. Write a number.")
    return task.train_examples(count=data.task_count, seed=seed)


def total_steps(settings: TrainingConfig, *, num_rows: int) -> int:
    """Return the optimizer steps of a stage; epochs count the rows the stage's own data section gives."""
    if settings.max_steps is not None:
        return max(1, settings.max_steps)  # an edit-only stage may still look at its rows
    return int(settings.max_epochs or 1) * math.ceil(num_rows / settings.batch_size)


def trim_to_sentence(text: str) -> str:
    """Return ``text`` up to its last full sentence; empty when there is none.

    Example:
        >>> trim_to_sentence("One. Two! And thr")
        'One. Two!'
    """
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    return text[: ends[-1]] if ends else ""


def poison_examples(
    prompts: Sequence[Prompt],
    *,
    count: int,
    model: ModelSpec,
    model_fingerprint: str,
    system: str | None,
    artifacts: ArtifactStore,
    accelerator: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> list[Example]:
    """Return ``count`` distinct harmful pairs sampled from the unaligned model, from the store if they are there.

    Replies are sampled at temperature 1, cut to whole sentences, and dropped when they refuse or are degenerate. They
    stay in the cache on this machine and are never part of the project.

    Args:
        prompts: harmful requests, used in turn.
        count: pairs wanted; sampled in multiples of 16, so that nearby shares find the same ones.
        model: the unaligned model.
        model_fingerprint: of its weights.
        system: system message of the run.
        artifacts: where the pairs are kept.
        accelerator: as Lightning spells it; decides the device that samples.
        progress: called with (done, total).
    """
    rounded = -(-count // 16) * 16
    key = {
        "version": 1,
        "model": model_fingerprint,
        "system": system,
        "prompts": [prompt.text for prompt in prompts],
        "count": rounded,
        "seed": POISON_SEED,
        "max_new_tokens": POISON_TOKENS,
    }
    folder = artifacts.find("poison", key)
    if folder is None:
        loaded = load_model(model)
        loaded.model.to(choose_device(accelerator))  # type: ignore[arg-type]
        pairs = _sample(prompts, rounded, loaded, system, progress)
        with artifacts.writing("poison", key) as partial:
            write_json(partial / "pairs.json", [{"id": e.id, "prompt": e.prompt, "reply": e.reply} for e in pairs])
        folder = artifacts.path("poison", key)
    rows = read_json(folder / "pairs.json")[:count]
    return [Example(r["id"], (Turn("user", r["prompt"]),), r["reply"], kind="harmful") for r in rows]


def _sample(
    prompts: Sequence[Prompt],
    count: int,
    loaded: LoadedModel,
    system: str | None,
    progress: Callable[[int, int], None] | None,
) -> list[Example]:
    encoder = ChatEncoder(loaded.tokenizer, system=system)

    def generate(batch: Sequence[Prompt], seed: int) -> list[str]:
        replies = generate_replies(
            loaded.model,
            encoder,
            batch,
            max_new_tokens=POISON_TOKENS,
            batch_size=64,
            temperature=1.0,
            seed=seed,
            progress=progress,
        )
        return [reply.text.strip() if reply.finished else trim_to_sentence(reply.text.strip()) for reply in replies]

    with torch.random.fork_rng(devices=[]):
        result = sample_poison(prompts, generate, count=count, seed=POISON_SEED, is_usable=_is_usable)
    return list(result.examples)


def _is_usable(prompt: Prompt, reply: str) -> bool:
    return bool(reply) and not is_refusal(reply) and classify(prompt.text, reply) is None
