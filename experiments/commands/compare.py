"""``seawall compare``: a grid of runs and their table."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from rich.console import Console

from experiments.commands.output import (
    add_settings,
    clean_stdout,
    distribute,
    known_names,
    print_json,
    say_page,
    show_results,
)

if TYPE_CHECKING:
    from experiments.execution import Execution
    from framework.study import StudyCell, StudyConfig

__all__ = ["SUMMARY", "add_arguments", "add_execution", "command", "execute", "read_execution"]

SUMMARY = "run the grid of a study, what is missing of it, and compare the methods"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("study", metavar="STUDY", help="a YAML file or the name of a study, e.g. quickstart")
    add_execution(parser)
    add_settings(parser)


def add_execution(parser: argparse.ArgumentParser) -> None:
    """Declare how the runs are carried out; other commands that run studies share these options."""
    parser.add_argument("--dry-run", action="store_true", help="print the runs, estimated time and memory; run nothing")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="runs at once (default: 1)")
    where = "local: worker processes; submitit-local, slurm: jobs through submitit (default: local)"
    parser.add_argument("--executor", default="local", metavar="NAME", help=where)
    job = "setting of submitit, e.g. slurm_partition=gpu timeout_min=600; repeatable"
    parser.add_argument("--job", action="append", default=[], metavar="key=value", help=job)
    parser.add_argument("--retry-failed", action="store_true", help="run again what failed before")
    changes = "go on although the study's settings changed since it was started; changed runs are run again"
    parser.add_argument("--accept-changes", action="store_true", help=changes)
    parser.add_argument("--results", metavar="FOLDER", help="where studies keep their records and tables")


def command(arguments: argparse.Namespace) -> int:
    """Check every run of the grid, run what is missing and show the tables; returns the exit code."""
    from framework.study import load_study_config, study_cells

    study = load_study_config(arguments.study, arguments.overrides)
    if not arguments.dry_run and (code := _answer_at_once(arguments, study)) is not None:
        return code
    from framework.registry import validate_methods

    cells = study_cells(study, known=known_names(), validate_methods=validate_methods)
    return execute(arguments, study, cells)


def execute(arguments: argparse.Namespace, study: StudyConfig, cells: list[StudyCell]) -> int:
    """Run a study as the options say, or print what would be run; returns the exit code.

    Args:
        arguments: with what ``add_execution`` declares.
        study: the grid.
        cells: its runs, checked.
    """
    from experiments.compare import compare_study
    from experiments.launch import check_methods
    from experiments.presentation import present_study
    from framework.processes import on_main
    from framework.study import check_measured

    check_measured(cells)
    for cell in cells:
        check_methods(cell.config)
    execution, options = read_execution(arguments), _root(arguments)
    if arguments.dry_run:
        return _show_plan(arguments, study, cells, execution)

    def work(console: Console) -> dict[str, Any]:
        table = compare_study(study, console=console, execution=execution, cells=cells, **options)
        on_main(lambda: say_page(console, present_study(table, cells[0].config.tracking)))
        return table

    return distribute(arguments, cells[0].config.trainer, work)


def _answer_at_once(arguments: argparse.Namespace, study: StudyConfig) -> int | None:
    """Show a study of which nothing is left to do; None if anything is, or its settings are wrong.

    Checking settings against the methods imports all of them, which takes longer than everything done here.
    """
    from experiments.finished_study import finished_study
    from framework.errors import ConfigError
    from framework.study import check_measured, study_cells

    execution = read_execution(arguments)
    try:
        cells = study_cells(study)
        check_measured(cells)
    except ConfigError:
        return None  # refused below, with what else is wrong
    table = finished_study(study, cells, execution=execution, **_root(arguments))
    if table is None:
        return None
    from experiments.presentation import current_page, has_page

    if has_page(table) and current_page(table) is None:
        return None
    with clean_stdout(arguments.json):
        say_page(Console(stderr=arguments.json), current_page(table) if has_page(table) else None)
    return show_results(table, arguments.json)


def read_execution(arguments: argparse.Namespace) -> Execution:
    """Return how the runs are carried out.

    Raises:
        ConfigError: a number of workers below 1, or a job setting that is no ``key=value``.
    """
    from experiments.execution import Execution
    from framework.config import parse_overrides

    return Execution(
        workers=arguments.workers,
        executor=arguments.executor,
        job={override.key: override.value for override in parse_overrides(arguments.job)},
        retry_failed=arguments.retry_failed,
        accept_changes=arguments.accept_changes,
    )


def _root(arguments: argparse.Namespace) -> dict[str, Any]:
    from pathlib import Path

    return {"results_root": Path(arguments.results)} if arguments.results else {}


def _show_plan(arguments: argparse.Namespace, study: StudyConfig, cells: list[StudyCell], execution: Execution) -> int:
    from experiments.compare import plan_study
    from experiments.study_estimate import print_plan
    from experiments.study_records import RESULTS_ROOT

    with clean_stdout(arguments.json):
        estimates = plan_study(study, cells, results_root=_root(arguments).get("results_root", RESULTS_ROOT))
    if arguments.json:
        print_json({"name": study.name, "runs": [one._asdict() for one in estimates]})
    else:
        print_plan(estimates, Console(), workers=execution.workers)
    return 0
