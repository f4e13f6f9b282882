"""What lies in the cache, and taking out of it what is no longer needed.

Only artefacts go: each can be made again by the run that needs it, from what decides it. Models, rollouts and verdicts
of judges stay, which cost most to make again and take little room.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from framework.files import MANIFEST

__all__ = ["CacheEntry", "choose_entries", "find_entries", "finish_removals", "remove_entry"]

PARTIAL = ".partial"
DAY = 24 * 3600.0


@dataclass(frozen=True)
class CacheEntry:
    """An artefact of the cache, finished or interrupted."""

    kind: str
    """What it is, e.g. ``stage``."""
    path: Path
    size: int
    """Bytes."""
    freed: int
    """Bytes that its removal frees; the rest is shared with finished runs, which keep it."""
    used: float
    """When it was last looked up or written, in seconds since 1970."""

    @property
    def is_finished(self) -> bool:
        """Whether it is complete; an interrupted stage can be gone on with."""
        return self.path.suffix != PARTIAL


def find_entries(artifacts: Path) -> list[CacheEntry]:
    """Return every artefact under a store's folder, the longest unused first; empty where there is no such folder."""
    found = [
        _entry(kind.name, folder)
        for kind in (sorted(artifacts.iterdir()) if artifacts.is_dir() else [])
        if kind.is_dir()
        for folder in sorted(kind.iterdir())
        if folder.is_dir()
        and not folder.name.startswith(".")
        and (folder.suffix == PARTIAL or (folder / MANIFEST).is_file())
    ]
    return sorted(found, key=lambda entry: entry.used)


def choose_entries(
    entries: Iterable[CacheEntry],
    *,
    now: float,
    kinds: Collection[str] = (),
    unused_days: float | None = None,
    at_most: float | None = None,
) -> list[CacheEntry]:
    """Return what to remove, the longest unused first.

    Args:
        entries: of the cache.
        now: seconds since 1970.
        kinds: only these; empty takes every kind.
        unused_days: only what was not used for as many days; None asks for no age.
        at_most: bytes the artefacts (of these kinds) may take; what is within stays. None removes all that fits the
            rest.

    Example:
        >>> old, new = (CacheEntry("stage", Path(name), 5, 5, used) for name, used in (("old", 0.0), ("new", DAY)))
        >>> [entry.path.name for entry in choose_entries([new, old], now=DAY, at_most=5)]
        ['old']
        >>> [entry.path.name for entry in choose_entries([new, old], now=DAY, unused_days=1)]
        ['old']
    """
    asked = sorted((entry for entry in entries if not kinds or entry.kind in kinds), key=lambda entry: entry.used)
    total, chosen = sum(entry.size for entry in asked), []
    for entry in asked:
        if unused_days is not None and now - entry.used < unused_days * DAY:
            continue
        if at_most is not None and total <= at_most:
            break
        chosen.append(entry)
        total -= entry.size
    return chosen


def remove_entry(entry: CacheEntry) -> bool:
    """Remove an artefact; returns False, and removes nothing, where a process is writing it.

    It is renamed first, so that a crash leaves no half of one that looks whole.
    """
    final = entry.path.with_name(entry.path.name.removesuffix(PARTIAL))
    try:
        with FileLock(f"{final}.lock", timeout=0):
            gone = entry.path.with_name(f".{entry.path.name}.{os.getpid()}.removed")
            entry.path.rename(gone)
    except Timeout:
        return False
    except FileNotFoundError:  # another process was faster
        return True
    shutil.rmtree(gone, ignore_errors=True)
    return True


def finish_removals(artifacts: Path, *, now: float) -> None:
    """Go on with removals that a crash cut off, if a day has passed: a younger one may be going on elsewhere."""
    for folder in artifacts.glob("*/.*.removed"):
        with contextlib.suppress(FileNotFoundError):
            if now - folder.stat().st_mtime > DAY:
                shutil.rmtree(folder, ignore_errors=True)


def _entry(kind: str, folder: Path) -> CacheEntry:
    files = _stats(folder)
    marks = [stat for path, stat in files if path.name == MANIFEST] or [stat for _, stat in files]
    used = max((stat.st_mtime for stat in marks), default=folder.stat().st_mtime)
    own = sum(stat.st_size for _, stat in files if stat.st_nlink == 1)
    return CacheEntry(kind, folder, sum(stat.st_size for _, stat in files), own, used)


def _stats(folder: Path) -> Sequence[tuple[Path, os.stat_result]]:
    return [(path, path.stat()) for path in folder.rglob("*") if path.is_file()]
