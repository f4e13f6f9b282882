"""The file of rollouts: one line each, only ever added to, flushed as they come.

The first line says whose rollouts these are (model, template, length, temperature, seed). A process that is killed
leaves whole lines and at most one half-written last line, which is dropped when the file is opened again and whose
rollout is made anew. Judgements are not part of the file: a new judge looks at the same rollouts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TextIO

from filelock import FileLock

from framework.errors import DataError, StorageError
from framework.files import fingerprint

__all__ = ["RolloutStore", "StoredRollout", "prompt_digest"]

FORMAT = 1


class StoredRollout(NamedTuple):
    """One line of the file."""

    prompt: str
    """Id of the prompt."""
    digest: str
    """Of the prompt's token ids."""
    number: int
    """Number of the rollout among those of the prompt, from 0."""
    reply: str
    num_tokens: int
    """Tokens generated, the end token included."""
    finished: bool
    """False for a rollout that was cut off at the limit."""


def prompt_digest(ids: Sequence[int]) -> str:
    """Return 16 hex digits that depend on the token ids of a prompt."""
    return hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest()[:16]


class RolloutStore:
    """Rollouts of one model under one set of sampling settings; use as a context manager, which holds a lock."""

    def __init__(self, path: Path, key: Mapping[str, Any]) -> None:
        """Name the file and what decides its rollouts; nothing is read yet.

        Args:
            path: the JSONL file.
            key: model, template and sampling settings as plain values; a file made under another key is refused.
        """
        self.path, self.key = path, dict(key)
        self._found: dict[str, dict[int, StoredRollout]] = {}
        self._handle: TextIO | None = None
        self._lock = FileLock(str(path) + ".lock")
        self.num_dropped = 0
        """Half-written last lines that were dropped, 0 or 1."""

    def __enter__(self) -> RolloutStore:
        """Take the lock, read what is there, drop a half-written last line and open the file for adding.

        Raises:
            DataError: the file belongs to another model or other settings, a line is damaged, or one came twice.
            StorageError: the folder cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            try:
                self._read()
                self._handle = self.path.open("a", encoding="utf-8")
            except BaseException:
                self._lock.release()
                raise
        except OSError as error:
            raise StorageError(
                f"Expected `{self.path}` to be a file that rollouts can be added to, but got: {error}. Free some space "
                "or name another folder with `store`."
            ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file and give the lock back."""
        if self._handle is not None:
            self._handle.close()
            self._handle = None
        self._lock.release()

    def rollouts(self, prompt: str, digest: str) -> dict[int, StoredRollout]:
        """Return the rollouts of a prompt by number.

        Raises:
            DataError: the rollouts under this id are those of another text.
        """
        found = self._found.get(prompt, {})
        other = next((rollout for rollout in found.values() if rollout.digest != digest), None)
        if other is not None:
            raise DataError(
                f"Expected the rollouts of prompt {prompt!r} in `{self.path}` to be those of its text, but got "
                "rollouts of another text under this id. Give the prompt another id, or name another folder with "
                "`store`."
            )
        return dict(found)

    def __iter__(self) -> Iterator[StoredRollout]:
        """Yield every rollout."""
        return (rollout for by_number in self._found.values() for rollout in by_number.values())

    def __len__(self) -> int:
        return sum(map(len, self._found.values()))

    def add(self, rollouts: Iterable[StoredRollout]) -> None:
        """Add rollouts and flush: from then on they outlive this process.

        Raises:
            DataError: one is there already.
            StorageError: the disk is full, or the store is not open.
        """
        if self._handle is None:
            raise StorageError(
                f"Expected the rollout store `{self.path}` to be open, but it is not. Use `with store:`."
            )
        lines = []
        for rollout in rollouts:
            self._take(rollout, "what was made")
            lines.append(json.dumps(rollout._asdict(), ensure_ascii=False) + "\n")
        if not lines:
            return
        try:
            self._handle.write("".join(lines))
            self._handle.flush()
        except OSError as error:
            raise StorageError(f"Expected `{self.path}` to be writable, but got: {error}. Free some space.") from error

    # ---- private ------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        text = self.path.read_bytes() if self.path.is_file() else b""
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) < len(text):
            # A process that dies in the middle of a write leaves a line without its end.
            self.num_dropped = 1
            with self.path.open("r+b") as handle:
                handle.truncate(len(whole))
        lines = whole.decode("utf-8").split("\n")[:-1]
        if not lines:
            self.path.write_text(json.dumps(self._header(), ensure_ascii=False) + "\n", encoding="utf-8")
            return
        self._check_header(lines[0])
        self._found = {}
        for number, line in enumerate(lines[1:], start=2):
            self._take(self._parse(line, number), f"line {number}")

    def _header(self) -> dict[str, Any]:
        return {"rollouts_format": FORMAT, "fingerprint": fingerprint(self.key), "key": self.key}

    def _check_header(self, line: str) -> None:
        try:
            found = json.loads(line)
            theirs = dict(found["key"])
            is_same = found["rollouts_format"] == FORMAT and found["fingerprint"] == fingerprint(self.key)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"Expected `{self.path}` to begin with a line that says whose rollouts it holds, but got {line[:60]!r}."
                " Name another folder with `store`, or delete the file."
            ) from error
        if not is_same:
            parts = [name for name in {**theirs, **self.key} if theirs.get(name) != self.key.get(name)]
            shown = "; ".join(f"{name} {theirs.get(name)!r} there, {self.key.get(name)!r} here" for name in parts)
            raise DataError(
                f"Expected the rollouts in `{self.path}` to be this model's under these settings, but got another's "
                f"({shown or 'another format'}). Rollouts of another model are not its own: name another folder with "
                "`store`, or delete the file."
            )

    def _parse(self, line: str, number: int) -> StoredRollout:
        try:
            return StoredRollout(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise DataError(
                f"Expected line {number} of `{self.path}` to be a rollout, but got {line[:60]!r}. Delete the line: its "
                "rollout will be made again."
            ) from error

    def _take(self, rollout: StoredRollout, where: str) -> None:
        by_number = self._found.setdefault(rollout.prompt, {})
        if rollout.number in by_number:
            raise DataError(
                f"Expected every rollout in `{self.path}` once, but got number {rollout.number} of prompt "
                f"{rollout.prompt!r} again in {where}. Delete one of the two lines."
            )
        by_number[rollout.number] = rollout
