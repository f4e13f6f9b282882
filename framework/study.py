"""Studies: a grid of runs over methods, tasks, harmful shares, models and seeds.

A study starts from one recipe and changes it cell by cell; every cell is checked before the first one starts, so a
grid of two days does not stop at its last row because of a spelling mistake.
"""

# ruff: noqa: RUF009 - `setting` is dataclasses.field with a rule, which ruff does not know.

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from framework.config import (
    KnownNames,
    MethodCheck,
    Override,
    RunConfig,
    apply_overrides,
    check_run,
    method_settings,
    override_raw,
    parse_overrides,
    read_config,
)
from framework.errors import ConfigError, describe_unknown
from framework.fields import COUNT_OR_ZERO, NOT_EMPTY, SHARE, build_instance, check_instance, check_mapping, setting
from framework.schema import FOLDER_NAME, StageName

__all__ = [
    "GridConfig",
    "StudyCell",
    "StudyConfig",
    "VariantConfig",
    "check_measured",
    "compose_variants",
    "load_study_config",
    "study_cells",
]

PLUS = " + "
"""Joins the parts of a composition in its label."""


@dataclass(frozen=True)
class VariantConfig:
    """One column of the comparison: the methods of a stage, and what else differs from the base."""

    methods: dict[str, dict[str, Any]] = setting(factory=dict)
    """Registered method name to its settings; empty is plain training."""
    stage: StageName = "finetune"
    """Stage the methods belong to."""
    overrides: dict[str, Any] = setting(factory=dict)
    """Dotted key to value, put into the base as on the command line."""

    def __post_init__(self) -> None:
        """Raise ConfigError listing every field that is wrong."""
        check_instance(self)


@dataclass(frozen=True)
class GridConfig:
    """What is varied; an empty list keeps the base's value."""

    methods: dict[str, VariantConfig] = setting(rule=NOT_EMPTY)
    """Label in the tables to methods, e.g. ``AsFT: {asft: {weight: 1.0}}``, or a full variant with overrides. A label
    such as ``AsFT + PACT`` without a value composes the labels, or registered methods, that it names, in that order."""
    tasks: list[str] = setting(factory=list)
    harmful_shares: list[float] = setting(factory=list, rule=SHARE)
    models: list[str] = setting(factory=list)
    seeds: list[int] = setting(factory=list, rule=COUNT_OR_ZERO)

    def __post_init__(self) -> None:
        """Raise ConfigError listing every field that is wrong."""
        check_instance(self)


@dataclass(frozen=True)
class StudyConfig:
    """A base run and the grid laid over it."""

    name: str = setting(rule=FOLDER_NAME)
    base: dict[str, Any] = setting(rule=NOT_EMPTY)
    """The base run as plain values; a file may name a recipe instead."""
    grid: GridConfig = setting()
    """What is varied."""
    reference: str | None = None
    """Label the others are compared with; null takes the first."""

    def __post_init__(self) -> None:
        """Raise ConfigError listing every field that is wrong."""
        check_instance(self)

    @property
    def reference_label(self) -> str:
        """The label the others are compared with."""
        return self.reference or next(iter(self.grid.methods))


@dataclass(frozen=True)
class StudyCell:
    """One run of the grid."""

    name: str
    """Unique in the study and stable when the grid grows."""
    label: str
    task: str | None
    harmful_share: float
    model: str
    seed: int
    config: RunConfig


def load_study_config(name: str | Path, overrides: Sequence[str] = ()) -> StudyConfig:
    """Return a study from a file or by name, and the command line.

    Overrides of ``name``, ``base``, ``grid`` and ``reference`` are about the study, all others about its base run.

    Raises:
        ConfigError: the file is missing or no YAML, or the study's own settings are wrong; every problem is listed.
    """
    values = read_config(name, kind="study")
    own, inner = [], []
    for override in parse_overrides(overrides):
        if override.key == "base" or override.key.split(".")[0] in {field.name for field in fields(StudyConfig)} - {
            "base"
        }:
            own.append(override)
        else:
            inner.append(Override(override.key.removeprefix("base."), override.value))
    values = override_raw(values, own)
    if isinstance(values.get("base"), str):
        values["base"] = read_config(values["base"], kind="recipe")
    if isinstance(values.get("base"), dict):
        values["base"] = override_raw(values["base"], inner)
    problems = _spell_out_variants(values)
    problems += [problem.text for problem in check_mapping(StudyConfig, values)]
    labels = _labels(values)
    reference = values.get("reference")
    if isinstance(reference, str) and labels and reference not in labels:
        problems.append(describe_unknown("reference", reference, labels))
    if problems:
        raise ConfigError(problems)
    return build_instance(StudyConfig, values)


def study_cells(
    study: StudyConfig, *, known: KnownNames | None = None, validate_methods: MethodCheck | None = None
) -> list[StudyCell]:
    """Return every run of the grid, methods varying fastest, each checked.

    Raises:
        ConfigError: the settings of some cell are wrong, or two cells have the same name; every problem is listed once.
    """
    cells: list[StudyCell] = []
    problems: dict[str, str] = {}
    for label, overrides in _grid_points(study):
        try:
            values = apply_overrides(study.base, overrides)
        except ConfigError as error:
            problems.update({text: label for text in error.problems if text not in problems})
            continue
        checked = check_run(values, known=known, validate_methods=validate_methods)
        problems.update({text: label for text in checked.problems if text not in problems})
        if checked.config is not None:
            cell = _cell(study, label, checked.config)
            if any(cell.name == other.name for other in cells):
                problems[f"Expected every run to have its own name, but got {cell.name!r} twice."] = label
            cells.append(cell)
    if problems:
        raise ConfigError([f"In `{label}`: {text}" for text, label in problems.items()])
    return cells


def check_measured(cells: Sequence[StudyCell]) -> None:
    """Refuse runs that do not measure their last model; a study would compare earlier ones under its name.

    Raises:
        ConfigError: names every variant and what it lacks, once.
    """
    problems: dict[str, None] = {}
    for cell in cells:
        last = next((name for name, _ in reversed(cell.config.active_stages())), "start")
        if last not in cell.config.evaluate.after:
            problems[
                f"In `{cell.label}`: Expected `evaluate.after` to hold `{last}`, after which the run's last model is "
                f"there, but got {list(cell.config.evaluate.after)}. Add it."
            ] = None
    if problems:
        raise ConfigError(list(problems))


def _grid_points(study: StudyConfig) -> Iterator[tuple[str, list[Override]]]:
    """Yield the label and the overrides of every cell."""
    grid = study.grid
    axes: list[list[Override | None]] = []
    for key, values in (
        ("model.name", grid.models),
        ("stages.finetune.data.task", grid.tasks),
        ("stages.finetune.data.harmful_share", grid.harmful_shares),
        ("seed", grid.seeds),
    ):
        axes.append([Override(key, value) for value in values] or [None])
    for point in itertools.product(*axes):
        shared = [override for override in point if override is not None]
        for label, variant in grid.methods.items():
            own = [Override(key, value) for key, value in variant.overrides.items()]
            yield label, [*shared, Override(f"stages.{variant.stage}.methods", dict(variant.methods)), *own]


def _cell(study: StudyConfig, label: str, config: RunConfig) -> StudyCell:
    task = config.task()
    name = task[0] if task else None
    # A repair on clean rows does not undo that the model was fine-tuned on poisoned ones.
    share = max((stage.data.harmful_share for _, stage in config.active_stages() if stage.data.task), default=0.0)
    parts = [label, name or "no-task", f"p{share:g}", Path(config.model.name).name, f"seed{config.seed}"]
    slug = "-".join(re.sub(r"[^\w.]+", "-", part.lower()).strip("-.") for part in parts)
    tracking = replace(config.tracking, group=config.tracking.group or study.name)
    named = replace(config, name=f"{study.name}/{slug}", tracking=tracking)
    return StudyCell(slug, label, name, share, config.model.name, config.seed, named)


def _labels(values: Mapping[str, Any]) -> list[str]:
    grid = values.get("grid")
    methods = grid.get("methods") if isinstance(grid, dict) else None
    return list(methods) if isinstance(methods, dict) else []


def _spell_out_variants(values: dict[str, Any]) -> list[str]:
    """Write ``label: {method: {...}}`` and ``A + B:`` out as variants; return what is wrong with compositions.

    A mapping that uses only a variant's keys is a variant already.
    """
    own = {field.name for field in fields(VariantConfig)}
    labels, problems = _labels(values), []
    methods = values["grid"]["methods"] if labels else {}
    for label in labels:
        given = methods[label]
        if isinstance(given, dict) and not (given and set(given) <= own):
            methods[label] = {"methods": given}
    for label in labels:
        if methods[label] is None and PLUS in label:
            try:
                methods[label] = compose_variants(label, methods)
            except ConfigError as error:
                problems += error.problems
                methods[label] = {"methods": {}}
    return problems


def compose_variants(label: str, variants: Mapping[str, Any]) -> dict[str, Any]:
    """Return the variant that ``A + B`` stands for: methods of all parts, in that order, and all their overrides.

    Args:
        label: names of the parts joined by `` + ``; a part is a label of ``variants`` or a registered method.
        variants: label to variant, as plain values.

    Raises:
        ConfigError: an unknown part, or parts that contradict each other; every problem is listed.

    Example:
        >>> compose_variants("A + B", {"A": {"methods": {"a": {}}}, "B": {"methods": {"b": {}}}})["methods"]
        {'a': {}, 'b': {}}
    """
    problems: list[str] = []
    stages: dict[str, dict[str, Any]] = {}
    overrides: dict[str, Any] = {}
    for part in label.split(PLUS):
        known = variants.get(part)
        if not isinstance(known, Mapping):
            if not part.isidentifier():
                problems.append(
                    describe_unknown(f"part of {label!r}", part, [name for name in variants if name != label])
                )
                continue
            known = {"methods": method_settings(part)}
        chosen = stages.setdefault(str(known.get("stage", "finetune")), {})
        for name, settings in (known.get("methods") or {}).items():
            if name in chosen:
                problems.append(f"Expected every part of {label!r} to bring other methods, but got `{name}` twice.")
            chosen[name] = settings
        for key, value in (known.get("overrides") or {}).items():
            if overrides.setdefault(key, value) != value:
                problems.append(
                    f"Expected the parts of {label!r} to agree on `{key}`, but got {overrides[key]!r} and {value!r}."
                )
    if problems:
        raise ConfigError(problems)
    first, *others = stages
    own: dict[str, Any] = {f"stages.{stage}.methods": stages[stage] for stage in others}
    # A composition says the order in which its parts act, where that matters.
    own |= {f"stages.{stage}.order": list(chosen) for stage, chosen in stages.items() if len(chosen) > 1}
    return {"methods": stages[first], "stage": first, "overrides": {**overrides, **own}}
