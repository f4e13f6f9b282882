"""A study of which nothing is left to do, answered from what it keeps: nothing that trains or computes is imported."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.execution import Execution
from experiments.run_folder import only_process
from experiments.study_records import RESULTS_ROOT, claim_study
from experiments.study_tables import stored_tables, study_records
from framework.study import StudyCell, StudyConfig

__all__ = ["finished_study"]

LAUNCHERS = ("WORLD_SIZE", "SLURM_NTASKS")
"""Variables of launchers; several processes decide together what is left to do."""


def finished_study(
    study: StudyConfig,
    cells: Sequence[StudyCell],
    *,
    execution: Execution,
    results_root: Path = RESULTS_ROOT,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any] | None:
    """Return the tables of a study whose runs are all there, or None if anything has to be run or computed.

    Runs that failed count as there unless they are to be tried again. Settings need no check by the methods here: a run
    is found by everything that decides its numbers, and was checked when it was run.

    Args:
        study: the grid.
        cells: its runs.
        execution: how runs would be carried out.
        results_root: folder of the kept results.
        environment: of the process; None takes this one's.

    Returns:
        What ``compare_study`` returns.

    Raises:
        ConfigError: the settings are not those the study was started with, or another command works on it.
        DataError: a record is damaged.
    """
    folder = results_root / study.name
    given = os.environ if environment is None else environment
    several = any(cell.config.trainer.devices * cell.config.trainer.num_nodes > 1 for cell in cells)
    if several or any(given.get(name, "1") != "1" for name in LAUNCHERS) or not folder.is_dir():
        return None
    with only_process(folder, "study"):
        records = study_records(cells, folder)
        left = len(records) < len(cells)
        if left or (execution.retry_failed and any(run["status"] != "finished" for run in records)):
            return None
        claim_study(study, cells, folder, accept_changes=execution.accept_changes)
        return stored_tables(study, records, folder)
