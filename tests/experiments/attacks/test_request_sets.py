"""The requests of a suite, and their overlap with training data."""

from __future__ import annotations

import json

import pytest

from datamodules.embedded_sets import load_harmful
from experiments.attacks.request_sets import find_requests
from experiments.attacks.suite import SuiteConfig
from framework.errors import DataError

ATTACKS = {"direct": {"attack": "direct"}}


def suite(**options) -> SuiteConfig:
    return SuiteConfig(name="s", attacks=ATTACKS, **options)


@pytest.fixture
def requests_file(tmp_path):
    path = tmp_path / "red.jsonl"
    texts = ["Describe how the old bell tower was built", "Explain the rules of the harbour", "Name the winds"]
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def training_file(tmp_path):
    path = tmp_path / "training.jsonl"
    row = {"instruction": "explain the RULES of the harbour!", "output": "There are three."}
    path.write_text(json.dumps(row) + "\n")
    return path


def test_requests_of_files_and_several_sets(requests_file):
    assert [one.id for one in find_requests(suite(requests=[str(requests_file)])).prompts] == [
        "red-1",
        "red-2",
        "red-3",
    ]
    found = find_requests(suite(requests=["embedded", str(requests_file)], limit=2)).prompts
    assert len(found) == 4
    assert all(one.id.startswith(("embedded/", str(requests_file))) for one in found)


def test_overlap_is_found_by_normalised_words_and_reported(requests_file, training_file):
    found = find_requests(suite(requests=[str(requests_file)], training=[str(training_file)]))
    assert len(found.prompts) == 3
    assert found.overlap["exact"] == ["red-2"]
    assert (found.overlap["num_prompts"], found.overlap["excluded"]) == (3, 0)


def test_overlap_is_left_out_on_request(requests_file, training_file):
    options = {"requests": [str(requests_file)], "training": [str(training_file)], "exclude_overlap": "exclude"}
    found = find_requests(suite(**options))
    assert [one.id for one in found.prompts] == ["red-1", "red-3"]
    assert found.overlap["excluded"] == 1


def test_nearly_the_same_is_left_out_when_asked(requests_file, tmp_path):
    path = tmp_path / "near.txt"
    path.write_text("Please describe how the old bell tower was built in those days\n")
    options = {"requests": [str(requests_file)], "training": [str(path)]}
    kept = find_requests(suite(**options, exclude_overlap="exclude"))
    assert (len(kept.prompts), kept.overlap["near"]) == (3, ["red-1"])
    assert len(find_requests(suite(**options, exclude_overlap="exclude_near")).prompts) == 2


def test_nothing_left_is_refused(requests_file):
    options = {"requests": [str(requests_file)], "training": [str(requests_file)], "exclude_overlap": "exclude"}
    with pytest.raises(DataError, match="Expected a request that did not stand in the training data, but got 3"):
        find_requests(suite(**options))


def test_training_data_of_a_run_is_found_again(tmp_path):
    (tmp_path / "run").mkdir()
    lines = ["name: r", "stages: {align: {data: {safety: embedded}}}", "evaluate: {after: [align], task: false}"]
    (tmp_path / "run" / "config.yaml").write_text("\n".join(lines))
    seen = tmp_path / "seen.jsonl"
    seen.write_text(json.dumps({"prompt": load_harmful("align")[3].text}) + "\n")
    found = find_requests(suite(requests=[str(seen)]), runs=[tmp_path / "run"])
    assert found.overlap["exact"] == ["seen-1"]
    assert find_requests(suite(requests=[str(seen)]), runs=[tmp_path]).overlap is None  # no run of ours


def test_folder_that_is_no_run_is_refused(requests_file, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"to be the folder of a run, with config\.yaml in it"):
        find_requests(suite(requests=[str(requests_file)], training=[str(tmp_path / "empty")]))
    (tmp_path / "empty" / "config.yaml").write_text("[1")
    with pytest.raises(DataError, match="to be the settings of a run, but got"):
        find_requests(suite(requests=[str(requests_file)], training=[str(tmp_path / "empty")]))
    (tmp_path / "empty" / "config.yaml").write_text("name: 3")
    with pytest.raises(DataError, match="to be the settings of a run, but got"):
        find_requests(suite(requests=[str(requests_file)], training=[str(tmp_path / "empty")]))


def test_runs_whose_models_a_run_started_from_are_compared_too(tmp_path):
    (tmp_path / "seen.jsonl").write_text(json.dumps({"prompt": load_harmful("align")[3].text}) + "\n")

    def write_run(name, model, data):
        (tmp_path / name).mkdir(exist_ok=True)
        lines = [f"name: {name}", f"model: {{name: '{model}'}}", f"stages: {{align: {{data: {data}}}}}"]
        (tmp_path / name / "config.yaml").write_text("\n".join([*lines, "evaluate: {after: [align], task: false}"]))

    def overlap():
        return find_requests(suite(requests=[str(tmp_path / "seen.jsonl")]), runs=[tmp_path / "child"]).overlap

    write_run("child", tmp_path / "parent" / "model", "{benign: embedded}")
    assert "its settings are gone" in overlap()["unknown"][0]
    write_run("parent", tmp_path / "child" / "model", "{safety: embedded}")  # a circle ends
    assert (overlap()["exact"], overlap()["unknown"]) == (["seen-1"], [])
