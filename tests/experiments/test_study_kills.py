"""A study killed with SIGKILL at random moments ends as an undisturbed one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments.benchmarks.study_kills import KilledStudy, kill_table

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="copies a process")


def run_harness(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "experiments.benchmarks.study_kills",
        "--output",
        str(tmp_path / "kills"),
        *arguments,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return json.loads((tmp_path / "kills.json").read_text())


def test_a_killed_study_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    record = run_harness(tmp_path, "--kills", "2", "--runs", "2")
    assert record["kills"] == 2
    assert [study["different"] for study in record["studies"]] == [[]] * len(record["studies"])


@pytest.mark.slow
def test_thirty_kills_of_a_study_of_twelve_runs_change_nothing(tmp_path: Path) -> None:
    record = run_harness(tmp_path, "--kills", "30", "--runs", "12")
    assert record["kills"] == 30
    assert all(study["identical"] for study in record["studies"])


def test_the_log_counts_what_differs() -> None:
    table = kill_table([KilledStudy(1, ["0.50 s (3 finished)"]), KilledStudy(2, different=["table"])], 1)
    assert "| 1 | 1 | 0.50 s (3 finished) | yes |" in table
    assert "NO (table)" in table
    assert table.endswith("1 kills; 1 of 2 studies ended as the undisturbed one.\n")
