"""The folder of a run: it belongs to one config at a time, so that results of two are never mixed."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from framework.config import RunConfig, StageConfig, to_yaml
from framework.errors import DataError, HeldError
from framework.files import cache_root, fingerprint, read_json, to_plain, write_atomic, write_json
from framework.schema import STAGES

__all__ = ["PICTURES", "config_differences", "only_process", "portable_path", "take_folder"]

CONFIG_FILE = "config.yaml"
EARLIER = "earlier"
OWNER_FILE = "owner.json"
PICTURES = {name: f"training-{name}.svg" for name in STAGES}
"""What is drawn of each training stage."""
OUTPUTS = (
    "results.json",
    "samples.jsonl",
    "report.html",
    "metrics.csv",
    "results.parquet",
    "figures",
    "model",
    "adapter",
    "patches",
    *PICTURES.values(),
)
"""What a finished run leaves behind; the results come first, because a folder that has them counts as finished."""
SHOWN = 5


@contextlib.contextmanager
def only_process(folder: Path, what: str, *, wait: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold a folder; a second command is refused, so that nothing is done or written twice.

    The lock ends with the process, also with one that is killed.

    Args:
        folder: made if it is not there.
        what: lies in it: the run, the study.
        wait: told once who holds it, before waiting until it is free; None refuses at once.

    Raises:
        HeldError: another process holds it, and nobody waits.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock, owner = FileLock(str(folder / ".lock")), folder / OWNER_FILE
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        who = _owner(owner)
        if wait is None:
            raise HeldError(
                f"Expected the {what} in `{folder}` to be worked on by one command, but got a second one beside "
                f"{who}. Wait for it, or stop it."
            ) from error
        wait(f"waiting for {who}, which works on the {what} in {folder}")
        lock.acquire()
    try:
        write_json(owner, {"process": os.getpid(), "host": platform.node()})
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def _owner(path: Path) -> str:
    found: dict[str, Any] = {}
    with contextlib.suppress(FileNotFoundError):  # not written yet, or gone again in this moment
        found = read_json(path)
    return f"process {found.get('process', '?')} on {found.get('host', '?')}"


def take_folder(folder: Path, config: RunConfig, say: Callable[[str], None]) -> None:
    """Write the config into the run's folder; results of another config move to ``earlier/`` and the user is told.

    Args:
        folder: of the run.
        config: the run.
        say: tells the user a sentence.

    Raises:
        DataError: there are results, and the config they are of cannot be read.
        StorageError: the folder cannot be written.
    """
    path, text = folder / CONFIG_FILE, to_yaml(config)
    moved = [folder / name for name in OUTPUTS if (folder / name).exists()]
    old = _read(path)
    if old is None and moved and path.is_file():
        raise DataError(
            f"Expected `{path}` to say what the results beside it are of, but it cannot be read. Restore it, or move "
            f"{', '.join(item.name for item in moved)} away."
        )
    if old is None:
        if moved:
            target = folder / EARLIER / "unknown"
            _move(moved, target, path)
            say(f"{folder} held results without the config they are of; they are in {target} now")
    elif differences := config_differences(_completed(old), yaml.safe_load(text)):
        more = [f"{len(differences) - SHOWN} more"] if len(differences) > SHOWN else []
        shown = "; ".join([*differences[:SHOWN], *more])
        if moved:
            target = folder / EARLIER / fingerprint(old)
            _move(moved, target, path)
            say(f"{folder} held the results of another config ({shown}); they are in {target} now")
        else:
            say(f"{folder} was begun with another config ({shown}); stages that did not change are reused")
    write_atomic(path, text)


def config_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return ``key: old -> new`` for every setting that differs, keys dotted.

    Example:
        >>> config_differences({"seed": 0, "model": {"name": "a"}}, {"seed": 1, "model": {"name": "a"}})
        ['seed: 0 -> 1']
    """
    ours, theirs = _flat(old), _flat(new)
    pairs = {key: (_show(ours, key), _show(theirs, key)) for key in [*ours, *theirs]}
    return [f"{key}: {before} -> {after}" for key, (before, after) in pairs.items() if before != after]


def portable_path(path: Path) -> str:
    """Return a path as it may stand in results that go to other machines: without the folders of this one.

    What lies in the cache is named from there on (``<cache>/...``), what lies below the working folder relative to it,
    and of anything else only the last part.

    Example:
        >>> portable_path(Path("/somewhere/models/mine"))
        'mine'
    """
    full = path.expanduser().absolute()
    if full.is_relative_to(cache := cache_root().absolute()):
        return f"<cache>/{full.relative_to(cache).as_posix()}"
    if full.is_relative_to(here := Path.cwd()):
        return full.relative_to(here).as_posix()
    return full.name


def _read(path: Path) -> dict[str, Any] | None:
    """Return the config of an earlier run; None if there is none or it is no YAML mapping."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return found if isinstance(found, dict) else None


def _completed(old: dict[str, Any]) -> dict[str, Any]:
    """Return the config with the settings that did not exist yet when it was written, at their defaults."""
    found = _filled(old, to_plain(RunConfig(name="unnamed")))
    stages = found.get("stages")
    if isinstance(stages, dict):
        stage = to_plain(StageConfig())
        found["stages"] = {k: _filled(v, stage) if isinstance(v, dict) else v for k, v in stages.items()}
    return found


def _filled(values: dict[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    found = {**defaults, **values}
    for key, value in values.items():
        default = defaults.get(key)
        if isinstance(value, dict) and isinstance(default, dict):
            found[key] = _filled(value, default)
    return found


def _move(paths: list[Path], target: Path, config: Path) -> None:
    """Move the outputs into ``target`` and put the config they were made with beside them, if there is one."""
    target.mkdir(parents=True, exist_ok=True)
    for path in paths:
        there = target / path.name
        if there.is_dir():
            shutil.rmtree(there)
        path.replace(there)
    if config.is_file():
        shutil.copy2(config, target / CONFIG_FILE)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping) or not value:
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, item in value.items():
        found |= _flat(item, f"{prefix}.{key}" if prefix else str(key))
    return found


def _show(flat: Mapping[str, Any], key: str) -> str:
    return repr(flat[key]) if key in flat else "unset"
