"""What decides an artefact besides its settings: package versions, embedded sets, the content of named files."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from framework.files import hash_file, to_plain
from framework.registry import create_method

__all__ = ["LATER_SETTINGS", "content_hashes", "embedded_hash", "resolved_methods", "versions", "without_later"]

DECIDING = ("torch", "transformers", "peft", "pytorch-lightning")
"""Packages whose version may change a number."""


LATER_SETTINGS = ("prefill", "prefill_replies", "prefill_model")
"""Settings of ``evaluate`` that decide a measurement of their own."""


def versions() -> dict[str, str]:
    """Return the versions of the packages that compute."""
    return {name: importlib.metadata.version(name) for name in DECIDING}


def embedded_hash() -> str:
    """Return a hash of the embedded sets."""
    digest = hashlib.sha256()
    for entry in sorted(files("datamodules.embedded").iterdir(), key=lambda item: item.name):
        if entry.name.endswith(".jsonl"):
            digest.update(entry.read_bytes())
    return digest.hexdigest()[:16]


def content_hashes(value: Any) -> dict[str, str]:
    """Return the hash of every file that a string in ``value`` names, and of every file below a folder it names.

    Args:
        value: settings as plain JSON types.
    """
    if isinstance(value, Mapping):
        return {key: digest for item in value.values() for key, digest in content_hashes(item).items()}
    if isinstance(value, (list, tuple)):
        return {key: digest for item in value for key, digest in content_hashes(item).items()}
    if not isinstance(value, str) or not value:
        return {}
    path = Path(value).expanduser()
    if path.is_file():
        return {value: hash_file(path)}
    if path.is_dir():
        return {f"{value}/{p.relative_to(path)}": hash_file(p) for p in sorted(path.rglob("*")) if p.is_file()}
    return {}


def resolved_methods(methods: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the methods with every setting spelt out, defaults included, and the content of the files they name.

    A config class may name in ``UNDECISIVE`` fields that never change a result; their defaults stand in for them.

    Args:
        methods: settings by the method's registered name.
    """
    found = []
    for name, options in methods.items():
        undecisive: frozenset[str] = getattr(create_method(name, options).config, "UNDECISIVE", frozenset())
        decisive = {field: value for field, value in (options or {}).items() if field not in undecisive}
        config = to_plain(create_method(name, decisive).config)
        found.append({"name": name, "config": config, "files": content_hashes(config)})
    return found


def without_later(evaluate: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``evaluate`` section as it was before ``LATER_SETTINGS`` existed, if it does without them.

    What was finished then is found again: the fingerprint of a run without the attack is what it was.

    Args:
        evaluate: as plain values.
    """
    if evaluate.get("prefill"):
        return dict(evaluate)
    return {name: value for name, value in evaluate.items() if name not in LATER_SETTINGS}
