"""The manifest of a bundle: every file with its size and SHA-256, in one canonical form.

One set of files has one manifest, and one manifest has one meaning.

Canonical JSON here: UTF-8, keys sorted, no white space, no numbers but whole ones, a line feed at the end. A manifest
whose bytes are not exactly those is refused, so no byte of it is free to change.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from framework.errors import DataError
from framework.files import hash_file

__all__ = [
    "MANIFEST_FILE",
    "SIGNATURE_FILE",
    "FileEntry",
    "Manifest",
    "Problem",
    "canonical_json",
    "compare_files",
    "list_files",
    "make_manifest",
    "parse_manifest",
    "path_problem",
    "read_time",
    "show_time",
]

MANIFEST_FILE = "manifest.json"
SIGNATURE_FILE = "signature.json"
SCHEMA_VERSION = 1
KIND = "seawall-release"
UNLISTED = frozenset({MANIFEST_FILE, SIGNATURE_FILE})
"""Files that cannot list themselves; the signature covers the one and is checked byte by byte itself."""
_HASH = re.compile(r"[0-9a-f]{64}")
_TIME = "%Y-%m-%dT%H:%M:%SZ"
_KEYS = {"schema_version", "kind", "name", "created", "expires", "files"}


class Problem(NamedTuple):
    """Something wrong with a bundle."""

    part: str
    """``manifest``, ``signature``, ``expiry``, ``files``, ``archive`` or ``replies``."""
    detail: str
    """One sentence."""


class FileEntry(NamedTuple):
    """What the manifest says of one file."""

    size: int
    """Bytes."""
    sha256: str
    """Of the content, in hex."""


@dataclass(frozen=True)
class Manifest:
    """What a bundle holds and until when it may be relied on."""

    name: str
    created: datetime
    expires: datetime | None
    """From then on the bundle is refused; None never."""
    files: Mapping[str, FileEntry]
    """By path inside the bundle, ``/`` between folders; manifest and signature are not among them."""


def canonical_json(value: Any) -> bytes:
    r"""Return ``value`` as canonical JSON.

    Example:
        >>> canonical_json({"b": 1, "a": "x"})
        b'{"a":"x","b":1}\n'
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return f"{text}\n".encode()


def make_manifest(folder: Path, *, name: str, created: datetime, expires: datetime | None) -> bytes:
    """Return the bytes of the manifest of everything that lies in ``folder`` now.

    Args:
        folder: the bundle, without manifest and signature.
        name: of the bundle.
        created: now, with a time zone.
        expires: end of its validity, with a time zone; None for none.

    Raises:
        DataError: there are no files, or something that is no plain file.
    """
    paths, problems = list_files(folder)
    if problems or not paths:
        found = problems[0].detail if problems else "It holds no files."
        raise DataError(f"Expected `{folder}` to hold plain files for a bundle. {found}")
    files = {path: {"size": (folder / path).stat().st_size, "sha256": hash_file(folder / path)} for path in paths}
    return canonical_json(
        {
            "schema_version": SCHEMA_VERSION,
            "kind": KIND,
            "name": name,
            "created": show_time(created),
            "expires": None if expires is None else show_time(expires),
            "files": files,
        }
    )


def parse_manifest(data: bytes) -> Manifest:
    """Return the manifest in ``data``.

    Raises:
        DataError: it is no JSON, not in canonical form, of another schema version, lacks something, or lists a path
            that leads out of the bundle.
    """
    try:
        value = json.loads(data.decode("utf-8"))
        is_canonical = canonical_json(value) == data
    except (ValueError, RecursionError) as error:
        raise DataError(f"Expected {MANIFEST_FILE} to be JSON, but got: {error}.") from error
    if not is_canonical:
        raise DataError(f"Expected {MANIFEST_FILE} to be in canonical form, but it was written or changed otherwise.")
    if not isinstance(value, dict) or value.get("kind") != KIND or value.get("schema_version") != SCHEMA_VERSION:
        raise DataError(f"Expected {MANIFEST_FILE} to be a {KIND} of schema version {SCHEMA_VERSION}, but got another.")
    if set(value) != _KEYS or not isinstance(value["name"], str):
        raise DataError(f"Expected {MANIFEST_FILE} to have the keys {', '.join(sorted(_KEYS))}, but got others.")
    expires = value["expires"]
    return Manifest(
        value["name"],
        read_time(value["created"]),
        None if expires is None else read_time(expires),
        _parse_files(value["files"]),
    )


def _parse_files(value: Any) -> dict[str, FileEntry]:
    if not isinstance(value, dict) or not value:
        raise DataError(f"Expected `files` of {MANIFEST_FILE} to list files, but got none.")
    found = {}
    for path, entry in value.items():
        problem = path_problem(path)
        if problem:
            raise DataError(f"Expected paths of {MANIFEST_FILE} to lie inside the bundle, but {path!r} {problem}.")
        is_entry = isinstance(entry, dict) and set(entry) == {"size", "sha256"}
        size, digest = (entry["size"], entry["sha256"]) if is_entry else (None, None)
        if type(size) is not int or size < 0 or not isinstance(digest, str) or not _HASH.fullmatch(digest):
            raise DataError(f"Expected {MANIFEST_FILE} to give size and SHA-256 of {path!r}, but got {entry!r}.")
        found[path] = FileEntry(size, digest)
    return found


def path_problem(path: str) -> str:
    """Return why a path may not stand in a manifest or an archive; empty when it may.

    Example:
        >>> [path_problem(p) for p in ("model/config.json", "../x", "/etc/passwd", "a//b")]
        ['', 'leads out of the bundle', 'is absolute', 'is not in its plain form']
    """
    if path.startswith("/") or re.match(r"[A-Za-z]:", path):
        return "is absolute"
    if "\\" in path or any(ord(sign) < 32 or ord(sign) == 127 for sign in path):
        return "holds signs that no path here has"
    if ".." in path.split("/"):
        return "leads out of the bundle"
    if not path or path == "." or str(PurePosixPath(path)) != path:
        return "is not in its plain form"
    return "names a file that cannot list itself" if path in UNLISTED else ""


def list_files(folder: Path) -> tuple[list[str], list[Problem]]:
    """Return the paths of all files below ``folder`` but manifest and signature, sorted, and what is no plain file.

    Links are not followed. An empty folder is a problem too: nothing in a manifest could speak for it. So is one that
    cannot be listed: whatever lies in it would count as absent.
    """
    paths: list[str] = []
    problems: list[Problem] = []

    def refuse(error: OSError) -> None:
        name = Path(str(error.filename)).relative_to(folder).as_posix()
        problems.append(Problem("files", f"{name!r} cannot be read: {error.strerror or error}."))

    for place, folders, names in os.walk(folder, onerror=refuse):
        inside = Path(place).relative_to(folder)
        if not folders and not names and place != str(folder):
            problems.append(Problem("files", f"Folder {inside.as_posix()!r} is empty and not part of the bundle."))
        for name in sorted([*folders, *names]):
            path = (inside / name).as_posix()
            try:
                mode = (Path(place) / name).lstat().st_mode
            except OSError as error:  # a folder may be listed, and yet not entered
                refuse(error)
                continue
            if stat.S_ISLNK(mode):
                problems.append(Problem("files", f"{path!r} is a symbolic link, which a bundle may not hold."))
            elif not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                problems.append(Problem("files", f"{path!r} is neither a file nor a folder."))
            elif stat.S_ISREG(mode) and path not in UNLISTED:
                paths.append(path)
    return sorted(paths), problems


def compare_files(folder: Path, manifest: Manifest) -> list[Problem]:
    """Return every file that is missing, changed or not listed; links and special files are refused too."""
    paths, problems = list_files(folder)
    present = set(paths)
    for path, entry in manifest.files.items():
        detail = _compare(folder / path, entry) if path in present else "is missing"
        if detail:
            problems.append(Problem("files", f"{path!r} {detail}."))
    extra = sorted(present - set(manifest.files))
    return problems + [Problem("files", f"{path!r} is not part of the bundle.") for path in extra]


def _compare(path: Path, entry: FileEntry) -> str:
    """Return what is wrong with a file; empty if nothing is."""
    try:
        size = path.stat().st_size
        if size != entry.size:
            return f"has {size} bytes instead of {entry.size}"
        return "" if hash_file(path) == entry.sha256 else "was changed: its SHA-256 differs"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"


def show_time(moment: datetime) -> str:
    """Return a moment as it stands in a manifest: UTC, to the second."""
    return moment.astimezone(timezone.utc).strftime(_TIME)


def read_time(text: Any) -> datetime:
    """Return the moment that ``text`` of a manifest names.

    Raises:
        DataError: it is none.
    """
    try:
        return datetime.strptime(text, _TIME).replace(tzinfo=timezone.utc)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"Expected a time of {MANIFEST_FILE} to read like 2030-01-31T12:00:00Z, but got {text!r}."
        ) from error
