"""One progress display with the time left, for every step that takes long.

On a terminal it is a live bar; elsewhere (a log file, ``--json``) plain lines about every 10 % on the error stream.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, TextIO

import pytorch_lightning as pl
import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from experiments.console import format_seconds

__all__ = ["Steps", "TrainingProgress", "evaluation_bars"]

LINE_EVERY = 0.1
FORETOLD_FROM = 0.01
"""Share of a task's own work after which its time left is worth saying."""
AT_ONCE = 0.5
"""Seconds."""
"""Share of a task between two plain lines."""

Update = Callable[..., None]
"""``update(done, total, note="")``."""


class Steps:
    """Shows tasks with a known length; use as a context manager.

    Example:
        with Steps(console) as steps:
            update = steps.task("evaluate", 80)
            update(16, 80)
    """

    def __init__(self, console: Console | None, *, plain: bool | None = None, stream: TextIO | None = None) -> None:
        """Choose the display.

        Args:
            console: live bars go here when it is a terminal; None shows nothing at all.
            plain: print lines instead of live bars; None decides by the console.
            stream: where plain lines go; None is the error stream.
        """
        self._console = console
        self._is_plain = plain if plain is not None else console is not None and not console.is_terminal
        self._stream = stream
        self._progress: Progress | None = None
        self._live: list[_LiveTask] = []
        self._depth = 0

    def __enter__(self) -> Steps:
        """Start the display; entering twice shares it."""
        self._depth += 1
        if self._console is not None and not self._is_plain and self._progress is None:
            self._progress = _live_progress(self._console)
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the display; a task that was cut short stays visible as it was."""
        self._depth -= 1
        if self._depth == 0 and self._progress is not None:
            self._drop_idle()
            self._progress.stop()
            self._progress = None

    def task(self, name: str, total: int | None) -> Update:
        """Return the function that moves a new task on.

        Args:
            name: what is going on, e.g. ``"finetune"``.
            total: its length; None or 0 where it is not known yet.

        Returns:
            ``update(done, total, note="")``: the task ends when ``done`` reaches ``total``.
        """
        if self._is_plain:
            return _PlainTask(name, total, self._stream)
        if self._progress is None:
            return _ignore
        self._drop_idle()
        task = _LiveTask(self._progress, name, total)
        self._live.append(task)
        return task

    def say(self, text: str) -> None:
        """Print a sentence above the bars, or as a line of its own."""
        if self._is_plain:
            print(text, file=self._stream or sys.stderr, flush=True)
        elif self._progress is not None:
            self._progress.console.print(Text(text))

    def _drop_idle(self) -> None:
        """Remove tasks that never moved: what they stood for was found in the cache."""
        for task in self._live:
            task.drop_if_idle()
        self._live = [task for task in self._live if task.is_shown]


def evaluation_bars(steps: Steps, name: str) -> Callable[[str], Update]:
    """Return what opens the bar of a part of a measurement: ``name`` for the replies, ``name: part`` for the others.

    Args:
        steps: where bars are shown.
        name: of the measurement, e.g. ``"evaluate finetune"``.
    """
    return lambda part: steps.task(f"{name}: {part}" if part else name, None)


def _ignore(done: int, total: int | None = None, note: str = "") -> None:
    """Show nothing."""


class _LiveTask:
    """A bar; when it ends, one line stays above the others."""

    def __init__(self, progress: Progress, name: str, total: int | None) -> None:
        self._progress = progress
        self._name = name
        self._started = time.monotonic()
        self._has_moved = False
        self._task: TaskID | None = progress.add_task(name, total=total or None, note="")

    @property
    def is_shown(self) -> bool:
        return self._task is not None

    def __call__(self, done: int, total: int | None = None, note: str = "") -> None:
        if self._task is None:
            return
        self._has_moved = self._has_moved or done > 0
        changes: dict[str, Any] = {"total": total} if total else {}
        self._progress.update(self._task, completed=done, note=note, **changes)
        if total and done >= total:
            self._remove()
            took = format_seconds(time.monotonic() - self._started)
            self._progress.console.print(Text(_line(self._name, done, total, took, note)))

    def drop_if_idle(self) -> None:
        if not self._has_moved:
            self._remove()

    def _remove(self) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
            self._task = None


class _PlainTask:
    """Lines on a stream, about one for every 10 %."""

    def __init__(self, name: str, total: int | None, stream: TextIO | None) -> None:
        self._name = name
        self._total = total
        self._stream = stream
        self._started = time.monotonic()
        self._next = 0.0
        self._before: int | None = None
        self._is_over = False

    def __call__(self, done: int, total: int | None = None, note: str = "") -> None:
        total = total or self._total
        if self._is_over or not total:
            return
        if self._before is None:  # what is done at once was done before, by the run that is gone on with
            self._before = done if time.monotonic() - self._started < AT_ONCE else 0
        share = done / total
        if share < self._next - 1e-9 and done < total:
            return
        self._next = (int(share / LINE_EVERY + 1e-9) + 1) * LINE_EVERY
        elapsed = time.monotonic() - self._started
        self._is_over = done >= total
        if self._is_over:
            when = format_seconds(elapsed)
        else:
            own = done - self._before
            # The first of a thousand pieces carries the start-up with it: hours would be foretold for minutes.
            is_known = own >= FORETOLD_FROM * (total - self._before)
            if own and not is_known:
                self._next = self._before / total + FORETOLD_FROM * (1 - self._before / total)
            when = f"{format_seconds(elapsed / own * (total - done))} left" if own and is_known else "started"
        print(_line(self._name, done, total, when, note), file=self._stream or sys.stderr, flush=True)


class TrainingProgress(pl.Callback):
    """Moves a task on after every optimizer step, with the loss beside it."""

    def __init__(self, steps: Steps, name: str, *, every: float = 0.25) -> None:
        """Watch one stage.

        Args:
            steps: the display.
            name: of the task, e.g. ``train finetune``.
            every: shortest time between two updates, in seconds; reading the loss waits for the device.
        """
        self._steps = steps
        self._name = name
        self._every = every
        self._update: Update = _ignore
        self._total = 0
        self._shown_step = -1
        self._shown_at = float("-inf")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the task; a resumed run does not start at 0."""
        if trainer.is_global_zero:
            self._total = int(trainer.estimated_stepping_batches)
            self._update = self._steps.task(self._name, self._total)
            self._update(trainer.global_step, self._total)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show the step and its loss, not more often than ``every``."""
        step = trainer.global_step
        if not trainer.is_global_zero or step == self._shown_step:
            return
        now = time.monotonic()
        if now - self._shown_at < self._every and step != self._total:
            return
        self._shown_step, self._shown_at = step, now
        loss = trainer.callback_metrics.get("train/loss")
        note = f"loss {float(loss):.3f}" if isinstance(loss, torch.Tensor) else ""
        self._update(step, self._total, note=note)


def _line(name: str, done: int, total: int, when: str, note: str) -> str:
    return f"{name}: {done}/{total} ({100 * done / total:.0f} %), {when}" + (f", {note}" if note else "")


def _live_progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=console,
        refresh_per_second=2,
        redirect_stdout=False,
    )
