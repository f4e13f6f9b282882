"""Methods by name: registered by a decorator, found in this package or in installed ones."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any, NamedTuple, TypeVar

from framework.composition import compose
from framework.errors import ConfigError, WiringError, describe_unknown
from framework.method import Method, points_of

__all__ = ["MethodEntry", "create_method", "known_methods", "register_method", "validate_methods"]

ENTRY_POINTS = "seawall.methods"
M = TypeVar("M", bound=Method)


class MethodEntry(NamedTuple):
    """What the registry knows of a method."""

    name: str
    method_class: type[Method]
    config_class: type[Any]
    summary: str
    """First line of the card."""
    points: tuple[str, ...]
    """Contribution points it fills."""
    supports: tuple[str, ...]
    """Strategies it runs under."""


_ENTRIES: dict[str, MethodEntry] = {}
_loaded = False


def register_method(name: str, *, config: type[Any]) -> Callable[[type[M]], type[M]]:
    """Return the decorator that makes a method known by ``name``.

    Args:
        name: snake_case, unique.
        config: frozen dataclass of its settings.

    Raises:
        ConfigError: the name is taken by another class.
    """

    def register(method_class: type[M]) -> type[M]:
        taken = _ENTRIES.get(name)
        if taken is not None and _origin(taken.method_class) != _origin(method_class):
            raise ConfigError(f"Expected the method name `{name}` to be free, but got it from {taken.method_class!r}.")
        method_class.name = name
        method_class.config_class = config
        card = inspect.getdoc(inspect.getmodule(method_class)) or inspect.getdoc(method_class) or ""
        _ENTRIES[name] = MethodEntry(
            name,
            method_class,
            config,
            card.split("\n")[0],
            points_of(method_class),
            tuple(sorted(method_class.supports)),
        )
        return method_class

    return register


def known_methods() -> dict[str, MethodEntry]:
    """Return every registered method by name: those of this package and of installed ones (``seawall.methods``)."""
    global _loaded
    if not _loaded:
        package = importlib.import_module("methods")
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"methods.{module.name}")
        for point in entry_points(group=ENTRY_POINTS):
            point.load()
        _loaded = True
    return dict(sorted(_ENTRIES.items()))


def create_method(name: str, options: Mapping[str, Any] | None = None) -> Method:
    """Return a method built from its settings.

    Args:
        name: a registered name.
        options: fields of its config; None or empty takes the defaults.

    Raises:
        ConfigError: unknown name, unknown field or bad value; every problem at once.
    """
    problems = _problems(name, options or {})
    if problems:
        raise ConfigError(problems)
    entry = known_methods()[name]
    return entry.method_class(entry.config_class(**(options or {})))


def validate_methods(methods: Mapping[str, Mapping[str, Any] | None], order: Sequence[str] = ()) -> list[str]:
    """Return every problem in a ``methods:`` mapping, empty when there is none.

    Args:
        methods: settings of the methods of one stage, by name.
        order: names of methods whose order matters. One that is not among ``methods`` is the caller's to refuse.
    """
    problems = [problem for name, options in methods.items() for problem in _problems(name, options or {})]
    if problems or not methods or not set(order) <= set(methods):
        return problems
    try:
        compose([create_method(name, options) for name, options in methods.items()], order=order)
    except (ConfigError, WiringError) as error:
        return [str(error)]
    return []


def _origin(method_class: type[Method]) -> tuple[str, str]:
    return method_class.__module__, method_class.__qualname__


def _problems(name: str, options: Mapping[str, Any]) -> list[str]:
    entry = known_methods().get(name)
    if entry is None:
        return [describe_unknown("method", name, known_methods())]
    if not isinstance(options, Mapping):
        return [f"Expected `methods.{name}` to be a mapping of settings, but got {options!r}."]
    fields = {field.name: field for field in dataclasses.fields(entry.config_class)}
    unknown = [describe_unknown(f"{name}.<field>", key, fields) for key in options if key not in fields]
    missing = [
        f"Expected `{name}.{field.name}` to be given, but got nothing."
        for field in fields.values()
        if field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
        and field.name not in options
    ]
    if unknown or missing:
        return unknown + missing
    try:
        entry.config_class(**options)
    except ConfigError as error:
        return [f"{name}: {problem}" for problem in error.problems]
    except TypeError as error:
        return [f"{name}: {error}"]
    return []
