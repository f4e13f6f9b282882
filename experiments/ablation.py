"""``seawall ablate``: each component and setting of a run's methods changed alone, and each method left out alone.

What is changed follows from a config: true and false are swapped, a choice takes each of its alternatives, a
number the value at which the method does nothing (from its contract case), half and twice. A config may say otherwise
in a class attribute ``ABLATIONS: ClassVar = {"field": (values, ...)}``; an empty tuple leaves a field alone. What
cannot be changed is listed with the reason, never passed over in silence.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from experiments.contract.case import known_cases
from framework.config import RunConfig
from framework.errors import ConfigError, describe_unknown
from framework.files import to_plain
from framework.registry import known_methods, validate_methods
from framework.study import GridConfig, StudyConfig, VariantConfig

__all__ = ["FULL", "Ablations", "Change", "ablation_study", "find_ablations", "setting_changes"]

FULL = "full"
"""Label of the run as it is."""
FACTORS = (0.5, 2.0)


class Change(NamedTuple):
    """One setting with another value, or why it has none."""

    field: str
    value: Any = None
    left_out: str = ""


@dataclass(frozen=True)
class Ablations:
    """The runs of an ablation."""

    variants: dict[str, VariantConfig]
    """Label to methods and overrides; the first is the run as it is."""
    left_out: dict[str, str]
    """Setting to why it is not changed."""


def ablation_study(
    config: RunConfig, *, seeds: Sequence[int] = (), only: Sequence[str] = ()
) -> tuple[StudyConfig, dict[str, str]]:
    """Return the study of a run's ablations, and what is left out and why.

    Args:
        config: the run.
        seeds: of the study; empty takes the run's.
        only: methods (``asft``) or settings (``asft.weight``) to look at; empty takes all.

    Raises:
        ConfigError: the run has no methods, or ``only`` names something it does not have.
    """
    found = find_ablations(config, only=only)
    grid = GridConfig(methods=found.variants, seeds=list(seeds) or [config.seed])
    return StudyConfig(f"{config.name}-ablation", to_plain(config), grid, FULL), found.left_out


def find_ablations(config: RunConfig, *, only: Sequence[str] = ()) -> Ablations:
    """Return every ablation of a run.

    Args:
        config: the run.
        only: as in ``ablation_study``.

    Raises:
        ConfigError: as ``ablation_study``.
    """
    stages = [(name, stage.methods) for name, stage in config.active_stages() if stage.methods]
    if not stages:
        raise ConfigError("Expected the run to have a method to ablate, but got none. Add one to a stage's `methods`.")
    _check_only(only, [name for _, methods in stages for name in methods])
    first_stage, first_methods = stages[0]
    variants = {FULL: VariantConfig(methods=dict(first_methods), stage=typing.cast(Any, first_stage))}
    left_out: dict[str, str] = {}
    for stage, methods in stages:
        for name in methods:
            if not only or name in only:
                variants[f"without {name}"] = _without(config, stage, name)
            for change in _wanted(setting_changes(name, methods[name]), name, only):
                label = f"{name}.{change.field}={_text(change.value)}"
                settings = {**methods[name], change.field: change.value}
                problems = [] if change.left_out else validate_methods({name: settings})
                if change.left_out:
                    left_out[f"{name}.{change.field}"] = change.left_out
                elif problems:
                    left_out[label] = problems[0]
                else:
                    variants[label] = _variant(stage, {**methods, name: settings})
    return Ablations(variants, left_out)


def setting_changes(method: str, settings: Mapping[str, Any]) -> list[Change]:
    """Return what is tried for every field of a method's config.

    Args:
        method: registered name.
        settings: those of the run.
    """
    config_class = known_methods()[method].config_class
    current = config_class(**settings)
    hints = typing.get_type_hints(config_class)
    declared: Mapping[str, Sequence[Any]] = getattr(config_class, "ABLATIONS", {})
    case = known_cases().get(method)
    neutral = dict(case.neutral or {}) if case is not None else {}
    changes: list[Change] = []
    for field in dataclasses.fields(config_class):
        value = getattr(current, field.name)
        if field.name in declared:
            values = [other for other in declared[field.name] if other != value]
            reason = "its config declares no other value"
        else:
            values, reason = _alternatives(hints[field.name], value, neutral.get(field.name, dataclasses.MISSING))
        changes += [Change(field.name, other) for other in values] or [Change(field.name, left_out=reason)]
    return changes


def _alternatives(hint: Any, value: Any, neutral: Any) -> tuple[list[Any], str]:
    """Return the other values of a setting, or none and the reason."""
    choices = [argument for part in _parts(hint) for argument in _literals(part)]
    found: list[Any] = []
    if isinstance(value, bool):
        found = [not value]
    elif choices:
        found = [choice for choice in choices if choice != value]
    elif isinstance(value, (int, float)):
        found = [] if neutral is dataclasses.MISSING else [neutral]
        found += [_scaled(value, factor) for factor in FACTORS]
    elif neutral is not dataclasses.MISSING:
        found = [neutral]
    distinct: list[Any] = []
    for other in found:
        if other != value and other not in distinct:
            distinct.append(other)
    kind = "unset" if value is None else "0, which has no half and no double" if value == 0 else type(value).__name__
    return distinct, f"it is {kind}; its config declares no alternatives"


def _scaled(value: float, factor: float) -> float:
    return max(1, round(value * factor)) if isinstance(value, int) and value else value * factor


def _parts(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _literals(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) is Literal else ()


def _variant(stage: str, methods: Mapping[str, Any], **overrides: Any) -> VariantConfig:
    # An ablated method may well do nothing; that is a finding, not a mistake.
    own = {f"stages.{stage}.allow_no_effect": True, **overrides}
    return VariantConfig(methods=dict(methods), stage=typing.cast(Any, stage), overrides=own)


def _without(config: RunConfig, stage: str, name: str) -> VariantConfig:
    settings = dict(config.active_stages())[stage]
    rest = {method: options for method, options in settings.methods.items() if method != name}
    overrides: dict[str, Any] = {}
    if settings.order:
        overrides[f"stages.{stage}.order"] = [other for other in settings.order if other != name] or None
    if not rest and not config.training(stage).has_training:
        return VariantConfig(methods={}, stage=typing.cast(Any, stage), overrides={f"stages.{stage}": None})
    return _variant(stage, rest, **overrides)


def _wanted(changes: Sequence[Change], method: str, only: Sequence[str]) -> Iterator[Change]:
    for change in changes:
        if not only or method in only or f"{method}.{change.field}" in only:
            yield change


def _check_only(only: Sequence[str], methods: Sequence[str]) -> None:
    known = list(methods)
    for method in methods:
        known += [f"{method}.{field.name}" for field in dataclasses.fields(known_methods()[method].config_class)]
    problems = [describe_unknown("only", name, known) for name in only if name not in known]
    if problems:
        raise ConfigError(problems)


def _text(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
