"""One run of a study: done under a lock of its own, recorded whether it succeeds or not.

``python -m experiments.study_worker FOLDER RUN`` is what worker processes and cluster jobs execute; ``FOLDER`` is the
study's, and ``cells/<RUN>.json`` in it says what to do.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from filelock import FileLock
from rich.console import Console

from experiments.study_records import failed_record, finished_record, outcomes_of, portable_results, record_of
from framework.errors import DataError, SeawallError
from framework.fields import build_instance
from framework.files import read_json, write_json
from framework.processes import is_shared, on_main
from framework.schema import RunConfig
from framework.study import StudyCell

__all__ = ["main", "read_cell", "run_cell", "run_named_cell", "write_cell"]

LOGGER = logging.getLogger("seawall")
Runner = Callable[..., dict[str, Any]]


def run_cell(
    cell: StudyCell,
    folder: Path,
    *,
    runner: Runner,
    console: Console | None = None,
    retry_failed: bool = False,
) -> dict[str, Any]:
    """Return the record of a run: the one there is, or that of running it now.

    A run whose settings changed since is run again, and its old record moves to ``earlier/``.

    Args:
        cell: what to run.
        folder: of the study.
        runner: ``run_recipe``, or what stands in for it.
        console: where progress is drawn.
        retry_failed: run again what failed before under the same settings.

    Raises:
        DataError: a record is damaged.
    """
    with _alone(folder / "cells" / f".{cell.name}.lock"):
        found = on_main(lambda: _known(cell, folder, retry_failed=retry_failed))
        if found is not None:
            return found
        record = _run(cell, folder, runner, console)
        on_main(lambda: _write(cell, folder, record))
    return record


def write_failure(cell: StudyCell, folder: Path, error: str) -> dict[str, Any]:
    """Record that a run failed without being able to say so itself."""
    record = {**record_of(cell), "status": "failed", "error": error}
    _write(cell, folder, record)
    return record


def write_cell(cell: StudyCell, folder: Path) -> None:
    """Write what a worker reads to know what to do; settings are those of the coordinator."""
    write_json(folder / "cells" / f"{cell.name}.json", cell)


def read_cell(folder: Path, name: str) -> StudyCell:
    """Return what ``write_cell`` wrote.

    Raises:
        DataError: there is no such run, or its file is damaged.
    """
    path = folder / "cells" / f"{name}.json"
    try:
        plain = read_json(path)
        values = {item.name: plain[item.name] for item in fields(StudyCell)}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"Expected `{path}` to say what to run, but got: {error}.") from error
    return StudyCell(**{**values, "config": build_instance(RunConfig, values["config"])})


def run_named_cell(folder: str, name: str, threads: int | None = None, retry_failed: bool = False) -> str:
    """Run one cell by its name and return how it ended.

    Args:
        folder: of the study.
        name: of the run.
        threads: of this process; None leaves the setting of the run.
        retry_failed: run again what failed before.
    """
    from experiments.run import run_recipe

    cell = read_cell(Path(folder), name)
    if threads is not None and cell.config.trainer.threads is None:
        cell = replace(cell, config=replace(cell.config, trainer=replace(cell.config.trainer, threads=threads)))
    record = run_cell(cell, Path(folder), runner=run_recipe, console=Console(quiet=True), retry_failed=retry_failed)
    return str(record["status"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one cell; 0 also when the run failed, for then its record says so."""
    from experiments.local_processes import watch_parent
    from framework.interruption import Interrupted, catching_signals

    given = list(sys.argv[1:] if arguments is None else arguments)
    watch_parent()
    threads = int(given[2]) if len(given) > 2 and given[2].isdigit() else None
    try:
        with catching_signals():
            run_named_cell(given[0], given[1], threads, "retry" in given[2:])
    except Interrupted as stop:
        return stop.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold a run's lock on the first process; a second worker waits here, and then finds the record."""

    def acquire() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()

    lock = FileLock(str(path))
    on_main(acquire)
    try:
        yield
    finally:
        lock.release()


def _known(cell: StudyCell, folder: Path, *, retry_failed: bool) -> dict[str, Any] | None:
    found = finished_record(folder, cell)
    return found if found is not None or retry_failed else failed_record(folder, cell)


def _run(cell: StudyCell, folder: Path, runner: Runner, console: Console | None) -> dict[str, Any]:
    base = record_of(cell)
    try:
        results = runner(cell.config, console=console, label=cell.label, waits=True)
        run_folder = Path(cell.config.output) / cell.config.name
        outcomes = on_main(lambda: outcomes_of(results, run_folder))
    except SeawallError as error:
        if not is_shared(error):
            raise
        return {**base, "status": "failed", "error": str(error)}
    except Exception as error:
        if not is_shared(error):
            raise
        LOGGER.error("run %s failed: %s", cell.name, error)
        told = f"{type(error).__name__}: {error}"
        return {**base, "status": "failed", "error": told, "trace": traceback.format_exc()}
    return {
        **base,
        "status": "finished",
        "results": portable_results(results, folder, run_folder),
        "outcomes": outcomes,
    }


def _write(cell: StudyCell, folder: Path, record: dict[str, Any]) -> None:
    """Write a record; a failed run keeps a name of its own, so that it is never taken for a result."""
    failed, kept = folder / "failed" / f"{cell.name}.json", folder / f"{cell.name}.json"
    if record["status"] != "finished":
        write_json(failed, record)
        return
    if kept.is_file():
        earlier = folder / "earlier" / str(read_json(kept).get("key", "unknown")) / kept.name
        earlier.parent.mkdir(parents=True, exist_ok=True)
        kept.replace(earlier)
    write_json(kept, record)
    failed.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
