"""A bundle as one file: a tar archive with one spelling, so that no byte of it is free to change.

Headers and padding of an archive are covered by no file's hash. Therefore what was unpacked is packed again, and the
archive must consist of exactly the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from pathlib import Path
from typing import Any, cast

from experiments.release.manifest import UNLISTED, Problem, list_files, path_problem
from framework.files import hash_file

__all__ = ["pack", "unpack"]

DEEPEST = 4
"""Folders within folders; a bundle has one, and every further one would cost the disk more than its letter."""


def pack(folder: Path, target: Path) -> None:
    """Write the files of a bundle into the archive ``target``, under a temporary name first."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as handle:
            _write(folder, handle)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def unpack(archive: Path, folder: Path) -> list[Problem]:
    """Write the files of an archive into ``folder``; nothing is written outside of it, and no link is made.

    Args:
        archive: a file that ``pack`` wrote, or claims to be one.
        folder: exists and is empty.

    Returns:
        What is wrong with the archive, at most one thing; the folder is then of no use.
    """
    try:
        left = archive.stat().st_size  # nothing is compressed, so the files cannot be larger than the archive
        with tarfile.open(archive, "r:") as tar:
            for member in tar:
                left -= member.size
                problem = _entry_problem(member) or ("" if left >= 0 else "holds more bytes than the archive")
                if problem:
                    return [Problem("archive", f"The archive's entry {member.name!r} {problem}.")]
                target = folder / member.name
                if target.exists():
                    return [Problem("archive", f"The archive holds {member.name!r} twice.")]
                target.parent.mkdir(parents=True, exist_ok=True)
                _copy(tar, member, target)
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        return [Problem("archive", f"The archive cannot be read: {error}.")]
    if _packed_hash(folder) != hash_file(archive):
        return [Problem("archive", "The archive is not what packing its files gives: bytes between them were changed.")]
    return []


def _entry_problem(member: tarfile.TarInfo) -> str:
    """Return why an entry may not be unpacked, the end of a sentence; empty if it may."""
    if member.name not in UNLISTED and (problem := path_problem(member.name)):
        return problem
    # Not `isreg`: it takes sparse files, a few bytes that say how many zeros to write. They have three spellings.
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse() or member.size < 0:
        return "is no plain file"
    return "lies in too many folders" if member.name.count("/") > DEEPEST else ""


class _Hashing(io.RawIOBase):
    """Takes bytes and keeps their hash."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return len(data)


def _packed_hash(folder: Path) -> str:
    sink = _Hashing()
    _write(folder, sink)
    return sink.digest.hexdigest()


def _write(folder: Path, sink: Any) -> None:
    paths = sorted([*list_files(folder)[0], *(name for name in UNLISTED if (folder / name).is_file())])
    with tarfile.open(fileobj=sink, mode="w|", format=tarfile.PAX_FORMAT) as tar:
        for path in paths:
            entry = tarfile.TarInfo(path)  # time, owner and group stay 0
            entry.size, entry.mode = (folder / path).stat().st_size, 0o644
            with (folder / path).open("rb") as handle:
                tar.addfile(entry, handle)


def _copy(tar: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> None:
    source = cast(io.BufferedReader, tar.extractfile(member))
    with source, target.open("xb") as handle:
        while chunk := source.read(1 << 20):
            handle.write(chunk)
        if handle.tell() != member.size:
            raise EOFError(f"{member.name!r} is cut short")
