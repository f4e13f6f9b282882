"""What a person looks at when a run or a study has ended: the report page, and the study's place in W&B."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.page_marker import is_redacted_page
from experiments.study_records import STATE_FILE, read_study, study_runs
from framework.schema import TrackingConfig

__all__ = ["PAGE", "current_page", "has_page", "present_run", "present_study"]

PAGE = "report.html"
RESULTS_FILE = "results.json"


def present_run(results: Mapping[str, Any]) -> Path | None:
    """Write the report of a finished run and return the page; None where the run measured nothing.

    Args:
        results: as ``run_recipe`` returns them.

    Raises:
        DataError: replies that are damaged.
        StorageError: the folder cannot be written.
    """
    folder = Path(results["folder"])
    page = folder / PAGE
    if not results["rows"]:
        return None
    if not _is_current(page, [folder / RESULTS_FILE]):
        from experiments.report import write_report

        write_report([folder])
    return page


def present_study(table: Mapping[str, Any], tracking: TrackingConfig) -> Path | None:
    """Write the report of a study, track its table, and return the page; None where no run has finished.

    A redacted page that is newer than every record, failures and the note of the start included, is left alone, so
    that looking at a finished study again costs nothing.

    Args:
        table: as ``compare_study`` returns it.
        tracking: whether and where to.

    Raises:
        ConfigError: tracking is online and W&B cannot be reached or has no account.
        DataError: records or replies that are damaged.
        StorageError: the folder cannot be written.
    """
    folder = Path(table["folder"])
    if not has_page(table):
        return None
    if current_page(table) is None:
        from experiments.report import write_report
        from experiments.study_tracking import track_study

        write_report([folder], title=table["name"])
        names = {run["cell"] for run in table["runs"] if run["status"] == "finished"}
        records = [record for record in read_study(folder) if record["cell"] in names]
        runs = study_runs(records, folder=folder)
        track_study(table["name"], table["comparison"], runs, folder=folder, tracking=tracking)
    return folder / PAGE


def has_page(table: Mapping[str, Any]) -> bool:
    """Return whether there is anything to show of a study: a run that finished, and its comparison.

    Args:
        table: as ``compare_study`` returns it.
    """
    return bool(table["comparison"]) and any(run["status"] == "finished" for run in table["runs"])


def current_page(table: Mapping[str, Any]) -> Path | None:
    """Return the redacted page of a study that is newer than everything it shows; None where there is none.

    Args:
        table: as ``compare_study`` returns it.
    """
    folder = Path(table["folder"])
    kept = [folder / run["results"] for run in table["runs"] if run["status"] == "finished"]
    sources = [folder / STATE_FILE, *(folder / "failed").glob("*.json"), *kept]
    page = folder / PAGE
    return page if _is_current(page, [source for source in sources if source.is_file()]) else None


def _is_current(page: Path, sources: list[Path]) -> bool:
    return is_redacted_page(page) and all(page.stat().st_mtime >= source.stat().st_mtime for source in sources)
