from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from experiments import presentation
from experiments.benchmarks.simulated_runs import SimulatedVariant, simulate_study
from experiments.page_marker import page_marker
from experiments.presentation import present_run, present_study
from framework.files import read_json
from framework.schema import TrackingConfig

OFF = TrackingConfig(wandb="off")
MARKED = f'<meta name="seawall-page" content="{page_marker("redacted")}">'


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return simulate_study(tmp_path / "tiny", (SimulatedVariant("Plain LoRA", 0.7, 0.1, 0.92, 8.0),), seeds=(0,))[0]


def test_a_run_gets_a_page_once(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = {**read_json(run_folder / "results.json"), "folder": str(run_folder)}
    page = present_run(results)
    assert page == run_folder / "report.html"
    assert "Plain LoRA" in page.read_text(encoding="utf-8")
    calls: list[Any] = []
    monkeypatch.setattr("experiments.report.write_report", lambda *args, **options: calls.append(args))
    assert present_run(results) == page
    assert calls == []
    os.utime(page, (0, 0))
    present_run(results)
    assert calls == [([run_folder],)]


@pytest.mark.parametrize(
    ("head", "is_kept"),
    [
        ("", False),  # of a version that wrote the replies to harmful requests into every page
        ('<meta name="seawall-page" content="2 with-replies">', False),
        ('<meta name="seawall-page" content="1 redacted">', False),
        ('<meta name="seawall-page" content="2 redacted">', True),
        ('<meta name="seawall-page" content="2 without-replies">', True),
    ],
)
def test_only_a_page_that_says_it_is_redacted_is_current(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, head: str, is_kept: bool
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr("experiments.report.write_report", lambda *args, **options: drawn.append(args))
    (run_folder / "report.html").write_text(f"<!DOCTYPE html>\n<head>\n{head}\n</head>", encoding="utf-8")
    present_run({**read_json(run_folder / "results.json"), "folder": str(run_folder)})
    assert drawn == ([] if is_kept else [([run_folder],)])


def test_a_run_that_measured_nothing_has_no_page(run_folder: Path) -> None:
    assert present_run({"folder": str(run_folder), "rows": []}) is None


def study_table(folder: Path, **changes: Any) -> dict[str, Any]:
    (folder / "a.json").write_text("{}")
    runs = [{"cell": "a", "status": "finished", "results": "a.json"}]
    return {"name": "tiny", "folder": str(folder), "runs": runs, "comparison": [{}], **changes}


def test_a_study_is_drawn_and_tracked_when_a_record_is_newer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def write(paths: list[Path], *, title: str) -> None:
        seen.append(title)
        (tmp_path / "report.html").write_text(MARKED)

    monkeypatch.setattr("experiments.report.write_report", write)
    monkeypatch.setattr(presentation, "read_study", lambda folder: [{"cell": "a"}, {"cell": "removed"}])
    monkeypatch.setattr(presentation, "study_runs", lambda records, folder: [record["cell"] for record in records])
    monkeypatch.setattr(
        "experiments.study_tracking.track_study",
        lambda name, comparison, runs, **options: seen.append(f"{name}: {runs}"),
    )
    table = study_table(tmp_path)
    assert present_study(table, OFF) == tmp_path / "report.html"
    assert seen == ["tiny", "tiny: ['a']"]
    assert present_study(table, OFF) == tmp_path / "report.html"
    assert len(seen) == 2
    os.utime(tmp_path / "report.html", (0, 0))
    present_study(table, OFF)
    assert len(seen) == 4


@pytest.mark.parametrize("source", ["study.json", "failed/b.json"])
def test_a_study_is_drawn_again_when_its_note_or_a_failure_is_newer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    drawn: list[str] = []
    monkeypatch.setattr("experiments.report.write_report", lambda paths, *, title: drawn.append(title))
    monkeypatch.setattr(presentation, "read_study", lambda folder: [])
    monkeypatch.setattr("experiments.study_tracking.track_study", lambda *args, **options: None)
    table = study_table(tmp_path)
    (tmp_path / "report.html").write_text(MARKED)
    (tmp_path / source).parent.mkdir(exist_ok=True)
    (tmp_path / source).write_text("{}")
    os.utime(tmp_path / source, (0, 0))
    present_study(table, OFF)
    assert drawn == []
    os.utime(tmp_path / source, (2**32, 2**32))
    present_study(table, OFF)
    assert drawn == ["tiny"]


@pytest.mark.parametrize("changes", [{"runs": [{"status": "failed", "results": "failed/a.json"}]}, {"comparison": []}])
def test_a_study_without_a_finished_run_has_no_page(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert present_study(study_table(tmp_path, **changes), OFF) is None
