"""Several runs of a study at once: worker processes on this machine, or jobs that submitit hands to a cluster.

A worker reads what to do from the study's folder and leaves a record there; nothing else is passed on, so it does not
matter whether the command that started it is still alive when it ends. Each run has a lock, so two never do the same.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, Protocol

from experiments.local_processes import PARENT
from experiments.study_estimate import training_keys
from experiments.study_progress import StudyProgress
from experiments.study_records import failed_record, finished_record
from experiments.study_worker import run_named_cell, write_cell, write_failure
from framework.errors import ConfigError
from framework.study import StudyCell

__all__ = ["EXECUTORS", "Job", "LocalJob", "SubmititJob", "run_pool", "starter"]

EXECUTORS = ("local", "submitit-local", "slurm")
"""local: worker processes; the others are submitit's: its local executor, and SLURM."""
POLL = 0.1
GRACE = 20.0
LOGS = "logs"

Start = Callable[[StudyCell], "Job"]


class Job(Protocol):
    """One run that was started somewhere."""

    def done(self) -> bool:
        """Return whether it has ended."""

    def error(self) -> str | None:
        """Return how it ended when it could not leave a record; None when all is well."""

    def stop(self) -> None:
        """End it."""


class LocalJob:
    """A worker process on this machine; it ends when the command that started it does."""

    def __init__(self, cell: StudyCell, folder: Path, *, threads: int, retry_failed: bool) -> None:
        """Start it."""
        logs = folder / LOGS
        logs.mkdir(parents=True, exist_ok=True)
        self._log = logs / f"{cell.name}.log"
        command = [sys.executable, "-m", "experiments.study_worker", str(folder), cell.name, str(threads)]
        environment = {**os.environ, PARENT: str(os.getpid()), "TOKENIZERS_PARALLELISM": "false"}
        with self._log.open("ab") as log:
            # A session of its own: Ctrl-C reaches a worker once, from here.
            self._process = subprocess.Popen(
                [*command, *(["retry"] if retry_failed else [])],
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def done(self) -> bool:
        """Return whether the process has ended."""
        return self._process.poll() is not None

    def error(self) -> str | None:
        """Return the exit code and the last line of the log when it failed."""
        code = self._process.returncode
        if code in (0, None):
            return None
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        said = f"signal {-code}" if code < 0 else f"exit code {code}"
        return f"the worker ended with {said}: {lines[-1][:300] if lines else 'it printed nothing'}"

    def stop(self) -> None:
        """Ask it to leave, and insist after a while."""
        if self.done():
            return
        self._process.terminate()
        try:
            self._process.wait(timeout=GRACE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class SubmititJob:
    """A job of a submitit executor."""

    def __init__(self, cell: StudyCell, folder: Path, executor: Any, *, retry_failed: bool) -> None:
        """Submit it."""
        self._job = executor.submit(run_named_cell, str(folder.absolute()), cell.name, None, retry_failed)

    def done(self) -> bool:
        """Return whether it has ended."""
        return bool(self._job.done())

    def error(self) -> str | None:
        """Return the last line of what the job raised."""
        found = self._job.exception()
        if found is None:
            return None
        lines = str(found).strip().splitlines()
        return f"job {self._job.job_id} ended with: {lines[-1][:300] if lines else type(found).__name__}"

    def stop(self) -> None:
        """Cancel it."""
        if not self.done():
            self._job.cancel()


def starter(
    kind: str, folder: Path, *, workers: int, retry_failed: bool = False, parameters: Mapping[str, Any] | None = None
) -> Start:
    """Return what starts one run.

    Args:
        kind: one of ``EXECUTORS``.
        folder: of the study, on a file system that all machines see.
        workers: runs at once; local ones share the cores.
        retry_failed: run again what failed before.
        parameters: of submitit, such as ``timeout_min``, ``slurm_partition``, ``gpus_per_node``.

    Raises:
        ConfigError: unknown kind, or parameters that submitit does not take.
    """
    if kind not in EXECUTORS:
        raise ConfigError(f"Expected `executor` to be one of {', '.join(EXECUTORS)}, but got {kind!r}.")
    if kind == "local":
        if parameters:
            raise ConfigError(f"Expected `--job` with the executors of submitit only, but got {dict(parameters)!r}.")
        allowed = getattr(os, "sched_getaffinity", None)
        threads = max(1, (len(allowed(0)) if allowed else os.cpu_count() or 1) // workers)
        return lambda cell: LocalJob(cell, folder, threads=threads, retry_failed=retry_failed)
    executor = _submitit(kind, folder, dict(parameters or {}))
    return lambda cell: SubmititJob(cell, folder, executor, retry_failed=retry_failed)


def _submitit(kind: str, folder: Path, parameters: dict[str, Any]) -> Any:
    import submitit

    try:
        executor = submitit.AutoExecutor(folder=folder / "jobs", cluster="local" if kind == "submitit-local" else kind)
        executor.update_parameters(**{"timeout_min": 24 * 60, **parameters})
    except (RuntimeError, NameError, TypeError, ValueError) as error:
        raise ConfigError(
            f"Expected submitit to take executor {kind!r} and {parameters!r}, but got: {error}."
        ) from error
    return executor


def run_pool(
    cells: Sequence[StudyCell],
    folder: Path,
    *,
    start: Start,
    workers: int,
    progress: StudyProgress,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Run cells, ``workers`` at once; every one of them has a record afterwards.

    Args:
        cells: what to run; none of them has a record that counts.
        folder: of the study.
        start: starts one.
        workers: at least 1.
        progress: told about every change.
        check: called often; raises to stop everything.
    """
    for cell in cells:
        write_cell(cell, folder)
    waiting, running = list(cells), dict[str, tuple[StudyCell, Job]]()
    keys, trained = {cell.name: training_keys(cell.config) for cell in cells}, set[str]()
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                cell = waiting.pop(_next_cell(waiting, running, keys, trained))
                running[cell.name] = (cell, start(cell))
                progress.put(cell.name, "running")
            for name, (cell, job) in list(running.items()):
                if job.done():
                    del running[name]
                    ending = _ending(cell, folder, job)
                    trained |= keys[name] if ending == "finished" else frozenset()
                    progress.put(name, ending)
            progress.refresh()
            check()
            if running:
                time.sleep(POLL)
    finally:
        for _, job in running.values():
            job.stop()


def _next_cell(
    waiting: Sequence[StudyCell], running: Collection[str], keys: Mapping[str, Set[str]], trained: Set[str]
) -> int:
    """Return which cell comes next: the first that shares the fewest stages with those that are being trained.

    A cell that shares one would do nothing until the other has trained it.
    """
    held = {key for name in running for key in keys[name]} - trained
    shared = [len(held & keys[cell.name]) for cell in waiting]
    return shared.index(min(shared))


def _ending(cell: StudyCell, folder: Path, job: Job) -> Any:
    if finished_record(folder, cell) is not None:
        return "finished"
    error = job.error()
    if error is not None or failed_record(folder, cell) is None:
        write_failure(cell, folder, error or "the worker ended without a record")
    return "failed"
