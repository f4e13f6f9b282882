from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from experiments.report.collecting import collect_runs
from experiments.report.entries import find_entries, find_variants, reference_variant
from framework.errors import DataError


def as_record(folder: Path, **changes: object) -> dict:
    results = json.loads((folder / "results.json").read_text())
    record = {"cell": folder.name, "label": results["rows"][-1]["label"], "model": "simulated-model", "task": "triage"}
    return {**record, "share": 0.1, "seed": 0, "status": "finished", "results": results, **changes}


def test_a_folder_of_runs_a_run_and_a_file_are_collected_once(run_folders: list[Path]) -> None:
    root = run_folders[0].parent
    found = collect_runs([root, run_folders[0], run_folders[0] / "results.json"])
    assert sorted(run.name for run in found.runs) == sorted(folder.name for folder in run_folders)
    assert found.name == "9 runs"
    assert collect_runs([root]).name == "tiny"
    run = next(run for run in found.runs if run.name == "asft-p0.1-seed1")
    assert (run.label, run.model, run.task, run.share, run.seed) == ("AsFT", "simulated-model", "triage", 0.1, 1)
    assert run.samples == run.folder / "samples.jsonl"


def test_a_study_folder_gives_runs_failures_and_the_reference(run_folders: list[Path], tmp_path: Path) -> None:
    study = tmp_path / "study"
    (study / "failed").mkdir(parents=True)
    (study / "table.json").write_text(json.dumps({"name": "study", "reference": "AsFT"}))
    (study / "study.json").write_text(json.dumps({"format": 1}))
    for folder in run_folders[:2]:
        record = as_record(folder, outcomes={"attack_success": {"embedded/harmful-000": 1}})
        record["results"]["folder"] = str(folder)
        (study / f"{folder.name}.json").write_text(json.dumps(record))
    broken = {"cell": "broken", "label": "Broken", "status": "failed", "error": "out of memory", "seed": 0}
    (study / "failed" / "broken.json").write_text(json.dumps(broken))
    again = as_record(run_folders[0], status="failed", error="killed")
    (study / "failed" / f"{run_folders[0].name}.json").write_text(json.dumps(again))
    found = collect_runs([study])
    assert (found.name, found.reference) == ("study", "AsFT")
    assert [run.name for run in found.runs] == sorted(folder.name for folder in run_folders[:2])
    assert [(run.name, run.error) for run in found.failed] == [("broken", "out of memory")]
    assert found.runs[0].outcomes == {"attack_success": {"embedded/harmful-000": True}}
    assert all(run.samples is not None for run in found.runs)


def test_replies_of_another_run_in_the_same_place_are_not_taken(run_folders: list[Path], tmp_path: Path) -> None:
    record = as_record(run_folders[0])
    record["results"]["folder"] = str(run_folders[1])
    (tmp_path / "a.json").write_text(json.dumps(record))
    assert collect_runs([tmp_path]).runs[0].samples is None


def test_models_that_runs_share_stand_once_and_seeds_make_one_variant(run_folders: list[Path]) -> None:
    entries = find_entries(collect_runs(run_folders).runs)
    assert [entry.title for entry in entries[:3]] == ["aligned (seed 0)", "aligned (seed 1)", "aligned (seed 2)"]
    assert len(entries) == 12
    assert len({entry.title for entry in entries}) == 12
    variants = find_variants(entries)
    assert [(v.title, len(v.entries)) for v in variants] == [("Plain LoRA", 3), ("AsFT", 3), ("Slow one", 3)]
    base = reference_variant(variants, variants[0].cell)
    assert base is variants[0]
    assert reference_variant(variants, variants[0].cell, label="AsFT") is variants[1]
    assert reference_variant(variants[:1], variants[0].cell) is None


def test_one_label_with_two_settings_is_two_variants(run_folders: list[Path], tmp_path: Path) -> None:
    for number in (1, 2):
        shutil.copytree(run_folders[1], tmp_path / f"run{number}")
    path = tmp_path / "run2" / "results.json"
    results = json.loads(path.read_text())
    results["name"] = "other"
    results["config"]["stages"]["finetune"]["methods"]["asft"]["weight"] = 2.0
    path.write_text(json.dumps(results))
    variants = find_variants(find_entries(collect_runs([tmp_path]).runs))
    assert [variant.title for variant in variants] == ["AsFT [asft.weight 1.0]", "AsFT [asft.weight 2.0]"]


def test_the_same_settings_and_seed_twice_are_two_variants(run_folders: list[Path], tmp_path: Path) -> None:
    for number in (1, 2):
        shutil.copytree(run_folders[1], tmp_path / f"run{number}")
    variants = find_variants(find_entries(collect_runs([tmp_path / "run1", tmp_path / "run2"]).runs))
    assert len(variants) == 2
    assert len({variant.title for variant in variants}) == 2


def test_another_number_of_threads_makes_no_other_variant(run_folders: list[Path], tmp_path: Path) -> None:
    for number in (1, 2):
        folder = Path(shutil.copytree(run_folders[1], tmp_path / f"run{number}"))
        results = json.loads((folder / "results.json").read_text())
        results["config"] |= {"seed": number, "trainer": {"threads": number, "devices": 1}}
        (folder / "results.json").write_text(json.dumps({**results, "name": f"run{number}"}))
    variants = find_variants(find_entries(collect_runs([tmp_path]).runs))
    assert [(variant.title, len(variant.entries)) for variant in variants] == [("AsFT", 2)]
    path = tmp_path / "run2" / "results.json"
    results = json.loads(path.read_text())
    results["config"]["trainer"]["devices"] = 2
    path.write_text(json.dumps(results))
    variants = find_variants(find_entries(collect_runs([tmp_path]).runs))
    assert [variant.title for variant in variants] == ["AsFT [trainer.devices 1]", "AsFT [trainer.devices 2]"]


def test_only_what_the_study_has_now_is_collected(run_folders: list[Path], tmp_path: Path) -> None:
    first, second, third = (folder.name for folder in run_folders[:3])
    for folder in run_folders[:3]:
        (tmp_path / f"{folder.name}.json").write_text(json.dumps(as_record(folder, key="old")))
    (tmp_path / f"{first}.json").write_text(json.dumps(as_record(run_folders[0], key="new")))
    (tmp_path / "failed").mkdir()
    failure = {"cell": second, "label": "x", "status": "failed", "error": "out of memory", "key": "new"}
    (tmp_path / "failed" / f"{second}.json").write_text(json.dumps(failure))
    (tmp_path / "failed" / f"{third}.json").write_text(json.dumps({**failure, "cell": third}))
    note = tmp_path / "study.json"
    note.write_text(json.dumps({"format": 1, "runs": {first: "new", second: "new"}}))
    found = collect_runs([tmp_path])
    assert [run.name for run in found.runs] == [first]
    assert [(run.name, run.error) for run in found.failed] == [(second, "out of memory")]
    note.write_text(json.dumps({"format": 1, "runs": {}}))
    with pytest.raises(DataError, match="to hold runs of the study's present settings, but got 5 of earlier ones"):
        collect_runs([tmp_path])


def test_what_is_not_there_or_damaged_is_refused(run_folders: list[Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least one run to report on, but got none"):
        collect_runs([])
    with pytest.raises(DataError, match="but it is not there"):
        collect_runs([tmp_path / "nowhere"])
    with pytest.raises(DataError, match="has no results yet: run it again"):
        collect_runs([tmp_path])
    run = tmp_path / "run"
    run.mkdir()
    (run / "results.json").write_text("{")
    with pytest.raises(DataError, match=r"results.json` to be JSON, but got: .* Remove it and run the run again"):
        collect_runs([run])
    (run / "results.json").write_text("[]")
    with pytest.raises(DataError, match="to hold an object, but got list"):
        collect_runs([run])
    results = json.loads((run_folders[0] / "results.json").read_text())
    (run / "results.json").write_text(json.dumps({**results, "schema_version": 7}))
    with pytest.raises(DataError, match="schema version 1, but got 7"):
        collect_runs([run])
    (run / "results.json").write_text(json.dumps({**results, "stages": [1]}))
    with pytest.raises(DataError, match=r"Expected `stages` of .* to be a list of objects, but got \[1\]"):
        collect_runs([run])
    failed = {"cell": "a", "status": "failed", "error": "no memory"}
    (tmp_path / "a.json").write_text(json.dumps(failed))
    with pytest.raises(DataError, match="at least one finished run, but got none: no memory"):
        collect_runs([tmp_path / "a.json"])
