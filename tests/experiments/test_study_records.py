"""What a study keeps, and what it refuses: changed settings, a second command, damaged or foreign records."""

from __future__ import annotations

import dataclasses
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments import compare
from experiments.compare import Execution, compare_study, plan_study
from experiments.fingerprints import FILLED_BY_RUNS, embedded_hash, versions, without_later
from experiments.run_folder import only_process
from experiments.study_records import (
    STATE_FILE,
    claim_study,
    finished_record,
    portable_results,
    read_study,
    run_key,
    study_runs,
)
from experiments.study_worker import read_cell, run_cell, write_cell
from framework.config import RunConfig
from framework.errors import ConfigError, DataError, TrainingError
from framework.files import fingerprint, read_json, to_plain, write_json
from framework.registry import known_methods
from framework.study import StudyCell, StudyConfig, load_study_config, study_cells
from tests.conftest import make_model, make_tokenizer
from tests.experiments.measured import results, run_folder

STUDY = """
name: small
base: {base}
grid:
  methods:
    LoRA: {{}}
    AsFT: {{asft: {{weight: 10.0}}}}
  seeds: [0, 1, 2]
"""


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StudyConfig:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "small.yaml"
    path.write_text(STUDY.format(base="quickstart"), encoding="utf-8")
    return load_study_config(path)


def measure(config: RunConfig, *, label: str, **options: Any) -> dict[str, Any]:
    """Stands in for training: AsFT is safe, LoRA is not."""
    folder = Path(config.output) / config.name
    unsafe = [int(label == "LoRA" and number % 3 != config.seed) for number in range(60)]
    run_folder(folder, unsafe, [1] * 20, seed=config.seed, label=label)
    return results(unsafe, [1] * 20, seed=config.seed, label=label)


@pytest.fixture
def kept(study: StudyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the finished study."""
    monkeypatch.setattr(compare, "run_recipe", measure)
    compare_study(study, results_root=tmp_path / "kept")
    return tmp_path / "kept" / "small"


def never(*args: Any, **options: Any) -> Any:
    raise AssertionError("a finished run was repeated")


def test_a_finished_study_is_found_again_with_its_statistics(
    study: StudyConfig, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "run_recipe", never)
    table = compare_study(study, results_root=kept.parent)
    (group,) = table["comparison"]
    winner = [m["label"] for m in group["methods"] if m["metrics"]["attack_success"]["is_winner"]]
    assert winner == ["AsFT"]
    assert [run["status"] for run in table["runs"]] == ["finished"] * 6
    assert "| winner |" in (kept / "table.md").read_text(encoding="utf-8")


def test_tables_and_records_hold_no_absolute_path(kept: Path) -> None:
    assert read_json(kept / "table.json")["folder"] == "."
    for path in [*kept.glob("*.json"), kept / "table.md"]:
        assert str(kept.parents[1]) not in path.read_text(encoding="utf-8")
        assert "/somewhere/else" not in path.read_text(encoding="utf-8")
    record = read_study(kept)[0]
    assert (kept / record["results"]["folder"] / "samples.jsonl").is_file()


def test_records_give_the_runs_back_with_their_replies(kept: Path) -> None:
    runs = study_runs(read_study(kept), folder=kept, with_samples=True)
    assert {(run.label, run.seed) for run in runs} == {(label, seed) for label in ("LoRA", "AsFT") for seed in range(3)}
    assert len(runs[0].samples) == 80
    assert sum(next(run for run in runs if run.label == "LoRA").outcomes["attack_success"].values()) == 40


def test_a_study_that_changed_is_refused_and_the_differences_are_shown(
    study: StudyConfig, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = load_study_config("small.yaml", ["grid.seeds=[0,1]", "stages.finetune.max_steps=9"])
    with pytest.raises(ConfigError) as caught:
        compare_study(changed, results_root=kept.parent)
    assert "grid.seeds: [0, 1, 2] -> [0, 1]" in str(caught.value)
    assert "base.stages.finetune.max_steps: " in str(caught.value)
    assert "--accept-changes" in str(caught.value)
    table = compare_study(changed, results_root=kept.parent, execution=Execution(accept_changes=True))
    assert len(table["runs"]) == 4
    assert len(list(kept.glob("earlier/*/*.json"))) == 4
    again = load_study_config("small.yaml", ["grid.seeds=[0,1]", "stages.finetune.max_steps=9", "tracking.wandb=off"])
    monkeypatch.setattr(compare, "run_recipe", never)
    assert len(compare_study(again, results_root=kept.parent)["runs"]) == 4


def hold(folder: str, ready: Any, done: Any) -> None:
    with only_process(Path(folder), "study"):
        ready.set()
        done.wait(60)


def test_a_second_command_on_a_study_is_refused(study: StudyConfig, kept: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=hold, args=(str(kept), ready, done))
    other.start()
    try:
        assert ready.wait(60)
        with pytest.raises(ConfigError, match=f"but got a second one beside process {other.pid} on"):
            compare_study(study, results_root=kept.parent)
    finally:
        done.set()
        other.join()
    assert len(compare_study(study, results_root=kept.parent)["runs"]) == 6


def test_a_run_of_a_study_waits_for_another_command_on_its_folder(study: StudyConfig, tmp_path: Path) -> None:
    given: list[Any] = []

    def note(config: RunConfig, **options: Any) -> dict[str, Any]:
        given.append(options["waits"])
        return measure(config, **options)

    assert run_cell(study_cells(study)[0], tmp_path, runner=note)["status"] == "finished"
    assert given == [True]


def with_config(cell: StudyCell, **changes: Any) -> StudyCell:
    return dataclasses.replace(cell, config=dataclasses.replace(cell.config, **changes))


def with_methods(cell: StudyCell, methods: dict[str, Any]) -> StudyCell:
    finetune = dataclasses.replace(cell.config.stages.finetune, methods=methods)
    return with_config(cell, stages=dataclasses.replace(cell.config.stages, finetune=finetune))


def test_without_files_of_ones_own_a_run_has_the_key_it_always_had(
    study: StudyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SEAWALL_DATA", raising=False)
    for cell in study_cells(study):
        config = to_plain(cell.config)
        kept = {k: v for k, v in config.items() if k not in ("output", "tracking", "name", "trainer")}
        kept["evaluate"] = without_later(kept["evaluate"])
        trainer = {k: v for k, v in config["trainer"].items() if k not in ("threads", "guard")}
        decided = {"files": {}, "embedded": embedded_hash(), "versions": versions()}
        assert run_key(cell) == fingerprint({"format": 2, "config": kept, "trainer": trainer, **decided})


def test_a_file_that_a_method_names_and_one_below_the_data_sets_decide(
    study: StudyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEAWALL_DATA", str(tmp_path / "data"))
    own, named = tmp_path / "own.jsonl", tmp_path / "data" / "mine" / "rows.jsonl"
    named.parent.mkdir(parents=True)
    cell = study_cells(study)[1]
    chosen = [with_methods(cell, {"smh": {"harmful": name}}) for name in (str(own), "mine/rows.jsonl")]
    for changed, path in zip(chosen, (own, named), strict=True):
        keys = []
        for text in ("one", "two"):
            path.write_text(text, encoding="utf-8")
            keys.append(run_key(changed))
        assert keys[0] != keys[1]


def test_what_a_run_writes_itself_does_not_decide(study: StudyConfig, tmp_path: Path) -> None:
    undecisive = {
        (name, field)
        for name, entry in known_methods().items()
        for field in getattr(entry.config_class, "UNDECISIVE", ())
    }
    assert undecisive == FILLED_BY_RUNS
    cell = with_methods(study_cells(study)[1], {"smh": {"store": str(tmp_path / "store")}})
    before = run_key(cell)
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "rollouts.jsonl").write_text("one", encoding="utf-8")
    assert run_key(cell) == before


def test_a_model_in_a_folder_or_a_file_decides_by_its_content(
    study: StudyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEAWALL_CACHE", str(tmp_path / "cache"))
    folder, file, cell = tmp_path / "tiny", tmp_path / "tiny.gguf", study_cells(study)[0]
    of_folder, of_file = [
        with_config(cell, model=dataclasses.replace(cell.config.model, name=str(name))) for name in (folder, file)
    ]
    file.write_bytes(b"one")
    keys = [run_key(of_folder), run_key(of_file)]
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    file.write_bytes(b"other")
    keys += [run_key(of_folder), run_key(of_file)]
    make_model(seed=1).save_pretrained(folder)
    keys.append(run_key(of_folder))
    (folder / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    keys.append(run_key(of_folder))
    (folder / "model.safetensors").unlink()
    keys.append(run_key(of_folder))
    assert len(set(keys)) == len(keys)
    assert run_key(of_folder) == keys[-1]


def damage(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    record = read_json(path)
    change(record)
    write_json(path, record)


def test_damaged_and_foreign_records_are_listed_at_once(study: StudyConfig, kept: Path) -> None:
    names = sorted(path.name for path in kept.glob("*seed*.json"))
    (kept / names[0]).write_text("{", encoding="utf-8")
    damage(kept / names[1], lambda record: record["results"].update(schema_version=7))
    damage(kept / names[2], lambda record: record.pop("results"))
    damage(kept / names[3], lambda record: record["results"]["rows"][0].pop("metrics"))
    for read in (lambda: compare_study(study, results_root=kept.parent), lambda: read_study(kept)):
        with pytest.raises(DataError) as caught:
            read()
        lines = str(caught.value).splitlines()
        assert len(lines) == 4
        for text in (
            "to be the record of a run, but got",
            "schema version 1, but got 7",
            "it lacks results",
            "rows with",
        ):
            assert any(text in line for line in lines)


def test_a_damaged_note_of_the_start_is_refused(study: StudyConfig, kept: Path) -> None:
    cells = study_cells(study)
    (kept / STATE_FILE).write_text("[]", encoding="utf-8")
    with pytest.raises(DataError, match="to say what the study was started with, but got"):
        claim_study(study, cells, kept)
    write_json(kept / STATE_FILE, {"format": 9})
    with pytest.raises(DataError, match="to be of format 1, but got 9"):
        claim_study(study, cells, kept)


def test_a_run_whose_folder_was_damaged_by_hand_is_not_taken_for_finished(
    study: StudyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(config: RunConfig, **options: Any) -> dict[str, Any]:
        found = measure(config, **options)
        (Path(config.output) / config.name / "samples.jsonl").write_text('{"id"', encoding="utf-8")
        return found

    monkeypatch.setattr(compare, "run_recipe", cut)
    table = compare_study(study, results_root=tmp_path / "kept")
    assert [run["status"] for run in table["runs"]] == ["failed"] * 6
    assert "to be a sample, but got" in table["runs"][0]["error"]
    assert table["comparison"] == []


def test_an_empty_folder_is_no_study(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="to be the folder of a study with finished runs, but got none there"):
        read_study(tmp_path)


def test_a_worker_reads_what_the_coordinator_wrote(study: StudyConfig, tmp_path: Path) -> None:
    cell = study_cells(study)[1]
    write_cell(cell, tmp_path)
    assert read_cell(tmp_path, cell.name) == cell
    (tmp_path / "cells" / "broken.json").write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match="to say what to run, but got"):
        read_cell(tmp_path, "broken")


def test_a_failure_is_kept_until_a_retry_succeeds(study: StudyConfig, tmp_path: Path) -> None:
    cell = study_cells(study)[0]

    def fail(config: RunConfig, **options: Any) -> dict[str, Any]:
        raise TrainingError("the loss is not a number")

    assert run_cell(cell, tmp_path, runner=fail)["error"] == "the loss is not a number"
    assert run_cell(cell, tmp_path, runner=never)["status"] == "failed"
    other = dataclasses.replace(cell, config=dataclasses.replace(cell.config, learning_rate=0.5))
    assert run_cell(other, tmp_path, runner=measure)["status"] == "finished"
    assert run_cell(cell, tmp_path, runner=measure, retry_failed=True)["status"] == "finished"
    assert finished_record(tmp_path, cell) is not None
    (tmp_path / "failed").mkdir(exist_ok=True)
    (tmp_path / "failed" / f"{cell.name}.json").write_text("{", encoding="utf-8")
    (tmp_path / f"{cell.name}.json").unlink()
    with pytest.raises(DataError, match="to be the record of a failure, but got"):
        run_cell(cell, tmp_path, runner=measure)


def test_models_in_the_cache_keep_their_fingerprint_only(tmp_path: Path) -> None:
    plain = results([1], [1])
    plain["rows"] = [{**plain["rows"][0], "point": "align"}, plain["rows"][0]]
    found = portable_results(plain, tmp_path / "kept" / "s", tmp_path / "runs" / "s" / "a")
    assert found["folder"] == "../../runs/s/a"
    assert [row["model"]["folder"] for row in found["rows"]] == [None, "../../runs/s/a/model"]


def test_the_plan_counts_shared_stages_once(
    study: StudyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "machine_flops", lambda: 1e11)
    cells = study_cells(study)
    found = plan_study(study, cells, results_root=tmp_path / "kept")
    assert [one.name for one in found] == [cell.name for cell in cells]
    assert found[1].seconds is not None
    assert found[0].seconds is not None
    assert found[1].seconds < found[0].seconds  # the same alignment stage
    assert not any(one.is_measured for one in found)


def test_the_plan_goes_by_earlier_runs(study: StudyConfig, kept: Path) -> None:
    cells: list[StudyCell] = study_cells(study)
    first = kept / f"{cells[0].name}.json"

    def timed(record: dict[str, Any]) -> None:
        config = record["results"]["config"]
        config.update(batch_size=4)
        config["model"]["name"] = cells[1].model
        record["results"]["stages"] = [
            {"stage": "finetune", "seconds": 20.0, "steps": 10, "reused": False},
            {"stage": "evaluate finetune", "seconds": 8.0, "reused": False},
        ]

    damage(first, timed)
    (kept / f"{cells[1].name}.json").unlink()
    found = {one.name: one for one in plan_study(study, cells, results_root=kept.parent)}
    assert found[cells[0].name].is_finished
    todo = found[cells[1].name]
    finetune = cells[1].config.training("finetune")
    assert todo.is_measured
    assert todo.memory_mib == 900.0
    assert todo.seconds is not None
    assert todo.seconds >= finetune.max_steps * finetune.batch_size * 0.5


def test_records_and_studies_that_did_not_measure_the_last_model_are_refused(study: StudyConfig, kept: Path) -> None:
    changed = load_study_config("small.yaml", ["evaluate.after=[align]"])
    with pytest.raises(ConfigError, match=r"`LoRA`: Expected `evaluate\.after` to hold `finetune`, .* got \['align'\]"):
        compare_study(changed, results_root=kept.parent)
    record = read_study(kept)[0]
    record["results"]["config"]["stages"]["repair"] = {"methods": {}}
    with pytest.raises(DataError, match="the run's last model, after `repair`, but got them after `finetune`"):
        study_runs([record], folder=kept)


def test_the_note_of_the_start_says_under_which_keys_runs_are_kept_now(study: StudyConfig, kept: Path) -> None:
    cells, note = study_cells(study), kept / STATE_FILE
    now = read_json(note)
    write_json(note, {**now, "runs": dict.fromkeys(now["runs"], "of another version")})
    claim_study(study, cells, kept)
    assert read_json(note) == now
