"""Names that may leave this machine: what a bundle calls the files and folders that were given by their place."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from framework.errors import DataError
from framework.files import fingerprint

__all__ = ["public_name", "short_names", "without_paths"]

_PATH = re.compile(r"(?:/|~/|[A-Za-z]:[\\/])")
_LONGEST = 4096
_WORDS = ("system",)
"""Settings that are put to the model word for word, whatever they look like."""


def public_name(name: str) -> str:
    """Return a model's or set's name, or the last part of its place on this machine.

    Example:
        >>> [public_name(name) for name in ("org/model", "/home/me/models/tiny")]
        ['org/model', 'tiny']
    """
    return _last_part(name) if _is_path(name) or Path(name).exists() else name


def short_names(settings: Any) -> dict[str, str]:
    """Return a short name for every absolute path among the settings of a run; two never share one.

    Example:
        >>> short_names({"safety": ["/data/a/prompts.jsonl", "embedded"]})
        {'/data/a/prompts.jsonl': 'prompts.jsonl'}
    """
    paths = sorted({text for text in _strings(settings) if _is_path(text)})
    lasts = [_last_part(path) for path in paths]
    return {
        path: last if lasts.count(last) == 1 else f"{last}~{fingerprint(path)[:6]}"
        for path, last in zip(paths, lasts, strict=True)
    }


def without_paths(value: Any, names: Mapping[str, str]) -> Any:
    """Return plain values in which no place of this machine is named any more.

    Args:
        value: settings or results; not prompts and replies, which are nobody's to change.
        names: of ``short_names``; whatever else is an absolute path is cut down to its last part.

    Raises:
        DataError: two keys of one mapping would become one.

    Example:
        >>> without_paths({"/d/x.jsonl/refusal_rate": 1, "folder": "/home/me/runs/tiny"}, {"/d/x.jsonl": "x.jsonl"})
        {'x.jsonl/refusal_rate': 1, 'folder': 'tiny'}
    """
    if isinstance(value, Mapping):
        found = {
            _rename(str(key), names): item if key in _WORDS else without_paths(item, names)
            for key, item in value.items()
        }
        if len(found) < len(value):
            raise DataError(
                f"Expected the keys of {sorted(found)[:3]} … to stay apart without the folders in them, but some are "
                "the same then. Give the sets of the run files of different names."
            )
        return found
    if isinstance(value, (list, tuple)):
        return [without_paths(item, names) for item in value]
    return _rename(value, names) if isinstance(value, str) else value


def _rename(text: str, names: Mapping[str, str]) -> str:
    for path in sorted(names, key=len, reverse=True):
        text = text.replace(path, names[path])
    return _last_part(text) if _is_path(text) else text


def _is_path(text: str) -> bool:
    return bool(_PATH.match(text)) and "\n" not in text and len(text) < _LONGEST and bool(_last_part(text))


def _last_part(path: str) -> str:
    return re.split(r"[\\/]", path.rstrip("/\\"))[-1]


def _strings(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        return [text for key, item in value.items() if key not in _WORDS for text in _strings(item)]
    if isinstance(value, (list, tuple)):
        return [text for item in value for text in _strings(item)]
    return [value] if isinstance(value, str) else []
