"""What a user may write short in a configuration, spelt out; works on plain nested values, before any check.

A mapping where none is expected, or the other way round, is left alone here: the check that follows reports it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, cast

from framework.errors import ConfigError
from framework.schema import STAGES, TrainingConfig

__all__ = ["SCHEDULE", "escape", "find_hidden", "inherit_adapter", "nested", "spell_out", "spell_out_methods", "tidy"]

SCHEDULE = {"max_steps": "max_epochs", "max_epochs": "max_steps"}
"""Two ways to give the length of training; giving one unsets the other."""

METHOD = "method"
"""``method=NAME`` puts the default settings of a method into the stage that is fine-tuned."""

_METHODS = "stages.finetune.methods"
_TRAINING_FIELDS = {field.name for field in fields(TrainingConfig)}


def find_hidden(key: str, values: Mapping[str, Any]) -> str | None:
    """Return a sentence when setting ``key`` does nothing, because every stage sets its own or for a like reason."""
    if key == METHOD:
        return (
            "Expected `method` to be given to `seawall run`, whose `finetune` stage it fills, but got it elsewhere. A "
            "study names its methods in the grid: grid.methods.LABEL={NAME: {}}."
        )
    if not _is_hidden(key, values):
        return None
    stages = [f"stages.{name}.{key}" for name in _present(values)]
    return f"Expected `{key}` to have an effect, but every stage sets its own. Write {' or '.join(stages)}."


def _is_hidden(key: str, values: Mapping[str, Any]) -> bool:
    """Return whether a run-level training setting is replaced by every stage, so that setting it does nothing."""
    first, *rest = key.split(".")
    if first not in _TRAINING_FIELDS or (first == "adapter") != bool(rest):
        return False
    stages = [nested(values, "stages", name) for name in _present(values)]
    names = {first, SCHEDULE.get(first, first)}

    def sets_own(stage: dict[str, Any]) -> bool:
        if first == "adapter":
            return rest[0] in nested(stage, "adapter")
        return any(stage.get(name) is not None for name in names)

    return bool(stages) and all(sets_own(stage) for stage in stages)


def _present(values: Mapping[str, Any]) -> list[str]:
    return [name for name in STAGES if isinstance(nested(values, "stages").get(name), dict)]


def spell_out_methods(
    overrides: Sequence[tuple[str, Any]],
    values: Mapping[str, Any],
    *,
    read: Callable[[str], Mapping[str, Any]],
) -> list[tuple[str, Any]]:
    """Return the overrides of a run with ``method=NAME`` and ``methods.NAME.<field>`` spelt out.

    ``method=a,b`` and ``method=a method=b`` say the same. The methods replace those of the recipe's ``finetune`` stage,
    with the settings that ``read`` gives; what else is overridden is applied afterwards, wherever it was written.

    Args:
        overrides: key and value, as given.
        values: the recipe.
        read: returns the default ``methods:`` entry of a method, by name.

    Raises:
        ConfigError: no name, a name given twice, no ``finetune`` stage, ``methods`` set as a whole as well, or a
            setting of a method that is not named.
    """
    rest = [(_full_key(key), value) for key, value in overrides if key != METHOD]
    given = [value for key, value in overrides if key == METHOD]
    if not given:
        return rest
    names = [name for value in given for name in _method_names(value)]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise ConfigError(f"Expected `method` to name every method once, but got {doubled[0]!r} more than once.")
    whole = [key for key, _ in rest if key == _METHODS or _METHODS.startswith(f"{key}.")]
    if whole:
        raise ConfigError(f"Expected either `method` or `{whole[0]}` to be given, but got both. Leave one out.")
    if not isinstance(nested(values, "stages").get("finetune"), dict):
        raise ConfigError(
            "Expected the recipe to have a `finetune` stage for `method` to fill, but it has none. Write "
            "stages.<stage>.methods={NAME: {}} for another stage."
        )
    _check_named(rest, names)
    settings: dict[str, Any] = {}
    for name in names:
        settings.update(read(name))
    return [(_METHODS, settings), *rest]


def _check_named(overrides: Sequence[tuple[str, Any]], names: Sequence[str]) -> None:
    """Refuse a setting of a method that ``method`` does not name: it would add that method without a word.

    Args:
        overrides: key and value, spelt out.
        names: what ``method`` names.

    Raises:
        ConfigError: lists every such setting.
    """
    problems = []
    for key, _ in overrides:
        name = key.removeprefix(f"{_METHODS}.").split(".")[0]
        if key.startswith(f"{_METHODS}.") and name not in names:
            short = key.removeprefix("stages.finetune.")
            problems.append(
                f"Expected `{short}` to set a method that `method` names, but got {', '.join(names)}. Write "
                f"method={','.join([*names, name])} to have both."
            )
    if problems:
        raise ConfigError(problems)


def _full_key(key: str) -> str:
    first, dot, rest = key.partition(".")
    return f"{_METHODS}{dot}{rest}" if first == "methods" else key


def _method_names(value: Any) -> list[str]:
    names = value.split(",") if isinstance(value, str) else value
    names = names if isinstance(names, list) else [names]
    if not names or not all(isinstance(name, str) and name.strip() for name in names):
        raise ConfigError(
            f"Expected `method` to be a method's name or a list of names, but got {value!r}. Write methods={{}} for "
            "plain training."
        )
    return [name.strip() for name in names]


def spell_out(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return one layer with ``model: NAME`` written out and the schedule it does not choose unset."""
    layer = copy.deepcopy(dict(values))
    if isinstance(layer.get("model"), str):
        layer["model"] = {"name": layer["model"]}
    for level in (layer, *(nested(layer, "stages", stage) for stage in STAGES)):
        for given, other in SCHEDULE.items():
            if level.get(given) is not None and other not in level:
                level[other] = None
    return layer


def tidy(values: dict[str, Any]) -> dict[str, Any]:
    """Return merged values with YAML's habits undone: ``off`` is no boolean, one name is a list of one."""
    tracking = values.get("tracking")
    if isinstance(tracking, dict) and tracking.get("wandb") is False:
        tracking["wandb"] = "off"
    stages = [nested(values, "stages", stage) for stage in STAGES]
    for level in (values, *stages):
        adapter = level.get("adapter")
        if isinstance(adapter, dict) and isinstance(adapter.get("targets"), str):
            adapter["targets"] = [adapter["targets"]]
    for stage in stages:
        if "methods" in stage and stage["methods"] is None:
            stage["methods"] = {}
    return values


def inherit_adapter(values: dict[str, Any]) -> dict[str, Any]:
    """Return values in which a stage that changes part of the adapter keeps the rest of the run's."""
    shared = values.get("adapter")
    for name in STAGES:
        stage = nested(values, "stages", name)
        if isinstance(shared, dict) and isinstance(stage.get("adapter"), dict):
            stage["adapter"] = {**shared, **stage["adapter"]}
    return values


def nested(values: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """Return the nested mapping, or an empty one where there is none."""
    for key in keys:
        found = values.get(key)
        if not isinstance(found, dict):
            return {}
        values = found
    return cast(dict[str, Any], values)


def escape(value: Any) -> Any:
    """Return ``value`` with ``${`` in texts escaped, so that OmegaConf does not take it for a reference."""
    if isinstance(value, str):
        return value.replace("${", "\\${")
    if isinstance(value, Mapping):
        return {key: escape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [escape(item) for item in value]
    return value
