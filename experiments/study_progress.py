"""Where a study stands: the state of every run, and how long the rest will take."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Literal

from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from experiments.console import format_seconds

__all__ = ["RunState", "StudyProgress"]

RunState = Literal["waiting", "running", "finished", "failed", "kept"]
STYLES = {"waiting": "dim", "running": "bold", "finished": "green", "failed": "red", "kept": "cyan"}
KEEP_LINES = 20
"""A longer table shows what runs, what failed, and the last that ended."""


class StudyProgress(AbstractContextManager["StudyProgress"]):
    """A live table of the runs on a terminal, one line a change elsewhere."""

    def __init__(
        self,
        names: Sequence[str],
        *,
        workers: int = 1,
        console: Console | None = None,
        is_live: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start with every run waiting.

        Args:
            names: of the runs.
            workers: runs that go on at once.
            console: where to; None shows nothing.
            is_live: draw a table that changes; only where nothing else draws.
            clock: seconds.
        """
        self.states: dict[str, RunState] = dict.fromkeys(names, "waiting")
        self._workers, self._console, self._clock = workers, console, clock
        self._since: dict[str, float] = {}
        self._seconds: dict[str, float] = {}
        self._live = (
            Live(console=console, auto_refresh=False, transient=False)
            if is_live and console is not None and console.is_terminal
            else None
        )

    def __enter__(self) -> StudyProgress:
        """Draw."""
        if self._live is not None:
            self._live.start()
            self.refresh()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the last state on the screen."""
        if self._live is not None:
            self.refresh()
            self._live.stop()

    def put(self, name: str, state: RunState) -> None:
        """Note a run's new state and show it."""
        now = self._clock()
        if state == "running":
            self._since[name] = now
        elif name in self._since:
            self._seconds[name] = now - self._since.pop(name)
        self.states[name] = state
        if self._live is not None:
            self.refresh()
        elif self._console is not None and state != "waiting":
            self._console.print(Text(self.line(name)), soft_wrap=True)

    def line(self, name: str) -> str:
        """Return one run's state with the study's, in one line."""
        number, counts = list(self.states).index(name) + 1, self.counts()
        parts = [f"{counts[state]} {state}" for state in ("finished", "kept", "failed") if counts[state]]
        left = self.seconds_left()
        if left:
            parts.append(f"about {format_seconds(left)} left")
        return f"run {number}/{len(self.states)} {name}: {self.states[name]}" + (
            f" ({', '.join(parts)})" if parts else ""
        )

    def counts(self) -> dict[RunState, int]:
        """Return how many runs are in each state."""
        found: dict[RunState, int] = {"waiting": 0, "running": 0, "finished": 0, "failed": 0, "kept": 0}
        for state in self.states.values():
            found[state] += 1
        return found

    def seconds_left(self) -> float | None:
        """Return how long the rest takes if runs go on as those that ended; None until one has."""
        done = [
            self._seconds[name] for name, state in self.states.items() if state == "finished" and name in self._seconds
        ]
        if not done:
            return None
        mean, now = sum(done) / len(done), self._clock()
        running = sum(max(0.0, mean - (now - since)) for since in self._since.values())
        return (self.counts()["waiting"] * mean + running) / self._workers

    def refresh(self) -> None:
        """Draw the table anew."""
        if self._live is not None:
            self._live.update(self.table(), refresh=True)

    def table(self) -> Table:
        """Return the runs with state and time, and the time left."""
        counts, left = self.counts(), self.seconds_left()
        said = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
        title = f"{said}; about {format_seconds(left)} left" if left else said
        table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
        for column in ("run", "state", "time"):
            table.add_column(column, justify="right" if column == "time" else "left")
        for name in self._shown():
            state = self.states[name]
            seconds = self._clock() - self._since[name] if name in self._since else self._seconds.get(name)
            table.add_row(
                Text(name), Text(state, style=STYLES[state]), "" if seconds is None else format_seconds(seconds)
            )
        return table

    def _shown(self) -> list[str]:
        if len(self.states) <= KEEP_LINES:
            return list(self.states)
        running = [name for name, state in self.states.items() if state == "running"]
        failed = [name for name, state in self.states.items() if state == "failed"][-KEEP_LINES // 4 :]
        rest = [name for name in self.states if name not in (*running, *failed)]
        ended = [name for name in rest if self.states[name] in ("finished", "kept")][-KEEP_LINES // 4 :]
        waiting = [name for name in rest if self.states[name] == "waiting"][: KEEP_LINES // 4]
        return [*failed, *ended, *running, *waiting]
