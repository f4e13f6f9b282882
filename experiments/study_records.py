"""What a study keeps: its own settings, one record per run, and who is working on it.

``study.json`` says what the study was started with, ``<run>.json`` holds a finished run (its results and one outcome
per prompt and rate, so that the statistics need nothing else), ``failed/<run>.json`` one that failed. Paths in records
are relative to the study's folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.fingerprints import embedded_hash, local_model_hashes, named_hashes, versions, without_later
from experiments.measured_runs import RunSamples, check_last_model, check_results, find_outcomes, read_samples
from experiments.run_folder import OWNER_FILE, config_differences
from framework.errors import ConfigError, DataError
from framework.files import fingerprint, read_json, to_plain, write_json
from framework.study import StudyCell, StudyConfig

__all__ = [
    "RESULTS_ROOT",
    "STATE_FILE",
    "claim_study",
    "failed_record",
    "finished_record",
    "portable_results",
    "read_study",
    "record_of",
    "run_key",
    "study_runs",
]

RESULTS_ROOT = Path(__file__).parent / "results"
"""Where studies keep their records and tables."""
STATE_FILE = "study.json"
FORMAT = 1
SHOWN = 8
RESERVED = frozenset({STATE_FILE, "table.json", "comparison.json", OWNER_FILE})
"""Files of a study's folder that are no runs."""


def run_key(cell: StudyCell) -> str:
    """Return the fingerprint of what decides a run's numbers: settings, named files, embedded sets and packages.

    A model in a local folder or file counts by its content. Where a run writes, how it is tracked and its name decide
    nothing.
    """
    config = to_plain(cell.config)
    # Without a guard the key is what it was before there were any.
    trainer = {k: v for k, v in config["trainer"].items() if k != "threads" and not (k == "guard" and v is None)}
    kept = {k: v for k, v in config.items() if k not in ("output", "tracking", "name", "trainer")}
    kept["evaluate"] = without_later(kept["evaluate"])
    decided: dict[str, Any] = {"files": named_hashes(kept), "embedded": embedded_hash(), "versions": versions()}
    if model := local_model_hashes(kept["model"]["name"]):
        decided["model"] = model
    return fingerprint({"format": 2, "config": kept, "trainer": trainer, **decided})


def record_of(cell: StudyCell) -> dict[str, Any]:
    """Return the beginning of a run's record: what it is."""
    return {
        "cell": cell.name,
        "label": cell.label,
        "model": cell.model,
        "task": cell.task,
        "share": cell.harmful_share,
        "seed": cell.seed,
        "key": run_key(cell),
    }


def finished_record(folder: Path, cell: StudyCell) -> dict[str, Any] | None:
    """Return the record of a finished run under its present settings, or None.

    Raises:
        DataError: the record is damaged or of another schema version.
    """
    path = folder / f"{cell.name}.json"
    if not path.is_file():
        return None
    record = _read_record(path)
    return record if record["key"] == run_key(cell) else None


def failed_record(folder: Path, cell: StudyCell) -> dict[str, Any] | None:
    """Return the record of a run that failed under its present settings, or None."""
    path = folder / "failed" / f"{cell.name}.json"
    if not path.is_file():
        return None
    try:
        record = read_json(path)
    except (OSError, ValueError) as error:
        raise DataError(f"Expected `{path}` to be the record of a failure, but got: {error}. Remove it.") from error
    return dict(record) if record.get("key") == run_key(cell) else None


def read_study(folder: Path) -> list[dict[str, Any]]:
    """Return the records of a study's finished runs, by name.

    Raises:
        DataError: no such study, or damaged records; all of them are listed.
    """
    paths = [path for path in sorted(folder.glob("*.json")) if path.name not in RESERVED]
    problems, found = [], []
    for path in paths:
        try:
            found.append(_read_record(path))
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))
    if not found:
        raise DataError(f"Expected `{folder}` to be the folder of a study with finished runs, but got none there.")
    return found


def study_runs(
    records: Sequence[Mapping[str, Any]], *, folder: Path | None = None, with_samples: bool = False
) -> list[RunSamples]:
    """Return finished records as a comparison takes them.

    Args:
        records: of ``read_study``.
        folder: of the study; run folders are found from it.
        with_samples: read the replies too.

    Raises:
        DataError: the replies are asked for and gone, or a run did not measure its last model.
    """
    return [_as_run(record, folder, with_samples) for record in records]


def portable_results(results: Mapping[str, Any], folder: Path, run_folder: Path) -> dict[str, Any]:
    """Return results with paths relative to the study's folder; models in the cache keep their fingerprint only.

    Args:
        results: of the run.
        folder: of the study.
        run_folder: of the run.
    """
    there = os.path.relpath(run_folder, folder)
    rows = [{**row, "model": {**row["model"], "folder": None}} for row in results["rows"]]
    if rows:
        rows[-1]["model"]["folder"] = f"{there}/model"
    return {**results, "folder": there, "rows": rows}


def outcomes_of(results: Mapping[str, Any], run_folder: Path) -> dict[str, dict[str, int]]:
    """Return rate to prompt to 0 or 1 of a run's last model; empty when nothing was measured.

    Raises:
        DataError: the replies are damaged.
    """
    if not results["rows"]:
        return {}
    samples = read_samples(run_folder / "samples.jsonl", point=results["rows"][-1]["point"])
    return {rate: {key: int(hit) for key, hit in table.items()} for rate, table in find_outcomes(samples).items()}


def claim_study(study: StudyConfig, cells: Sequence[StudyCell], folder: Path, *, accept_changes: bool = False) -> None:
    """Note what a study is started with; refuse one that was started with something else.

    Args:
        study: as it is now.
        cells: its runs.
        folder: where it keeps its records.
        accept_changes: go on all the same; runs whose settings changed are run again.

    Raises:
        ConfigError: the settings differ; the differences are shown.
        DataError: the note of the start is damaged or of another version.
    """
    path, now = folder / STATE_FILE, _decisive(study)
    keys = {cell.name: run_key(cell) for cell in cells}
    if path.is_file():
        try:
            before = read_json(path)
            version = before["format"]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise DataError(f"Expected `{path}` to say what the study was started with, but got: {error}.") from error
        if version != FORMAT:
            raise DataError(
                f"Expected `{path}` to be of format {FORMAT}, but got {version!r}. Give the study a new name."
            )
        differences = config_differences(before["settings"], now)
        if differences and not accept_changes:
            shown = [*differences[:SHOWN], *([f"{len(differences) - SHOWN} more"] if len(differences) > SHOWN else [])]
            raise ConfigError(
                f"Expected the study {study.name!r} to be as it was started, but got other settings: "
                f"{'; '.join(shown)}. Give it another `name`, put the settings back, or go on with --accept-changes."
            )
        # Another version of Seawall may tell the same runs apart by other keys.
        if not differences and before.get("runs") == keys:
            return
    write_json(path, {"format": FORMAT, "name": study.name, "settings": now, "runs": keys})


def _decisive(study: StudyConfig) -> dict[str, Any]:
    """Return the settings that decide results."""
    plain = json.loads(json.dumps(to_plain(study)))
    base = {key: value for key, value in plain["base"].items() if key not in ("tracking", "output", "name")}
    if isinstance(base.get("trainer"), dict):
        base["trainer"] = {key: value for key, value in base["trainer"].items() if key != "threads"}
    return {"grid": plain["grid"], "reference": plain["reference"], "base": base}


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = read_json(path)
    except (OSError, ValueError) as error:
        raise DataError(
            f"Expected `{path}` to be the record of a run, but got: {error}. Remove it to run again."
        ) from error
    needed = ("cell", "label", "model", "task", "share", "seed", "key", "status", "results")
    missing = [key for key in needed if not isinstance(record, dict) or key not in record]
    if missing:
        raise DataError(
            f"Expected `{path}` to be the record of a run, but it lacks {', '.join(missing)}. Remove it to run again."
        )
    check_results(record["results"], path)
    return dict(record)


def _as_run(record: Mapping[str, Any], folder: Path | None, with_samples: bool) -> RunSamples:
    results = record["results"]
    check_last_model(results, Path(f"{record['cell']}.json") if folder is None else folder / f"{record['cell']}.json")
    row = results["rows"][-1]
    outcomes = {
        rate: {key: bool(hit) for key, hit in table.items()} for rate, table in record.get("outcomes", {}).items()
    }
    run_folder = Path(results.get("folder", "")) if folder is None else folder / results.get("folder", "")
    samples = read_samples(run_folder / "samples.jsonl", point=row["point"]) if with_samples else []
    return RunSamples(
        label=record["label"],
        model=record["model"],
        task=record["task"],
        share=float(record["share"]),
        seed=int(record["seed"]),
        name=record["cell"],
        row=row,
        outcomes=outcomes,
        samples=tuple(samples),
        folder=run_folder,
    )
