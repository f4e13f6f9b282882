"""States, time left, and what is shown of a study."""

from __future__ import annotations

import io

from rich.console import Console

from experiments.study_progress import KEEP_LINES, StudyProgress


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_time_left_follows_from_the_runs_that_ended() -> None:
    clock = Clock()
    progress = StudyProgress(["a", "b", "c", "d"], workers=2, clock=clock)
    assert progress.seconds_left() is None
    progress.put("a", "running")
    clock.now = 10.0
    progress.put("a", "finished")
    progress.put("b", "running")
    clock.now = 14.0
    assert progress.seconds_left() == (2 * 10 + 6) / 2
    assert progress.counts() == {"waiting": 2, "running": 1, "finished": 1, "failed": 0, "kept": 0}
    assert progress.line("b") == "run 2/4 b: running (1 finished, about 13 s left)"


def test_changes_are_lines_where_there_is_no_terminal() -> None:
    out = io.StringIO()
    with StudyProgress(["a", "b"], console=Console(file=out), is_live=True) as progress:
        progress.put("a", "running")
        progress.put("a", "failed")
    assert out.getvalue().splitlines() == ["run 1/2 a: running", "run 1/2 a: failed (1 failed)"]


def test_a_terminal_shows_a_table() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80)
    with StudyProgress(["a", "b"], console=console, is_live=True) as progress:
        progress.put("a", "running")
        progress.put("a", "finished")
    assert "1 waiting, 1 finished" in out.getvalue()


def test_a_long_table_keeps_what_matters() -> None:
    names = [f"run{number}" for number in range(100)]
    progress = StudyProgress(names)
    for name in names[:50]:
        progress.states[name] = "finished"
    progress.states["run50"], progress.states["run51"] = "failed", "running"
    shown = progress._shown()
    assert len(shown) <= KEEP_LINES
    assert {"run49", "run50", "run51", "run52"} <= set(shown)
    assert "run0" not in shown
