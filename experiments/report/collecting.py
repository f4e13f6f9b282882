"""Finds the runs a report is about: run folders, results files, and the folders of studies."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.measured_runs import check_results
from framework.errors import DataError
from framework.files import fingerprint

__all__ = ["CollectedRun", "Collection", "collect_runs"]

RESULTS_FILE = "results.json"
SAMPLES_FILE = "samples.jsonl"
STUDY_TABLE = "table.json"
"""Of a study's folder; says which label the others are compared with."""
STUDY_NOTE = "study.json"
"""Of a study's folder; says by name and key which runs it has now."""
FAILED = "failed"
EARLIER = "earlier"
"""Results of settings that a run folder had before; they are another run's."""


@dataclass(frozen=True)
class CollectedRun:
    """One run, as it was found."""

    name: str
    """Unique within a report."""
    label: str
    """What its last model is called in tables."""
    results: Mapping[str, Any] = field(default_factory=dict)
    """Content of ``results.json``; empty for a failed run."""
    model: str = ""
    task: str = ""
    share: float | None = None
    seed: int | None = None
    error: str = ""
    """Why it failed; empty if it finished."""
    folder: Path | None = None
    """Where replies and pictures of the run lie; None if they are not there any more."""
    outcomes: Mapping[str, Mapping[str, bool]] = field(default_factory=dict)
    """Rate to prompt to outcome of the last model, where the study kept them."""
    source: Path = Path()
    key: str | None = None
    """Of the settings, where a study keeps the run."""

    @property
    def is_finished(self) -> bool:
        """Whether there are results."""
        return not self.error

    @property
    def samples(self) -> Path | None:
        """The file of replies, where there is one."""
        path = None if self.folder is None else self.folder / SAMPLES_FILE
        return path if path is not None and path.is_file() else None

    @property
    def pictures(self) -> list[Path]:
        """Pictures that methods left beside the results."""
        return sorted(self.folder.glob("*.svg")) if self.folder is not None else []


@dataclass(frozen=True)
class Collection:
    """All runs of a report."""

    name: str
    runs: tuple[CollectedRun, ...]
    """Those that finished, in the order given."""
    failed: tuple[CollectedRun, ...] = ()
    reference: str | None = None
    """Label the others are compared with, where the study says one."""


def collect_runs(paths: Sequence[Path], *, name: str | None = None) -> Collection:
    """Return the runs that lie at ``paths``, each once.

    Args:
        paths: run folders, files ``results.json``, files of a study's folder, whole study folders (those with
            ``table.json`` or kept runs), or folders with run folders below.
        name: of the report; None takes that of the only path or of the runs' common folder.

    Raises:
        DataError: nothing is there, a file is damaged or of another schema version, or no run finished.
    """
    if not paths:
        raise DataError("Expected at least one run to report on, but got none. Name run folders or a study's folder.")
    found: list[CollectedRun] = []
    reference = None
    for path in paths:
        found += _runs_at(path)
        reference = reference or _reference(path)
    runs = _distinct(found)
    finished = tuple(run for run in runs if run.is_finished)
    if not finished:
        errors = "; ".join(sorted({run.error for run in runs})) or "no results"
        raise DataError(f"Expected at least one finished run, but got none: {errors}. Run it again first.")
    # A run that failed and later finished is not reported as failed.
    names = {run.name for run in finished}
    failed = tuple(run for run in runs if not run.is_finished and run.name not in names)
    return Collection(name or _title(paths, finished), finished, failed, reference)


def _runs_at(path: Path) -> list[CollectedRun]:
    if path.is_file():
        return [_read_run(path)]
    if not path.is_dir():
        raise DataError(
            f"Expected `{path}` to be a run's folder, a study's folder or a results file, but it is not there."
        )
    if (path / RESULTS_FILE).is_file():
        return [_read_run(path / RESULTS_FILE)]
    kept = [*sorted(path.glob("*.json")), *sorted((path / FAILED).glob("*.json"))]
    records = _current(path, [run for file in kept if file.name != STUDY_TABLE for run in _study_record(file)])
    below = [file for file in sorted(path.rglob(RESULTS_FILE)) if EARLIER not in file.parts]
    if not records and not below:
        raise DataError(
            f"Expected `{path}` to hold a run ({RESULTS_FILE}) or a study's kept runs, but found neither. "
            "A run that was interrupted has no results yet: run it again."
        )
    return records or [_read_run(file) for file in below]


def _current(path: Path, runs: Sequence[CollectedRun]) -> list[CollectedRun]:
    """Return the runs that a study still has under its present settings; all of them where it does not say.

    Raises:
        DataError: there are records, but none of the present settings.
    """
    note = path / STUDY_NOTE
    keys = _read(note).get("runs") if note.is_file() else None
    if not isinstance(keys, dict):
        return list(runs)
    found = [run for run in runs if run.key is not None and keys.get(run.name) == run.key]
    if runs and not found:
        raise DataError(
            f"Expected `{path}` to hold runs of the study's present settings, but got {len(runs)} of earlier ones. Run "
            "the study again."
        )
    return found


def _study_record(file: Path) -> list[CollectedRun]:
    """Return the run in one file of a study's folder; other files that the study keeps there hold none."""
    value = _read(file)
    return [_from_record(file, value)] if "cell" in value else []


def _read_run(file: Path) -> CollectedRun:
    value = _read(file)
    return _from_record(file, value) if "cell" in value else _from_results(file, value)


def _read(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"Expected `{file}` to be JSON, but got: {error}. Remove it and run the run again.") from error
    if not isinstance(value, dict):
        raise DataError(f"Expected `{file}` to hold an object, but got {type(value).__name__}.")
    return value


def _from_record(file: Path, record: Mapping[str, Any]) -> CollectedRun:
    """Return the run of a study's kept file."""
    shared: dict[str, Any] = {
        "name": str(record["cell"]),
        "label": str(record.get("label", record["cell"])),
        "model": str(record.get("model") or ""),
        "task": str(record.get("task") or ""),
        "share": record.get("share"),
        "seed": record.get("seed"),
        "source": file,
        "key": record.get("key"),
    }
    if record.get("status") != "finished":
        return CollectedRun(error=str(record.get("error") or record.get("status") or "unknown"), **shared)
    results = _checked(file, record.get("results"))
    outcomes = {
        rate: {prompt: bool(hit) for prompt, hit in table.items()}
        for rate, table in (record.get("outcomes") or {}).items()
    }
    return CollectedRun(results=results, folder=_folder_of(file, results), outcomes=outcomes, **shared)


def _from_results(file: Path, value: Mapping[str, Any]) -> CollectedRun:
    """Return the run of a run folder."""
    results = _checked(file, value)
    config = results.get("config") or {}
    data = (((config.get("stages") or {}).get("finetune") or {}).get("data")) or {}
    rows = results["rows"]
    return CollectedRun(
        name=str(results.get("name") or file.parent.name),
        label=str(rows[-1]["label"]) if rows else str(results.get("name")),
        results=results,
        model=str((config.get("model") or {}).get("name") or ""),
        task=str(data.get("task") or config.get("task") or ""),
        share=data.get("harmful_share") if data.get("task") else None,
        seed=config.get("seed"),
        folder=file.parent,
        source=file,
    )


def _checked(file: Path, results: Any) -> Mapping[str, Any]:
    check_results(results, file)
    for key in ("rows", "stages"):
        items = results.get(key, [])
        if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
            raise DataError(f"Expected `{key}` of `{file}` to be a list of objects, but got {_short(items)}.")
    return {"stages": [], **results}


def _folder_of(file: Path, results: Mapping[str, Any]) -> Path | None:
    """Return the run folder that a study's record speaks of, if it still holds the same results."""
    given = Path(str(results.get("folder") or ""))
    for folder in (file.parent / given, given):
        there = folder / RESULTS_FILE
        if there.is_file() and _identity(_read(there)) == _identity(results):
            return folder
    return None


def _identity(results: Mapping[str, Any]) -> str:
    return fingerprint([(row.get("point"), row.get("metrics")) for row in results.get("rows", [])])


def _distinct(runs: Iterable[CollectedRun]) -> list[CollectedRun]:
    """Return the runs with unique names; one that was named twice on the command line stands once."""
    kept: dict[str, CollectedRun] = {}
    for run in runs:
        name = run.name if run.is_finished else f"{run.name} (failed)"
        if name in kept and kept[name].source.resolve() != run.source.resolve():
            name = f"{name} ({run.source.parent.name})"
        number = 2
        while name in kept and kept[name].source.resolve() != run.source.resolve():
            name = re.sub(r"( #\d+)?$", f" #{number}", name, count=1)
            number += 1
        if name not in kept:
            kept[name] = run if not run.is_finished or name == run.name else _renamed(run, name)
    return list(kept.values())


def _renamed(run: CollectedRun, name: str) -> CollectedRun:
    return CollectedRun(**{**run.__dict__, "name": name})


def _reference(path: Path) -> str | None:
    table = path / STUDY_TABLE if path.is_dir() else path.parent / STUDY_TABLE
    if not table.is_file():
        return None
    reference = _read(table).get("reference")
    return reference if isinstance(reference, str) else None


def _title(paths: Sequence[Path], runs: Sequence[CollectedRun]) -> str:
    if len(paths) == 1:
        path = paths[0].resolve()
        if path.is_dir() and (path / RESULTS_FILE).is_file():
            return runs[0].name
        return path.name if path.is_dir() else runs[0].name
    parents = {run.name.rpartition("/")[0] for run in runs} | {""}
    common = parents - {""}
    return common.pop() if len(common) == 1 and len(parents) == 2 else f"{len(runs)} runs"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
