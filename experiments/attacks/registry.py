"""Attacks by name, and what is wrong with those a suite asks for.

An attack is known once its module is imported; the modules of the three folders are imported when the names are first
asked for.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from experiments.attacks.interface import Attack, AttackEntry, PromptAttack, registered_attacks
from framework.errors import ConfigError, SeawallError, describe_unknown
from framework.fields import build_instance, check_mapping

__all__ = ["create_attack", "known_attacks", "validate_attack"]

FOLDERS = ("prompts", "weights", "finetuning")
_loaded = False


def known_attacks() -> dict[str, AttackEntry]:
    """Return every registered attack by name."""
    global _loaded
    if not _loaded:
        for folder in FOLDERS:
            package = importlib.import_module(f"experiments.attacks.{folder}")
            for module in pkgutil.iter_modules(package.__path__):
                importlib.import_module(f"{package.__name__}.{module.name}")
        _loaded = True
    return dict(sorted(registered_attacks().items()))


def create_attack(name: str, settings: Mapping[str, Any] | None = None, *, path: str = "") -> Attack:
    """Return an attack built from its settings.

    Args:
        name: a registered name.
        settings: fields of its config; None or empty takes the defaults.
        path: dotted key of the settings, for messages; empty takes the name.

    Raises:
        ConfigError: unknown name, unknown field, bad value, or a budget of 0; every problem at once.
    """
    attack, problems = _build(name, settings or {}, path or name)
    if attack is None or problems:
        raise ConfigError(problems)
    return attack


def validate_attack(name: str, settings: Mapping[str, Any] | None = None, *, path: str = "") -> list[str]:
    """Return every problem of an attack's name and settings, empty when there is none.

    Args:
        name: a registered name.
        settings: fields of its config.
        path: dotted key of the settings, for messages; empty takes the name.
    """
    return _build(name, settings or {}, path or name)[1]


def _build(name: str, settings: Mapping[str, Any], path: str) -> tuple[Attack | None, list[str]]:
    entry = known_attacks().get(name)
    if entry is None:
        return None, [describe_unknown(f"{path}.attack" if path != name else "attack", name, known_attacks())]
    problems = [problem.text for problem in check_mapping(entry.config_class, settings, path=path)]
    if problems:
        return None, problems
    try:
        attack = entry.attack_class(build_instance(entry.config_class, settings))
    except SeawallError as error:
        found = error.problems if isinstance(error, ConfigError) else [str(error)]
        return None, [f"{path}: {problem}" for problem in found]
    if isinstance(attack, PromptAttack) and attack.budget < 1:
        text = f"Expected `{path}` to have a budget of at least 1 query a request, but got {attack.budget}."
        return None, [f"{text} Leave the attack out instead."]
    return attack, []
