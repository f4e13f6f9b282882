"""Configuration files: found, merged with the command line, checked as a whole, and turned into frozen dataclasses.

Order of merging: defaults of the schema, the recipe that is extended, the recipe file, ``key=value`` from the command
line. OmegaConf reads and merges; nothing outside this file sees it. It could build the dataclasses too, but it stops at
the first problem and takes several times as long. Every problem of a configuration is reported in one ``ConfigError``,
before any model loads.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from framework.consistency import KnownNames, MethodCheck, evaluate_problems, run_problems
from framework.errors import ConfigError
from framework.fields import Problem, build_instance, check_mapping
from framework.files import to_plain
from framework.schema import STAGES, RunConfig
from framework.schema import AdapterConfig as AdapterConfig
from framework.schema import DataConfig as DataConfig
from framework.schema import EvaluateCommandConfig as EvaluateCommandConfig
from framework.schema import EvaluateConfig as EvaluateConfig
from framework.schema import ModelConfig as ModelConfig
from framework.schema import StageConfig as StageConfig
from framework.schema import StagesConfig as StagesConfig
from framework.schema import TrackingConfig as TrackingConfig
from framework.schema import TrainerConfig as TrainerConfig
from framework.schema import TrainingConfig as TrainingConfig
from framework.shorthands import (
    SCHEDULE,
    escape,
    find_hidden,
    inherit_adapter,
    nested,
    spell_out,
    spell_out_methods,
    tidy,
)

__all__ = [
    "CONFIG_FOLDER",
    "CheckedRun",
    "KnownNames",
    "MethodCheck",
    "Override",
    "RunConfig",
    "apply_overrides",
    "check_run",
    "load_evaluate_config",
    "load_run_config",
    "method_settings",
    "override_raw",
    "parse_overrides",
    "read_config",
    "to_yaml",
]

CONFIG_FOLDER = Path(__file__).resolve().parents[1] / "experiments" / "configs"
"""Configurations that come with the project, one folder a kind."""

_SUFFIXES = (".yaml", ".yml")


class Override(NamedTuple):
    """One ``key=value`` of the command line."""

    key: str
    """Dotted."""
    value: Any


class CheckedRun(NamedTuple):
    """A run's settings, or what is wrong with them."""

    config: RunConfig | None
    problems: list[str]


def load_run_config(
    name: str | Path,
    overrides: Sequence[str] = (),
    *,
    known: KnownNames | None = None,
    validate_methods: MethodCheck | None = None,
) -> RunConfig:
    """Return the settings of a run from a recipe and the command line.

    Args:
        name: a YAML file, or the name of a recipe that comes with the project.
        overrides: ``key=value`` texts; values are YAML, ``model=NAME`` stands for ``model.name=NAME``, and
            ``stages.align=null`` leaves a stage out; ``method=NAME`` fills the ``finetune`` stage with a method's
            default settings, and ``methods.NAME.<field>=`` changes them.
        known: registered names of tasks, judges, models and data sets.
        validate_methods: checks the methods of one stage and returns one sentence per problem.

    Raises:
        ConfigError: the file is missing or no YAML, or the settings are wrong; every problem is listed.
    """
    recipe = read_config(name, kind="recipe")
    given = spell_out_methods(parse_overrides(overrides), recipe, read=method_settings)
    hidden: list[str] = []
    values = apply_overrides(recipe, [Override(*pair) for pair in given], hidden=hidden)
    checked = check_run(values, known=known, validate_methods=validate_methods)
    if checked.config is None or hidden:
        raise ConfigError([*hidden, *checked.problems])
    return checked.config


def load_evaluate_config(
    model: str, overrides: Sequence[str] = (), *, known: KnownNames | None = None
) -> EvaluateCommandConfig:
    """Return the settings of ``seawall evaluate MODEL [key=value …]``.

    ``task=NAME`` switches ``evaluate.task`` on.

    Raises:
        ConfigError: the settings are wrong; every problem is listed.
    """
    values = apply_overrides({"model": {"name": str(model)}}, parse_overrides(overrides))
    if isinstance(values.setdefault("evaluate", {}), dict):
        values["evaluate"].setdefault("task", values.get("task") is not None)
    values, problems = _field_problems(EvaluateCommandConfig, values)
    config = build_instance(EvaluateCommandConfig, values)
    problems += _not_repeated(problems, evaluate_problems(config, known=known or KnownNames()))
    if problems:
        raise ConfigError([problem.text for problem in problems])
    return config


def check_run(
    values: Mapping[str, Any], *, known: KnownNames | None = None, validate_methods: MethodCheck | None = None
) -> CheckedRun:
    """Return the settings of a run from plain values, or every problem they have.

    Fields that are wrong in themselves are replaced by their defaults for the checks between fields, so that both
    kinds of problems are reported together.
    """
    pruned, problems = _field_problems(RunConfig, values)
    config = build_instance(RunConfig, {"name": "unnamed", **pruned})
    between = run_problems(config, known=known or KnownNames(), validate_methods=validate_methods)
    problems += _not_repeated(problems, between)
    return CheckedRun(None if problems else config, [problem.text for problem in problems])


def to_yaml(config: Any) -> str:
    """Return a configuration as YAML that loads to an equal one."""
    return yaml.safe_dump(escape(to_plain(config)), sort_keys=False, allow_unicode=True, width=110)


def read_config(name: str | Path, *, kind: str) -> dict[str, Any]:
    """Return the plain values of a configuration, what it ``extends`` merged in, named after its file.

    Args:
        name: a YAML file, or the name of one below ``experiments/configs/<kind>``.
        kind: ``recipe`` or ``study``.

    Raises:
        ConfigError: the file is missing, no YAML, no mapping, or extends itself.
    """
    path = find_config(name, kind=kind)
    values = _read_extended(path, kind, seen=())
    values.setdefault("name", path.stem)
    return values


def find_config(name: str | Path, *, kind: str) -> Path:
    """Return the file of a configuration, given as a path or by name.

    Raises:
        ConfigError: there is no such file; the message names where it was looked for.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    folder = CONFIG_FOLDER / kind
    inside = folder / f"{name}.yaml"
    is_name = path.suffix not in _SUFFIXES and len(path.parts) == 1
    if is_name and inside.is_file():
        return inside
    known = sorted(file.stem for file in folder.glob("*.yaml"))
    near = difflib.get_close_matches(path.stem, known, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    looked = f"looked for {path.absolute()}" + (f" and {inside}" if is_name else "")
    raise ConfigError(
        f"Expected `{kind}` to be a YAML file or one of {', '.join(known)}, but got {str(name)!r} ({looked}).{hint}"
    )


def method_settings(name: str) -> dict[str, Any]:
    """Return the ``methods:`` entry that ``method=NAME`` stands for, from ``experiments/configs/method/<name>.yaml``.

    A method of another package has no such file and gets the defaults of its own settings; whether a name is known at
    all is checked with the rest of the run.

    Raises:
        ConfigError: the file holds anything but one entry with the method's name.
    """
    path = CONFIG_FOLDER / "method" / f"{name}.yaml"
    if not name.isidentifier() or not path.is_file():
        return {name: {}}
    values = _read_yaml(path)
    if list(values) != [name] or not isinstance(values[name], dict):
        raise ConfigError(f"Expected `{path}` to hold the one entry `{name}: {{...}}`, but got {values!r}.")
    return values


def parse_overrides(texts: Sequence[str]) -> list[Override]:
    """Return ``key=value`` texts as keys and YAML values.

    Raises:
        ConfigError: a text has no ``=``, an empty key or value, or a value that is no YAML; all such are listed.

    Example:
        >>> parse_overrides(["seed=1", "stages.align=null"])
        [Override(key='seed', value=1), Override(key='stages.align', value=None)]
    """
    overrides: list[Override] = []
    problems = []
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not value.strip() or not all(part.strip() for part in key.split(".")):
            problems.append(
                f"Expected an override to be key=value, but got {text!r}. Write {key or 'key'}=null for none."
            )
            continue
        try:
            parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]), resolve=False)
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            problems.append(f"Expected the value of `{key}` to be YAML, but got {value!r} ({_first_line(error)}).")
            continue
        overrides.append(Override(key.strip(), cast(dict[str, Any], parsed)["value"]))
    if problems:
        raise ConfigError(problems)
    return overrides


def apply_overrides(
    values: Mapping[str, Any], overrides: Sequence[Override], *, hidden: list[str] | None = None
) -> dict[str, Any]:
    """Return ``values`` with the overrides put in, shorthands spelt out and references (``${...}``) resolved.

    Args:
        values: what is overridden.
        overrides: key and value, later ones over earlier ones.
        hidden: takes the problems of overrides that do nothing, to be reported with others; None raises them.

    Raises:
        ConfigError: a key cannot be set or has no effect, or a reference points nowhere.
    """
    merged = OmegaConf.create(override_raw(values, overrides, hidden=hidden))
    try:
        plain = cast(dict[str, Any], OmegaConf.to_container(merged, resolve=True, throw_on_missing=True))
    except OmegaConfBaseException as error:
        raise ConfigError(f"Expected every value to be resolvable, but got: {_first_line(error)}.") from error
    return inherit_adapter(tidy(plain))


def override_raw(
    values: Mapping[str, Any], overrides: Sequence[Override], *, hidden: list[str] | None = None
) -> dict[str, Any]:
    """Return ``values`` with the overrides put in and nothing else done.

    A mapping given for a key replaces what was there. Setting ``max_epochs`` unsets ``max_steps`` and the other way
    round, unless both are given.

    Args:
        values: what is overridden.
        overrides: key and value, later ones over earlier ones.
        hidden: takes the problems of overrides that do nothing, to be reported with others; None raises them.

    Raises:
        ConfigError: a key cannot be set, or has no effect because every stage sets its own value.
    """
    merged = OmegaConf.create(spell_out(values))
    keys = {override.key for override in overrides}
    for key, value in overrides:
        if key == "model" and isinstance(value, str):
            key = "model.name"
        _set(merged, key, value)
        prefix, _, last = key.rpartition(".")
        other = SCHEDULE.get(last)
        if other is not None and value is not None:
            other = f"{prefix}.{other}" if prefix else other
            if other not in keys:
                _set(merged, other, None)
    raw = cast(dict[str, Any], OmegaConf.to_container(merged, resolve=False))
    problems = [text for key, _ in overrides if (text := find_hidden(key, raw))]
    if hidden is not None:
        hidden.extend(problems)
    elif problems:
        raise ConfigError(problems)
    return raw


def _set(merged: Any, key: str, value: Any) -> None:
    try:
        OmegaConf.update(merged, key, value, merge=False, force_add=True)
    except (OmegaConfBaseException, ValueError, TypeError, KeyError, IndexError) as error:
        raise ConfigError(f"Expected `{key}` to be a key that can be set, but got: {_first_line(error)}.") from error


def _read_extended(path: Path, kind: str, seen: tuple[Path, ...]) -> dict[str, Any]:
    """Return the values of ``path`` laid over those of the configuration it extends, if any."""
    if path.resolve() in seen:
        chain = " -> ".join(str(file) for file in (*seen, path.resolve()))
        raise ConfigError(f"Expected `extends` to end somewhere, but got a circle: {chain}.")
    layer = spell_out(_read_yaml(path))
    parent = layer.pop("extends", None)
    if parent is None:
        return layer
    beside = path.parent / str(parent)
    base = beside if beside.is_file() else find_config(str(parent), kind=kind)
    below = _read_extended(base, kind, (*seen, path.resolve()))
    for stage in STAGES:
        if "methods" in nested(layer, "stages", stage):
            # A set of methods is one choice: half of the old one under the new one would be a third set nobody named.
            nested(below, "stages", stage).pop("methods", None)
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.merge(below, layer), resolve=False))


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        loaded = OmegaConf.create(path.read_text(encoding="utf-8"))
        values = OmegaConf.to_container(loaded, resolve=False)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"Expected `{path}` to be YAML, but got an error{line}: {error.problem}.") from error
    except (AssertionError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        # OmegaConf answers a bare number or word with an AssertionError.
        raise ConfigError(f"Expected `{path}` to hold a YAML mapping, but got something else.") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"Expected `{path}` to hold a YAML mapping of names to values, but got {values!r}.")
    return cast(dict[str, Any], values)


def _field_problems(schema: type, values: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """Return the values without those that are wrong in themselves, and what is wrong with these."""
    problems = check_mapping(schema, values)
    pruned = copy.deepcopy(dict(values))
    for problem in problems:
        level: Any = pruned
        *parents, last = problem.path.split("[")[0].split(".")
        for key in parents:
            level = level.get(key) if isinstance(level, dict) else None
        if isinstance(level, dict):
            level.pop(last, None)
    return pruned, problems


def _not_repeated(reported: Sequence[Problem], found: Sequence[Problem]) -> list[Problem]:
    """Return the problems found between fields, leaving out those below or above a field already reported."""

    def touches(one: str, other: str) -> bool:
        return one == other or one.startswith((f"{other}.", f"{other}[")) or other.startswith(f"{one}.")

    return [problem for problem in found if not any(touches(problem.path, earlier.path) for earlier in reported)]


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
