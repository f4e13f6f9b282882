"""The tables of a study, from the records of its runs; found again while records and rules are the same."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.study_records import failed_record, finished_record, study_runs
from framework.files import fingerprint, read_json, write_atomic, write_json
from framework.study import StudyCell, StudyConfig

__all__ = ["TABLE_FILE", "collect_rows", "collect_stages", "make_tables", "stored_tables", "study_records"]

TABLE_FILE = "table.json"
PACKAGES = ("numpy", "scipy", "statsmodels")
RULES = (
    "alarms.py",
    "comparison.py",
    "measured_runs.py",
    "power.py",
    "statistics.py",
    "study_tables.py",
    "tradeoff.py",
    "../framework/evaluation/panel.py",
    "../framework/evaluation/rates.py",
)
"""Files that decide what is computed from the records."""


def study_records(cells: Sequence[StudyCell], folder: Path) -> list[dict[str, Any]]:
    """Return the records of the runs that finished or failed under their present settings, in the order of the grid.

    Raises:
        DataError: a record is damaged.
    """
    found = [finished_record(folder, cell) or failed_record(folder, cell) for cell in cells]
    return [record for record in found if record is not None]


def make_tables(study: StudyConfig, records: Sequence[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Return the tables of a study, computed only if the stored ones are of other records, and write them.

    Args:
        study: the grid.
        records: of ``study_records``.
        folder: of the study.

    Returns:
        What ``compare_study`` returns.
    """
    from experiments.comparison_table import comparison_markdown
    from experiments.console import markdown_table

    if (stored := stored_tables(study, records, folder)) is not None:
        return stored
    table = _tables(study, records)
    write_json(folder / TABLE_FILE, {**table, "folder": ".", "inputs": _inputs(study, records)})
    compared = comparison_markdown(table["comparison"])
    alarms = "".join(f"- {alarm}\n" for alarm in table["alarms"])
    text = f"# {table['name']}\n\n{markdown_table(table['rows'])}\n{alarms}{compared}"
    write_atomic(folder / "table.md", text)
    return {**table, "folder": str(folder)}


def stored_tables(study: StudyConfig, records: Sequence[dict[str, Any]], folder: Path) -> dict[str, Any] | None:
    """Return the tables as they were written, or None if they were made of other records or by other rules.

    The bootstrap of a large study takes minutes, and reading its answer needs neither numpy nor scipy.

    Args:
        study: the grid.
        records: of ``study_records``.
        folder: of the study.
    """
    try:
        table = read_json(folder / TABLE_FILE)
    except (OSError, ValueError):
        return None  # they are made anew, from the records
    if not isinstance(table, dict) or table.pop("inputs", None) != _inputs(study, records):
        return None
    return {**table, "folder": str(folder)}


def _inputs(study: StudyConfig, records: Sequence[Mapping[str, Any]]) -> str:
    """Return the fingerprint of everything that decides the tables."""
    return fingerprint({"name": study.name, "reference": study.reference_label, "records": records, "rules": _rules()})


@functools.cache
def _rules() -> str:
    digest = hashlib.sha256()
    for name in RULES:
        digest.update((Path(__file__).parent / name).read_bytes())
    digest.update(repr([importlib.metadata.version(name) for name in PACKAGES]).encode())
    return digest.hexdigest()


def _tables(study: StudyConfig, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    from experiments.alarms import degenerate_alarms, study_alarms
    from experiments.comparison import compare_runs

    finished = [run for run in records if run["status"] == "finished"]
    measured = [run for run in finished if run["results"]["rows"]]
    rows = collect_rows(finished)
    groups = {_group(run) for run in measured if run["label"] == study.reference_label}
    return {
        "name": study.name,
        "reference": study.reference_label,
        "rows": rows,
        # A group whose reference failed has nothing to be compared with; its rows stand in the table all the same.
        "comparison": compare_runs(
            study_runs([run for run in measured if _group(run) in groups]), reference=study.reference_label
        )
        if groups
        else [],
        "stages": collect_stages(finished),
        "alarms": [*study_alarms(finished), *degenerate_alarms(rows)],
        "runs": [_brief(run) for run in records],
    }


def _group(run: Mapping[str, Any]) -> tuple[str, str, str]:
    return str(run["model"]), str(run["task"]), str(run["share"])


def collect_rows(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of the table: models that several runs share stand once, then the last model of every run."""
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    for run in runs:
        for row in run["results"]["rows"]:
            # One model measured on two tasks is two rows: only the same replies are the same row.
            identity = fingerprint([row["model"]["fingerprint"], row["metrics"]])
            if identity not in seen:
                seen.add(identity)
                rows.append({**row, "label": row["label"] + _suffix(run, runs, row["point"]), "seed": run["seed"]})
    return sorted(rows, key=lambda row: ("start", "align", "finetune", "repair").index(row["point"]))


def collect_stages(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the wall time of what the runs did, in the order it was done; what was found again is left out."""
    times = []
    for run in runs:
        for stage in run["results"]["stages"]:
            if stage["reused"]:
                continue
            name = f"{run['label']}: {stage['stage']}{_suffix(run, runs, 'finetune')}"
            times.append({"stage": name, "seconds": stage["seconds"], "reused": False})
    return times


def _suffix(run: dict[str, Any], runs: list[dict[str, Any]], point: str) -> str:
    """Return what tells a row from the others: the settings that vary over the runs; the start model has fewer."""
    axes = ["model"] if point == "start" else ["model", "task", "share", "seed"]
    varying = [axis for axis in axes if len({str(other.get(axis)) for other in runs}) > 1]
    return f" ({', '.join(f'{axis} {run.get(axis)}' for axis in varying)})" if varying else ""


def _brief(run: dict[str, Any]) -> dict[str, Any]:
    return {k: run[k] for k in ("cell", "label", "seed", "status", "error") if k in run} | {
        "results": f"{run['cell']}.json" if run["status"] == "finished" else f"failed/{run['cell']}.json"
    }
