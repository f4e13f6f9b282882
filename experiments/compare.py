"""``seawall compare``: a grid of runs; shared stages are trained once, finished runs kept, methods compared."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments.execution import Execution
from experiments.run import run_recipe
from experiments.run_folder import only_process
from experiments.study_estimate import (
    CellEstimate,
    count_on_disk,
    estimate_cells,
    machine_flops,
    measured_rates,
    rough_rates,
    study_history,
)
from experiments.study_pool import run_pool, starter
from experiments.study_progress import StudyProgress
from experiments.study_records import RESULTS_ROOT, claim_study, failed_record, finished_record, run_key
from experiments.study_tables import collect_rows, collect_stages, make_tables, study_records
from experiments.study_worker import run_cell
from framework.errors import ConfigError, DataError
from framework.interruption import check_stop
from framework.processes import is_main, on_main, world_size
from framework.study import StudyCell, StudyConfig, check_measured, study_cells

__all__ = ["Execution", "collect_rows", "collect_stages", "compare_study", "plan_study", "run_key"]


def compare_study(
    study: StudyConfig,
    *,
    console: Console | None = None,
    results_root: Path = RESULTS_ROOT,
    execution: Execution | None = None,
    cells: Sequence[StudyCell] | None = None,
) -> dict[str, Any]:
    """Run what is missing of a study and return its tables.

    A finished run is found by its settings and never repeated; one that was cut off goes on where it was; a failed one
    is recorded with its error, does not stop the others, and is left alone until ``retry_failed``. Each run's record is
    written to ``<results_root>/<study>/`` as soon as it is there.

    With several processes each of them calls this. An error that meets only some of them ends the study, because the
    others cannot be brought back to where the next run starts; started again, the study goes on after the last one.

    Args:
        study: the grid.
        console: where progress is drawn.
        results_root: folder of the kept results.
        execution: how; None runs one after another in this process.
        cells: the runs, where they have been checked already.

    Returns:
        ``{"name", "reference", "rows", "comparison", "stages", "alarms", "runs", "folder"}``; ``rows`` feed the result
        table, ``comparison`` is as ``compare_runs`` returns it, ``alarms`` say where judges contradict each other
        and which models' replies are degenerate.

    Raises:
        ConfigError: a run does not measure its last model, the runs ask for different numbers of processes, the
            settings are not those the study was started with, or another command works on it.
        DataError: kept results that are damaged or of another schema version; all of them are listed.
    """
    execution = execution or Execution()
    cells = list(study_cells(study) if cells is None else cells)
    check_measured(cells)
    _check_processes(cells, execution)
    folder = results_root / study.name
    with contextlib.ExitStack() as held:
        on_main(lambda: held.enter_context(only_process(folder, "study")))
        on_main(lambda: claim_study(study, cells, folder, accept_changes=execution.accept_changes))
        known = on_main(lambda: _known_records(cells, folder))
        _run_all(cells, folder, known, execution, console)
        return on_main(lambda: make_tables(study, study_records(cells, folder), folder))


def plan_study(
    study: StudyConfig, cells: Sequence[StudyCell], *, results_root: Path = RESULTS_ROOT
) -> list[CellEstimate]:
    """Return what every run of a study would take, without running anything.

    Args:
        study: the grid.
        cells: its runs.
        results_root: folder of the kept results, whose earlier runs tell how fast this machine is.

    Raises:
        DataError: kept results that are damaged.
    """
    folder = results_root / study.name
    known = _known_records(cells, folder)
    rates = measured_rates(study_history([results_root]))
    flops = None
    for cell in cells:
        if cell.model not in rates and (parameters := count_on_disk(cell.model)) is not None:
            flops = flops or machine_flops()
            rates[cell.model] = rough_rates(cell.config, parameters=parameters, flops=flops)
    return estimate_cells(cells, rates, finished=known)


def _check_processes(cells: Sequence[StudyCell], execution: Execution) -> None:
    counts = sorted({cell.config.trainer.devices * cell.config.trainer.num_nodes for cell in cells})
    if len(counts) > 1:
        raise ConfigError(f"Expected every run of a study to use as many processes, but got {counts}.")
    if execution.is_pooled and (counts[0] > 1 or world_size() > 1):
        raise ConfigError(
            f"Expected runs of one process with several workers or submitit, but got {counts[0]} each. Use one worker."
        )


def _known_records(cells: Sequence[StudyCell], folder: Path) -> list[str]:
    """Return the names of the finished runs; every damaged record is named at once."""
    problems, known = [], []
    for cell in cells:
        try:
            if finished_record(folder, cell) is not None:
                known.append(cell.name)
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))
    return known


def _run_all(
    cells: Sequence[StudyCell], folder: Path, known: Sequence[str], execution: Execution, console: Console | None
) -> None:
    shown = console if is_main() else None
    names = [cell.name for cell in cells]
    with StudyProgress(names, workers=execution.workers, console=shown, is_live=execution.is_pooled) as progress:
        left = []
        for cell in cells:
            if cell.name in known:
                progress.states[cell.name] = "kept"
            elif not execution.retry_failed and on_main(lambda cell=cell: failed_record(folder, cell)):  # type: ignore[misc]
                progress.put(cell.name, "failed")
            else:
                left.append(cell)
        if execution.is_pooled:
            start = starter(
                execution.executor,
                folder,
                workers=execution.workers,
                retry_failed=execution.retry_failed,
                parameters=execution.job,
            )
            run_pool(left, folder, start=start, workers=execution.workers, progress=progress, check=check_stop)
            return
        for cell in left:
            progress.put(cell.name, "running")
            record = run_cell(cell, folder, runner=run_recipe, console=console, retry_failed=execution.retry_failed)
            progress.put(cell.name, "finished" if record["status"] == "finished" else "failed")
