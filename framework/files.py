"""Atomic files, fingerprints, and the store of finished artefacts.

A file is written under a temporary name and renamed. A folder is complete when its ``manifest.json`` is there; it is
written last and the folder is renamed into place, so a half-written artefact is never mistaken for a finished one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from framework.errors import StorageError

__all__ = ["ArtifactStore", "cache_root", "fingerprint", "hash_file", "read_json", "write_atomic", "write_json"]

MANIFEST = "manifest.json"


def cache_root() -> Path:
    """Return the folder for converted models and finished stages: ``SEAWALL_CACHE`` or the user's cache folder."""
    configured = os.environ.get("SEAWALL_CACHE")
    if configured:
        return Path(configured).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "seawall"


def to_plain(value: Any) -> Any:
    """Return ``value`` as JSON types: dataclasses become dicts, tuples and sets lists, paths strings."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(to_plain(v) for v in value)
    if isinstance(value, (list, tuple)):
        return [to_plain(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"Expected a value that JSON can hold, but got {type(value).__name__}.")


def fingerprint(value: Any) -> str:
    """Return 16 hex digits that depend on every field of ``value`` and on nothing else.

    Args:
        value: dataclasses, mappings, sequences and scalars, nested at will.

    Example:
        >>> fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
        True
    """
    text = json.dumps(to_plain(value), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def hash_file(path: Path) -> str:
    """Return the sha256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})


@contextlib.contextmanager
def _storage_errors(path: Path, *, within: Path | None = None) -> Iterator[None]:
    """Turn an OSError into StorageError; with ``within`` only a full disk and what concerns that folder."""
    try:
        yield
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        # Whoever fills an artefact also reads files and talks to the net; their failures are not the disk's.
        if within is not None and error.errno not in _FULL and str(within) not in str(error.filename):
            raise
        raise StorageError(
            f"Expected `{path}` to be writable, but got {error.strerror or error}. "
            "Free some space (`seawall cache remove --help`) or choose another folder (`output=` or the variable "
            "SEAWALL_CACHE)."
        ) from error


def write_atomic(path: Path, data: str | bytes) -> None:
    """Write ``data`` to ``path`` under a temporary name, flush it to disk, and rename.

    Raises:
        StorageError: the folder cannot be written or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with _storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as handle:
                handle.write(data.encode() if isinstance(data, str) else data)
                handle.flush()
                os.fsync(handle.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically; NaN and infinities are refused (they are not JSON)."""
    write_atomic(path, json.dumps(to_plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Return the content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


class ArtifactStore:
    """Finished artefacts (aligned models, sampled replies, caches), found again by what decides them."""

    def __init__(self, root: Path) -> None:
        """Keep artefacts under ``root``; nothing is created until something is written."""
        self.root = root

    def path(self, kind: str, key: Any) -> Path:
        """Return where the artefact of ``kind`` decided by ``key`` lies or would lie."""
        return self.root / kind / fingerprint(key)

    def find(self, kind: str, key: Any) -> Path | None:
        """Return the folder of a complete artefact, or None. The time of its manifest says when it was last found."""
        folder = self.path(kind, key)
        if not (folder / MANIFEST).is_file():
            return None
        with contextlib.suppress(OSError):  # another's cache, or one on a read-only disk
            os.utime(folder / MANIFEST)
        return folder

    @contextlib.contextmanager
    def writing(self, kind: str, key: Any, *, keep_partial: bool = False) -> Iterator[Path]:
        """Yield a work folder that becomes the artefact when the block ends without an error.

        The folder's name is fixed (``<fingerprint>.partial``), so a stage that was interrupted finds what it left there
        when ``keep_partial`` is set; otherwise leftovers are removed first. A lock keeps two processes from writing
        the same artefact at once; the second one should call ``find`` again after it got the lock.

        Raises:
            StorageError: the folder cannot be written or the disk is full.
        """
        final = self.path(kind, key)
        partial = final.with_name(final.name + ".partial")
        with contextlib.ExitStack() as stack:
            with _storage_errors(final):
                final.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(FileLock(str(final) + ".lock"))
                if not keep_partial:
                    shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(exist_ok=True)
            with _storage_errors(final, within=partial):
                yield partial
            with _storage_errors(final):
                if (final / MANIFEST).is_file():
                    shutil.rmtree(partial, ignore_errors=True)
                    return
                write_json(partial / MANIFEST, {"kind": kind, "key": key, "completed": time.time()})
                shutil.rmtree(final, ignore_errors=True)
                partial.rename(final)
