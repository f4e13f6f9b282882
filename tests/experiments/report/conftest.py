from __future__ import annotations

from pathlib import Path

import pytest

from experiments.benchmarks.simulated_runs import SimulatedVariant, simulate_study
from experiments.report import ReportFiles, write_report

PLAIN = SimulatedVariant("Plain LoRA", 0.7, 0.1, 0.92, 8.0)
ASFT = SimulatedVariant("AsFT", 0.12, 0.15, 0.85, 7.0, {"asft": {"weight": 1.0}})
WORSE = SimulatedVariant("Slow one", 0.98, 0.2, 0.8, 20.0, {"slow": {"weight": 0.1}}, degenerate=0.2, has_effect=False)
PICTURE = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 10 10"><script>alert(1)</script></svg>'


@pytest.fixture(scope="session")
def run_folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Nine simulated runs: three variants, three seeds."""
    folder = tmp_path_factory.mktemp("study") / "tiny"
    folders = simulate_study(folder, (PLAIN, ASFT, WORSE), seeds=(0, 1, 2))
    (folders[0] / "heat_map.svg").write_text(PICTURE)
    return folders


@pytest.fixture(scope="session")
def report_files(run_folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> ReportFiles:
    page = tmp_path_factory.mktemp("report") / "report.html"
    return write_report([run_folders[0].parent], output=page, show="all")


@pytest.fixture(scope="session")
def redacted_files(run_folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> ReportFiles:
    """What the command writes unless it is told otherwise."""
    return write_report(run_folders[:2], output=tmp_path_factory.mktemp("redacted") / "report.html")
