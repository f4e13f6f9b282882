"""Typed settings: a frozen dataclass declares its fields and their rules, and a raw mapping is checked against it.

The check walks the whole mapping and returns *every* problem (unknown key with the nearest name, wrong type, broken
rule), because a user who repairs one line should not have to start again to learn about the next.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, TypeVar

from framework.errors import ConfigError

__all__ = [
    "COUNT",
    "COUNT_OR_ZERO",
    "NOT_EMPTY",
    "NOT_NEGATIVE",
    "POSITIVE",
    "SHARE",
    "Problem",
    "Rule",
    "build_instance",
    "check_instance",
    "check_mapping",
    "setting",
]


Schema = TypeVar("Schema")


class Rule(NamedTuple):
    """What a value must satisfy beyond its type."""

    text: str
    """Completes *Expected `x` to be …*."""
    holds: Callable[[Any], bool]


class Problem(NamedTuple):
    """One thing wrong with a configuration."""

    path: str
    """Dotted key, empty for the whole file."""
    text: str
    """The sentence for the user."""


POSITIVE = Rule("a number > 0", lambda value: value > 0)
NOT_NEGATIVE = Rule("a number ≥ 0", lambda value: value >= 0)
COUNT = Rule("a whole number ≥ 1", lambda value: value >= 1)
COUNT_OR_ZERO = Rule("a whole number ≥ 0", lambda value: value >= 0)
SHARE = Rule("a share between 0 and 1", lambda value: 0 <= value <= 1)
NOT_EMPTY = Rule("not empty", lambda value: len(value) > 0)

_SCALARS: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def setting(default: Any = dataclasses.MISSING, *, rule: Rule | None = None, factory: Any = dataclasses.MISSING) -> Any:
    """Return a dataclass field that carries a rule; without default and factory the field is required."""
    metadata = {"rule": rule} if rule else {}
    if factory is not dataclasses.MISSING:
        return dataclasses.field(default_factory=factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def check_mapping(schema: type, raw: Any, *, path: str = "") -> list[Problem]:
    """Return every problem of ``raw`` as settings of the dataclass ``schema``.

    Args:
        schema: a dataclass; nested dataclasses, optional values, lists, mappings and literals are followed.
        raw: what a file and the command line gave.
        path: dotted key of ``raw`` itself, used in messages.
    """
    elsewhere: dict[str, list[str]] = {}
    for key, where in _places(schema, ""):
        elsewhere.setdefault(key, []).append(where)
    return list(_check_fields(schema, raw, path, elsewhere))


def check_instance(instance: Any, *, path: str = "") -> None:
    """Check every field of a dataclass instance; meant for ``__post_init__``.

    Raises:
        ConfigError: one or more fields have the wrong type or break their rule; all of them are listed.
    """
    values = {field.name: getattr(instance, field.name) for field in dataclasses.fields(instance)}
    problems = list(_check_fields(type(instance), values, path, {}))
    if problems:
        raise ConfigError([problem.text for problem in problems])


def build_instance(schema: type[Schema], values: Mapping[str, Any]) -> Schema:
    """Return an instance of the dataclass ``schema`` from values that ``check_mapping`` found correct.

    Raises:
        ConfigError: a value is wrong after all; each class checks itself.
    """
    hints = typing.get_type_hints(schema)
    return schema(**{name: _build_value(hints[name], value) for name, value in values.items()})


def _build_value(hint: Any, value: Any) -> Any:
    inner, _ = _without_none(hint)
    if value is None:
        return None
    if dataclasses.is_dataclass(inner) and isinstance(inner, type):
        return value if isinstance(value, inner) else build_instance(inner, value)
    arguments = typing.get_args(inner)
    if typing.get_origin(inner) is list:
        return [_build_value(arguments[0], item) for item in value]
    if typing.get_origin(inner) is dict:
        return {key: _build_value(arguments[1], item) for key, item in value.items()}
    return float(value) if inner is float else copy.deepcopy(value)


def _places(schema: type, path: str) -> Iterator[tuple[str, str]]:
    """Yield every nested key with the place it belongs to, to explain a key written at the wrong level."""
    for name, hint in typing.get_type_hints(schema).items():
        inner, _ = _without_none(hint)
        here = f"{path}.{name}" if path else name
        if dataclasses.is_dataclass(inner) and isinstance(inner, type):
            yield from _places(inner, here)
        elif path:
            yield name, here


def _check_fields(schema: type, raw: Any, path: str, elsewhere: Mapping[str, list[str]]) -> Iterator[Problem]:
    if not isinstance(raw, Mapping):
        name = path or "the configuration"
        yield Problem(path, f"Expected `{name}` to be a mapping of keys to values, but got {raw!r}.")
        return
    hints = typing.get_type_hints(schema)
    fields = {field.name: field for field in dataclasses.fields(schema)}
    for key, value in raw.items():
        here = f"{path}.{key}" if path else str(key)
        if key not in fields:
            yield Problem(here, _unknown_key(str(key), path, list(fields), elsewhere))
        else:
            yield from _check_value(hints[key], value, here, fields[key].metadata.get("rule"), elsewhere)
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in raw:
            here = f"{path}.{name}" if path else name
            yield Problem(here, f"Expected `{here}` to be given, but it is missing.")


def _unknown_key(key: str, path: str, known: list[str], elsewhere: Mapping[str, list[str]]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if key in elsewhere:
        remedy = f"Did you mean {' or '.join(f'`{place}`' for place in elsewhere[key])}?"
    elif near:
        remedy = f"Did you mean `{near[0]}`?"
    else:
        remedy = f"Known keys: {', '.join(known)}."
    name = f"`{path}`" if path else "the configuration"
    return f"Expected {name} to hold known keys only, but got {key!r}. {remedy}"


def _check_value(
    hint: Any, value: Any, path: str, rule: Rule | None, elsewhere: Mapping[str, list[str]]
) -> Iterator[Problem]:
    inner, optional = _without_none(hint)
    if optional and value is None:
        return
    if dataclasses.is_dataclass(inner) and isinstance(inner, type):
        if not isinstance(value, inner):
            yield from _check_fields(inner, value, path, elsewhere)
        return
    wanted = _wanted(inner, rule) + (" or null" if optional else "")
    if not _has_type(inner, value):
        yield Problem(path, f"Expected `{path}` to be {wanted}, but got {value!r}.{_remedy(inner, value)}")
    elif typing.get_origin(inner) in (list, dict):
        yield from _check_items(inner, value, path, rule, elsewhere)
    elif rule and not rule.holds(value):
        yield Problem(path, f"Expected `{path}` to be {wanted}, but got {value!r}.")


def _check_items(
    hint: Any, value: Any, path: str, rule: Rule | None, elsewhere: Mapping[str, list[str]]
) -> Iterator[Problem]:
    """Check the items of a list or mapping; ``rule`` of the field is about the container when it is NOT_EMPTY."""
    item_rule = rule
    if rule is NOT_EMPTY:
        item_rule = None
        if not value:
            yield Problem(path, f"Expected `{path}` to be not empty, but got {value!r}.")
    arguments = typing.get_args(hint)
    items = enumerate(value) if isinstance(value, list) else value.items()
    for key, item in items:
        here = f"{path}[{key}]" if isinstance(value, list) else f"{path}.{key}"
        yield from _check_value(arguments[-1], item, here, item_rule, elsewhere)


def _without_none(hint: Any) -> tuple[Any, bool]:
    """Return the type without ``None`` and whether ``None`` was allowed."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        rest = [argument for argument in typing.get_args(hint) if argument is not type(None)]
        if len(rest) == 1:
            return rest[0], True
    return hint, False


def _has_type(hint: Any, value: Any) -> bool:
    origin = typing.get_origin(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in typing.get_args(hint))
    if origin is list or origin is dict:
        return isinstance(value, origin) and (origin is list or all(isinstance(key, str) for key in value))
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _wanted(hint: Any, rule: Rule | None) -> str:
    origin = typing.get_origin(hint)
    if rule and rule is not NOT_EMPTY and origin not in (list, dict):
        return rule.text
    if origin is Literal:
        return f"one of {', '.join(str(choice) for choice in typing.get_args(hint))}"
    if origin is list:
        return f"a list, each item {_wanted(typing.get_args(hint)[0], None if rule is NOT_EMPTY else rule)}"
    if origin is dict:
        return "a mapping of names to values"
    text = _SCALARS.get(hint, getattr(hint, "__name__", str(hint)))
    return f"{text} that is not empty" if rule is NOT_EMPTY else text


def _remedy(hint: Any, value: Any) -> str:
    if typing.get_origin(hint) is Literal and isinstance(value, str):
        choices = [str(choice) for choice in typing.get_args(hint)]
        near = difflib.get_close_matches(value, choices, n=1, cutoff=0.5)
        return f" Did you mean {near[0]!r}?" if near else ""
    if hint is str and isinstance(value, (bool, int, float)):
        return " Put it in quotes if it is meant as text."
    if typing.get_origin(hint) is list and isinstance(value, str):
        return f" Write [{value}]."
    if typing.get_origin(hint) is dict and value is None:
        return " Write {} for the defaults."
    return ""
