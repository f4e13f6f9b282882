"""What must hold between the settings of a run, beyond the type and range of each one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from framework.endpoint_settings import EndpointSettings, is_endpoint
from framework.errors import describe_unknown
from framework.evaluation.guards import check_guard_name, is_guard_name
from framework.fields import Problem
from framework.guard_settings import guard_problems
from framework.held_out import PromptSources, held_out_problems
from framework.schema import DataConfig, EvaluateCommandConfig, EvaluateConfig, ModelConfig, RunConfig, StageConfig

__all__ = ["KnownNames", "MethodCheck", "evaluate_problems", "run_problems"]

MethodCheck = Callable[[dict[str, dict[str, Any]], Sequence[str]], list[str]]
"""Takes the methods of one stage and their declared order, returns one sentence per problem."""


_FILES = "A file"
_TASK_FILES = "A .json or .jsonl file"


@dataclass(frozen=True)
class KnownNames:
    """Registered names, to refuse a misspelt one early; None leaves a kind unchecked.

    A model, task or data set that looks like a path or a hub id (it holds a slash or a backslash, ends in a suffix, or
    exists on disk) is never compared with these.
    """

    tasks: frozenset[str] | None = None
    judges: frozenset[str] | None = None
    models: frozenset[str] | None = None
    safety_data: frozenset[str] | None = None
    """Harmful requests with refusals, to train on."""
    benign_data: frozenset[str] | None = None
    """Ordinary requests with answers, to train on."""
    look_alikes_data: frozenset[str] | None = None
    """Harmless requests in alarming words with answers, to train on."""
    safety_sets: frozenset[str] | None = None
    """Harmful prompts to evaluate on."""
    over_refusal_sets: frozenset[str] | None = None
    """Harmless look-alikes to evaluate on."""
    prompt_sources: PromptSources | None = None
    """Where the prompts of a set lie, to refuse one that is both learnt from and measured; None compares none."""


def run_problems(config: RunConfig, *, known: KnownNames, validate_methods: MethodCheck | None) -> list[Problem]:
    """Return every problem between the settings of ``config``."""
    problems = [*_run_schedule(config), *_model_name(config.model, known)]
    for name, stage in config.active_stages():
        path = f"stages.{name}"
        problems += _schedule(config, name, stage)
        problems += _data(stage.data, f"{path}.data", known)
        problems += _methods(stage, path, validate_methods)
        if config.training(name).has_training and not _has_data(stage.data):
            text = "to name what is trained on (`task`, `safety` or `benign`), but got none of them"
            problems.append(Problem(f"{path}.data", f"Expected `{path}.data` {text}. Set max_steps=0 for edits only."))
    problems += _evaluation(config.evaluate, known)
    if known.prompt_sources is not None:
        problems += held_out_problems(config, known.prompt_sources)
    problems += _evaluation_points(config)
    stages = dict(config.active_stages())
    trained = [name for name in stages if config.training(name).has_training]
    problems += guard_problems(
        config.trainer.guard, {name: list(stage.methods) for name, stage in stages.items()}, trained=trained
    )
    if config.evaluate.task and config.task() is None:
        text = "Expected `evaluate.task` to be false, because no stage names a task, but got True."
        problems.append(Problem("stages", text))
    return problems


def evaluate_problems(config: EvaluateCommandConfig, *, known: KnownNames) -> list[Problem]:
    """Return every problem between the settings of an evaluation without training."""
    problems = [*_model_name(config.model, known), *_evaluation(config.evaluate, known)]
    if config.task is not None:
        problems += _known_name("task", config.task, known.tasks, places=_TASK_FILES)
    if config.evaluate.task != (config.task is not None):
        text = f"Expected `task` to name a task exactly when `evaluate.task` is true, but got {config.task!r}."
        problems.append(Problem("task", f"{text} Write task=NAME."))
    if config.endpoint != EndpointSettings() and not is_endpoint(config.model.name):
        text = f"Expected `endpoint` to be unset for a model with weights, but got settings and {config.model.name!r}."
        problems.append(Problem("endpoint", f"{text} Name an endpoint as URL#MODEL, or leave them out."))
    if config.trainer.guard is not None:
        text = "Expected `trainer.guard` to be null where nothing is trained, but got settings. Leave it out."
        problems.append(Problem("trainer.guard", text))
    attack = config.evaluate
    if attack.prefill and attack.prefill_replies == "sampled" and attack.prefill_model is None:
        text = "Expected `evaluate.prefill_model` to name the unaligned model that samples compliant replies, but got"
        remedy = "Name it, or write evaluate.prefill_replies=opening for one fixed opening."
        problems.append(Problem("evaluate.prefill_model", f"{text} None. {remedy}"))
    return problems


def _run_schedule(config: RunConfig) -> Iterator[Problem]:
    if config.max_steps is not None and config.max_epochs is not None:
        yield _both("max_steps", "max_epochs", config.max_steps, config.max_epochs)


def _schedule(config: RunConfig, name: str, stage: StageConfig) -> Iterator[Problem]:
    path = f"stages.{name}"
    if stage.max_steps is not None and stage.max_epochs is not None:
        yield _both(f"{path}.max_steps", f"{path}.max_epochs", stage.max_steps, stage.max_epochs)
    training = config.training(name)
    if training.max_steps is None and training.max_epochs is None:
        text = f"Expected `{path}` to have `max_steps` or `max_epochs`, but got neither."
        yield Problem(f"{path}.max_steps", text)
    micro = training.micro_batch_size
    processes = config.trainer.devices * config.trainer.num_nodes
    if training.has_training and training.batch_size % processes:
        text = f"to be a multiple of the {processes} processes, but got {training.batch_size}. Use fewer devices."
        yield Problem(f"{path}.batch_size", f"Expected `batch_size` of `{path}` {text}")
    elif micro is not None and (training.batch_size // processes or 1) % micro:
        each = training.batch_size // processes
        share = "" if processes == 1 else f", of which each of {processes} processes has {each}"
        text = f"to divide the batch of {training.batch_size} rows{share}, but got {micro}."
        yield Problem(f"{path}.micro_batch_size", f"Expected `micro_batch_size` of `{path}` {text}")


def _both(first: str, second: str, first_value: int, second_value: int) -> Problem:
    text = f"Expected either `{first}` or `{second}` to be null, but got {first_value} and {second_value}."
    return Problem(first, text)


def _has_data(data: DataConfig) -> bool:
    return any((data.task, data.safety, data.benign, data.look_alikes))


def _data(data: DataConfig, path: str, known: KnownNames) -> Iterator[Problem]:
    for field in ("task_path", "task_count", "harmful_share"):
        if getattr(data, field) and not data.task:
            text = f"Expected `{path}.task` to be given with `{field}`, but got None."
            yield Problem(f"{path}.{field}", text)
    if data.task and data.task_count is None:
        text = f"Expected `{path}.task_count` to be the number of task rows, but got None. Write a number."
        yield Problem(f"{path}.task_count", text)
    for part in ("safety", "benign", "look_alikes"):
        count = getattr(data, f"{part}_count")
        if count and not getattr(data, part):
            yield Problem(
                f"{path}.{part}_count", f"Expected `{path}.{part}` to be given with `{part}_count`, but got None."
            )
        yield from _known_name(f"{path}.{part}", getattr(data, part), getattr(known, f"{part}_data"), places=_FILES)
    yield from _known_name(f"{path}.task", data.task, known.tasks, places=_TASK_FILES)


def _methods(stage: StageConfig, path: str, validate: MethodCheck | None) -> Iterator[Problem]:
    if validate is not None:
        for text in validate(stage.methods, stage.order or ()):
            yield Problem(f"{path}.methods", f"In `{path}.methods`: {text}")
    for name in stage.order or []:
        if name not in stage.methods:
            yield Problem(f"{path}.order", describe_unknown(f"{path}.order", name, stage.methods))


def _evaluation(config: EvaluateConfig, known: KnownNames) -> Iterator[Problem]:
    for name in config.judges:
        if is_guard_name(name):
            yield from (Problem("evaluate.judges", text) for text in check_guard_name(name))
        else:
            yield from _known_name("evaluate.judges", name, known.judges)
    if config.judges and all(is_guard_name(name) for name in config.judges):
        text = f"Expected `evaluate.judges` to name a judge beside guard models, but got {config.judges!r}."
        yield Problem("evaluate.judges", f"{text} Add `rules`, which knows refusals and needs no model.")
    for field in ("safety", "over_refusal"):
        for name in getattr(config, field):
            yield from _known_name(f"evaluate.{field}", name, getattr(known, f"{field}_sets"), places=_FILES)
    if not any((config.safety, config.over_refusal, config.task)):
        text = "Expected `evaluate` to measure replies, but safety, over_refusal and task are all empty or false."
        yield Problem("evaluate", f"{text} Name at least one set.")
    yield from _prefill(config)


def _prefill(config: EvaluateConfig) -> Iterator[Problem]:
    if config.prefill and not config.safety:
        text = "Expected `evaluate.safety` to name the prompts that `evaluate.prefill` attacks, but got none."
        yield Problem("evaluate.prefill", f"{text} Add `embedded`.")
    if len(set(config.prefill)) < len(config.prefill):
        text = f"Expected the numbers of `evaluate.prefill` to be different, but got {config.prefill!r}."
        yield Problem("evaluate.prefill", text)


def _evaluation_points(config: RunConfig) -> Iterator[Problem]:
    if not config.evaluation_points():
        present = ", ".join(["start", *(name for name, _ in config.active_stages())])
        text = f"Expected `evaluate.after` to name a part of this run ({present}), but got {config.evaluate.after!r}."
        yield Problem("stages", text)


def _model_name(config: ModelConfig, known: KnownNames) -> Iterator[Problem]:
    yield from _known_name("model.name", config.name, known.models, places="A folder, a GGUF file or a hub id")


def _known_name(path: str, name: str | None, known: frozenset[str] | None, *, places: str = "") -> Iterator[Problem]:
    """Yield a problem when ``name`` is not ``known``; ``places`` says what else than a registered name is accepted."""
    if name is None or known is None or name in known or (places and _is_place(name)):
        return
    yield Problem(path, describe_unknown(path, name, known) + (f" {places} works too." if places else ""))


def _is_place(name: str) -> bool:
    """Return whether ``name`` is a path or a hub id rather than a registered name."""
    suffix = Path(name).suffix
    return "/" in name or "\\" in name or (suffix[1:].isalpha() and suffix != "") or Path(name).exists()
