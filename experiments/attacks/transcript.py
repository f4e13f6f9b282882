"""The transcript of a prompt attack: one line a query, appended as replies come, so that nothing is asked twice.

The first line says to what the transcript belongs. A process that is killed leaves at most one line half-written; that
line is dropped when the attack goes on.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.attacks.interface import Attempt, Query
from framework.errors import DataError, StorageError
from framework.files import fingerprint, to_plain

__all__ = ["Transcript", "is_unanswered", "read_transcript", "unanswered"]

FORMAT = 1


class Transcript:
    """An append-only file of attempts that belongs to one attack on one model."""

    def __init__(self, path: Path, key: Any) -> None:
        """Open the transcript, or begin one.

        Args:
            path: the file; a half-written last line is cut off.
            key: everything that decides the attempts, as plain values.

        Raises:
            DataError: the file belongs to another attack, model or suite, or a line in its middle is damaged.
            StorageError: the file cannot be written.
        """
        self.path = path
        header = {"format": FORMAT, "key": fingerprint(key)}
        lines = _whole_lines(path)
        if not lines:
            self._append([header], fresh=True)
            self._known: list[Attempt] = []
            return
        if lines[0] != header:
            raise DataError(
                f"Expected `{path}` to be the transcript of this attack on this model, but got one of another suite, "
                "model or setting. Move it away to begin anew."
            )
        self._known = [_attempt(line, path, number) for number, line in enumerate(lines[1:], start=2)]

    @property
    def num_known(self) -> int:
        """Attempts that are there from before and were not taken yet."""
        return len(self._known)

    def take(self, queries: Sequence[Query]) -> list[Attempt]:
        """Return the attempts from before that answer the first of ``queries``; empty when there are none left.

        Raises:
            DataError: an attempt answers another query, so the attack would not be repeated exactly.
        """
        found: list[Attempt] = []
        for query in queries[: len(self._known)]:
            attempt = self._known[len(found)]
            if (attempt.query_id, attempt.text) != (query.prompt.id, query.prompt.text):
                raise DataError(
                    f"Expected `{self.path}` to go on with query {query.prompt.id!r}, but got {attempt.query_id!r}. "
                    "The attack was changed since; move the transcript away to begin anew."
                )
            found.append(attempt)
        self._known = self._known[len(found) :]
        return found

    def add(self, attempts: Sequence[Attempt]) -> None:
        """Append attempts and flush them to the disk.

        Raises:
            StorageError: the file cannot be written.
        """
        self._append([to_plain(dataclasses.asdict(attempt)) for attempt in attempts])

    def _append(self, rows: Sequence[Any], *, fresh: bool = False) -> None:
        text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("w" if fresh else "a", encoding="utf-8") as handle:
                handle.write(text)
                handle.flush()
                os.fsync(handle.fileno())
        except OSError as error:
            raise StorageError(
                f"Expected `{self.path}` to be writable, but got {error.strerror or error}. Free some space."
            ) from error


def unanswered(query: Query, number: int) -> Attempt:
    """Return the line of a query that got no reply, so that it is not asked again when the attack goes on.

    Args:
        query: as it was sent.
        number: among those of its request, from 1.
    """
    return Attempt(
        number=number,
        request_id=query.request.id,
        query_id=query.prompt.id,
        text=query.prompt.text,
        reply="",
        is_success=False,
        prefill=query.prompt.prefill,
        system=query.system,
        details={**query.details, "unanswered": True},
    )


def is_unanswered(attempt: Attempt) -> bool:
    """Return whether a query got no reply: it is neither a success nor withstood."""
    return bool(attempt.details.get("unanswered"))


def read_transcript(path: Path) -> list[Attempt]:
    """Return the attempts of a transcript that were answered, in the order they were made.

    Raises:
        DataError: it is missing or damaged.
    """
    if not path.is_file():
        raise DataError(f"Expected `{path}` to be a transcript, but found nothing. Run the attack first.")
    lines = _whole_lines(path)
    if not lines or not isinstance(lines[0], dict) or lines[0].get("format") != FORMAT:
        raise DataError(f"Expected `{path}` to be a transcript of format {FORMAT}, but got another file.")
    found = [_attempt(line, path, number) for number, line in enumerate(lines[1:], start=2)]
    return [attempt for attempt in found if not is_unanswered(attempt)]


def _whole_lines(path: Path) -> list[Any]:
    """Return the lines as JSON values and cut off what stands behind the last line's end."""
    if not path.is_file():
        return []
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    if end < len(data):
        with path.open("r+b") as handle:
            handle.truncate(end)
    found = []
    for number, line in enumerate(data[:end].split(b"\n")[:-1], start=1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            raise DataError(
                f"Expected line {number} of `{path}` to be JSON, but got: {error}. Move the file away to begin anew."
            ) from error
    return found


def _attempt(line: Any, path: Path, number: int) -> Attempt:
    names = {field.name for field in dataclasses.fields(Attempt)}
    if not isinstance(line, dict) or not {"query_id", "text", "reply", "is_success"} <= set(line) <= names:
        raise DataError(f"Expected line {number} of `{path}` to be an attempt, but got other fields. Move it away.")
    return Attempt(**line)
