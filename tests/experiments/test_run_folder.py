from __future__ import annotations

import multiprocessing
import os

import pytest
import yaml
from rich.console import Console

from experiments.run import run_recipe
from experiments.run_folder import config_differences, only_process, take_folder
from framework.config import load_run_config
from framework.errors import DataError, HeldError
from framework.files import read_json, write_json
from tests.conftest import make_model, make_tokenizer


def make(*overrides):
    return load_run_config("quickstart", overrides)


def test_a_new_folder_and_the_same_config_say_nothing(tmp_path):
    said = []
    for _ in range(2):
        take_folder(tmp_path / "run", make(), said.append)
        write_json(tmp_path / "run" / "results.json", {"seed": 0})
    assert said == []
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.yaml", "results.json"]


def test_results_of_another_config_are_moved_and_the_difference_is_said(tmp_path):
    said, folder = [], tmp_path / "run"
    take_folder(folder, make(), said.append)
    write_json(folder / "results.json", {"seed": 0})
    (folder / "model").mkdir()
    (folder / "model" / "x").write_text("weights")
    take_folder(folder, make("seed=1", "warmup_ratio=0.5"), said.append)
    (text,) = said
    assert text.startswith(f"{folder} held the results of another config (")
    assert "seed: 0 -> 1" in text
    assert "warmup_ratio: " in text
    (earlier,) = (folder / "earlier").iterdir()
    assert sorted(path.name for path in earlier.iterdir()) == ["config.yaml", "model", "results.json"]
    assert not (folder / "results.json").exists()
    assert "seed: 1" in (folder / "config.yaml").read_text()
    assert "seed: 0" in (earlier / "config.yaml").read_text()
    # Back and forth: the place of the first config's results is taken again.
    take_folder(folder, make(), said.append)
    (folder / "model").mkdir()
    take_folder(folder, make("seed=1", "warmup_ratio=0.5"), said.append)
    assert len(list((folder / "earlier").iterdir())) == 1


def test_an_unfinished_run_with_another_config_is_said(tmp_path):
    said = []
    take_folder(tmp_path, make(), said.append)
    take_folder(tmp_path, make("stages.align=null"), said.append)
    assert len(said) == 1
    assert "was begun with another config" in said[0]
    assert " more)" in said[0]


@pytest.mark.parametrize("text", ["a: [", "- a list"])
def test_results_beside_a_config_that_cannot_be_read_are_refused(tmp_path, text):
    write_json(tmp_path / "results.json", {"seed": 0})
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(DataError, match=r"Expected `.*config\.yaml` to say what the results beside it are of"):
        take_folder(tmp_path, make(), print)
    assert (tmp_path / "config.yaml").read_text() == text
    assert (tmp_path / "results.json").is_file()


def hold(folder, ready, done):
    with only_process(folder, "run"):
        ready.set()
        done.wait(60)


def test_a_second_command_on_a_run_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("SEAWALL_CACHE", str(tmp_path / "cache"))
    make_model().save_pretrained(tmp_path / "tiny")
    make_tokenizer().save_pretrained(tmp_path / "tiny")
    config = make("name=one", f"output={tmp_path / 'runs'}", f"model={tmp_path / 'tiny'}", "stages.align=null")
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path / "runs" / "one", ready, done))
    other.start()
    try:
        assert ready.wait(60)
        said = f"Expected the run in `.*one` to be worked on by one command, .* beside process {other.pid} on"
        with pytest.raises(HeldError, match=said):
            run_recipe(config, console=Console(quiet=True))
    finally:
        done.set()
        other.join()
    assert not (tmp_path / "runs" / "one" / "config.yaml").exists()


def test_who_waits_gets_the_folder_when_the_other_command_has_ended(tmp_path):
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path, ready, done))
    other.start()
    assert ready.wait(60)
    said = []

    def wait(text):
        said.append(text)
        done.set()

    with only_process(tmp_path, "run", wait=wait):
        assert read_json(tmp_path / "owner.json")["process"] == os.getpid()
    other.join()
    assert len(said) == 1
    assert said[0].startswith(f"waiting for process {other.pid} on ")


def test_results_without_a_config_are_moved(tmp_path):
    said = []
    write_json(tmp_path / "results.json", {"seed": 0})
    take_folder(tmp_path, make(), said.append)
    earlier = tmp_path / "earlier" / "unknown"
    assert said == [f"{tmp_path} held results without the config they are of; they are in {earlier} now"]
    assert (earlier / "results.json").is_file()
    assert not (tmp_path / "results.json").exists()
    assert "seed: 0" in (tmp_path / "config.yaml").read_text()


def test_settings_that_did_not_exist_yet_are_no_difference(tmp_path):
    said = []
    take_folder(tmp_path, make(), said.append)
    write_json(tmp_path / "results.json", {"seed": 0})
    old = yaml.safe_load((tmp_path / "config.yaml").read_text())
    del old["evaluate"]["prefill"], old["stages"]["finetune"]["order"], old["stages"]["finetune"]["data"]["harmful"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(old))
    take_folder(tmp_path, make(), said.append)
    assert said == []
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(old))
    take_folder(tmp_path, make("evaluate.prefill=[5]"), said.append)
    assert "evaluate.prefill: [] -> [5]" in said[0]


def test_a_config_that_cannot_be_read_is_replaced(tmp_path):
    said = []
    (tmp_path / "config.yaml").write_text("a: [")
    take_folder(tmp_path, make(), said.append)
    assert said == []
    assert "seed: 0" in (tmp_path / "config.yaml").read_text()


def test_differences_are_dotted():
    old = {"a": {"b": 1, "c": [1]}, "gone": None}
    assert config_differences(old, {"a": {"b": 2, "c": [1]}, "new": {}}) == [
        "a.b: 1 -> 2",
        "gone: None -> unset",
        "new: unset -> {}",
    ]
