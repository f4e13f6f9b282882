"""The simulation of what the statistics promise, in small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.benchmarks.statistics import main


def test_the_figures_are_reached_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--rounds", "20", "--seed", "3", "--output", str(tmp_path / "figures")]) == 0
    figures = {one["name"]: one for one in json.loads((tmp_path / "figures.json").read_text())["figures"]}
    exact = [one["value"] for name, one in figures.items() if name.endswith("from statsmodels or scipy")]
    assert len(exact) == 4
    assert max(exact) <= 1e-12
    assert "| equal methods, all kinds: false winners (%) |" in capsys.readouterr().out
