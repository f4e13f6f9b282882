"""What decides an attack's outcome besides its settings: the code, the files it reads, the requests, the models."""

from __future__ import annotations

import functools
import hashlib
import inspect
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.fingerprints import content_hashes, data_hashes, strings_in, tokenizer_hashes
from experiments.measure import image_hash
from framework.examples import Prompt
from framework.files import hash_file
from framework.models import model_fingerprint

__all__ = ["code_hash", "model_key", "request_keys", "settings_files", "source_hashes"]

ROOT = Path(__file__).parents[2]
CODE = (
    "experiments/attacks/**/*.py",
    "experiments/prefill.py",
    "experiments/compliant_replies.py",
    "methods/nest/*.py",
)
"""Patterns of the modules whose change may change an outcome; attacks share much of their code."""
_OBJECT = re.compile(r"([A-Za-z_][\w.]*):([A-Za-z_]\w*)")


@functools.lru_cache(maxsize=8)
def code_hash(root: Path = ROOT) -> str:
    """Return a hash of all code that attacks are made of, names included; what was read once is not read again.

    Args:
        root: of the project.
    """
    digest = hashlib.sha256()
    for path in sorted({path for pattern in CODE for path in root.glob(pattern)}):
        digest.update(f"{path.relative_to(root).as_posix()} {hash_file(path)}\n".encode())
    return digest.hexdigest()[:16]


def settings_files(settings: Any) -> dict[str, str]:
    """Return the hashes of every file that settings name: by path, below ``SEAWALL_DATA``, or as code of one's own.

    Args:
        settings: as plain JSON types.
    """
    return content_hashes(settings) | data_hashes(settings) | source_hashes(settings)


def source_hashes(value: Any) -> dict[str, str]:
    """Return the hashes of the source files behind every ``package.module:name`` in ``value`` that is loaded.

    Args:
        value: settings as plain JSON types.
    """
    found: dict[str, str] = {}
    for text in strings_in(value):
        found |= _object_hashes(text)
    return found


def _object_hashes(text: str) -> dict[str, str]:
    match = _OBJECT.fullmatch(text)
    module = sys.modules.get(match[1]) if match else None
    if match is None or module is None:
        return {}
    # A module may only pass on what stands in another one.
    found = getattr(module, match[2], None)
    owner = found if inspect.isclass(found) or inspect.isroutine(found) else type(found)
    names = {getattr(module, "__file__", None), getattr(sys.modules.get(owner.__module__), "__file__", None)}
    paths = sorted(Path(name) for name in names if name)
    return {f"{text}: {path.name}": hash_file(path) for path in paths if path.is_file()}


def request_keys(requests: Sequence[Prompt]) -> list[tuple[str, ...]]:
    """Return id, text and image of every request."""
    return [(request.id, request.text, *image_hash(request)) for request in requests]


def model_key(folder: Path | None) -> dict[str, Any] | None:
    """Return a model's weights and what turns its conversations into ids; None without a model.

    Args:
        folder: of the model.
    """
    if folder is None:
        return None
    return {"weights": model_fingerprint(folder), "tokenizer": tokenizer_hashes(folder)}
