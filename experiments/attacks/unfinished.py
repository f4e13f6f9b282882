"""Attacks on an endpoint that were finished before their suite was: kept until the suite ends, and no longer.

What an endpoint said is not found again by a later suite, for another model may answer there tomorrow. But replies that
were paid for and lost to a cut connection would be asked for twice; so a suite that is started again goes on with the
attacks it has finished, and says since when.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from framework.files import ArtifactStore, fingerprint, read_json, write_json
from framework.moments import moment

__all__ = ["Kept", "UnfinishedSuite"]

FOLDER = "unfinished_suite"


class Kept(NamedTuple):
    """A finished attack of an unfinished suite."""

    folder: Path
    since: str
    """When it was finished, in UTC."""


class UnfinishedSuite:
    """The finished attacks of one suite on one endpoint, by what decides each of them."""

    def __init__(self, artifacts: ArtifactStore, key: Any) -> None:
        """Know where they are noted; nothing is read or written.

        Args:
            artifacts: the store that holds the attacks.
            key: the suite and its target, as plain values.
        """
        self._path = artifacts.root / FOLDER / f"{fingerprint(key)}.json"

    def find(self, key: Any) -> Kept | None:
        """Return an attack that was finished, or None; one that is gone from the store is asked again."""
        entry = self._entries().get(fingerprint(key))
        if entry is None or not (Path(entry["folder"]) / "outcome.json").is_file():
            return None
        return Kept(Path(entry["folder"]), str(entry["since"]))

    def note(self, key: Any, folder: Path) -> None:
        """Note a finished attack and where it lies.

        Raises:
            StorageError: the note cannot be written.
        """
        write_json(self._path, {**self._entries(), fingerprint(key): {"folder": str(folder), "since": moment()}})

    def forget(self) -> None:
        """The suite has ended: the next one asks anew."""
        self._path.unlink(missing_ok=True)

    def _entries(self) -> dict[str, Any]:
        return dict(read_json(self._path)) if self._path.is_file() else {}
