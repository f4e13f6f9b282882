"""Reads what W&B wrote offline: the records of a ``.wandb`` file (a LevelDB log of protocol buffers)."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from wandb.proto.wandb_internal_pb2 import Record

BLOCK = 32768
FILE_HEADER, RECORD_HEADER = 7, 7
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4
PATIENCE = 60.0
"""Seconds."""


class OfflineRun(NamedTuple):
    """One W&B run."""

    name: str
    group: str
    job_type: str
    summary: dict[str, Any]
    config: dict[str, Any]
    history: dict[str, Any]
    """The last value logged under each key."""
    artifacts: dict[str, dict[str, Any]]
    """Name to type and the names of the files inside."""
    files: Path
    """Folder of media."""


def read_offline_run(path: Path) -> OfflineRun:
    name = group = job_type = ""
    summary: dict[str, Any] = {}
    config: dict[str, Any] = {}
    history: dict[str, Any] = {}
    artifacts: dict[str, dict[str, Any]] = {}
    for record in _finished_records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            name, group, job_type = record.run.display_name, record.run.run_group, record.run.job_type
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "summary":
            summary |= {_key(item): json.loads(item.value_json) for item in record.summary.update}
        elif kind == "history":
            for item in record.history.item:
                _put(history, item)
        elif kind == "config":
            config |= {_key(item): json.loads(item.value_json) for item in record.config.update}
        elif kind == "artifact":
            inside = {entry.path: Path(entry.local_path) for entry in record.artifact.manifest.contents}
            artifacts[record.artifact.name] = {"type": record.artifact.type, "files": inside}
        elif kind == "request" and record.request.HasField("log_artifact"):
            artifact = record.request.log_artifact.artifact
            inside = {entry.path: Path(entry.local_path) for entry in artifact.manifest.contents}
            artifacts[artifact.name] = {"type": artifact.type, "files": inside}
    return OfflineRun(name, group, job_type, summary, config, history, artifacts, path.parent / "files")


def _put(into: dict[str, Any], item: Any) -> None:
    """A value of several fields comes as one item a field."""
    *outer, last = list(item.nested_key) or [item.key]
    for key in outer:
        into = into.setdefault(key, {})
    into[last] = json.loads(item.value_json)


def _key(item: Any) -> str:
    return item.key or ".".join(item.nested_key)


def _finished_records(path: Path) -> list[Record]:
    """W&B's own process writes the last records a moment after the run was finished."""
    deadline = time.monotonic() + PATIENCE
    while True:
        records = list(_records(path))
        if any(record.HasField("exit") for record in records):
            return records
        assert time.monotonic() < deadline, f"{path} has no end"
        time.sleep(0.2)


def _records(path: Path) -> Iterator[Record]:
    data = path.read_bytes()
    assert data[:4] in (b"", b":W&B")
    place, parts = FILE_HEADER, b""
    while place + RECORD_HEADER <= len(data):
        left = BLOCK - place % BLOCK
        if left < RECORD_HEADER:
            place += left
            continue
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        if kind == 0 or place + RECORD_HEADER + size > len(data):
            break
        parts += data[place + RECORD_HEADER : place + RECORD_HEADER + size]
        place += RECORD_HEADER + size
        if kind in (FULL, LAST):
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record
