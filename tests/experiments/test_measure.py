"""Measuring a tiny model: sets, limits, truncation, likelihood files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.measure import TaskChoice, choice_items, evaluation_sets, measure_model
from framework.config import EvaluateConfig
from framework.errors import ConfigError, DataError
from framework.files import ArtifactStore
from framework.models import ModelSpec
from tests.conftest import make_model, make_tokenizer


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def measure(folder: Path, config: EvaluateConfig, store: Path, **options):
    spec = ModelSpec(str(folder), dtype="float32")
    return measure_model(
        spec, "fingerprint", config, task=options.get("task"), system="", artifacts=ArtifactStore(store)
    )


def test_limit_draws_over_the_whole_set():
    config = EvaluateConfig(limit=20, task=False)
    prompts = evaluation_sets(config, None)[0].prompts
    assert len(prompts) == 20
    assert len({prompt.category for prompt in prompts}) > 4


def test_sets_of_a_config_have_their_roles_and_sizes():
    sets = evaluation_sets(EvaluateConfig(task_count=30), TaskChoice("triage"))
    assert [(s.name, s.role, len(s.prompts)) for s in sets] == [
        ("embedded", "safety", 80),
        ("embedded", "over_refusal", 60),
        ("triage", "task", 30),
    ]


def test_nothing_to_measure_is_refused():
    with pytest.raises(ConfigError, match="`evaluate` to name at least one set, but got none"):
        evaluation_sets(EvaluateConfig(safety=[], over_refusal=[], task=False), None)


@pytest.fixture
def long_prompts(tmp_path) -> Path:
    path = tmp_path / "long.jsonl"
    rows = [{"prompt": "short one"}, {"prompt": "long " * 120}]
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_prompt_beyond_the_context_is_refused_with_a_count(tiny_folder, tmp_path, long_prompts):
    config = EvaluateConfig(safety=[str(long_prompts)], over_refusal=[], task=False, benign_nll=False, max_new_tokens=4)
    with pytest.raises(DataError, match=r"to fit the model's context of 512 tokens, but got 1"):
        measure(tiny_folder, config, tmp_path / "store")


def test_prompt_beyond_the_context_is_cut_when_asked_and_counted(tiny_folder, tmp_path, long_prompts):
    config = EvaluateConfig(
        safety=[str(long_prompts)], over_refusal=[], task=False, benign_nll=False, max_new_tokens=4,
        overflow="truncate_left",
    )  # fmt: skip
    found = measure(tiny_folder, config, tmp_path / "store")
    assert found.cost["truncated_prompts"] == 1
    assert found.metrics["attack_success"]["denominator"] == 2


def test_likelihood_of_a_file_of_replies_is_measured(tiny_folder, tmp_path):
    path = tmp_path / "replies.jsonl"
    path.write_text('{"prompt": "hello", "response": "hi there"}\n{"prompt": "bye", "response": "see you"}\n')
    config = EvaluateConfig(
        safety=["embedded"], limit=2, over_refusal=[], task=False, benign_nll=False, max_new_tokens=2, nll=[str(path)]
    )
    found = measure(tiny_folder, config, tmp_path / "store")
    metric = found.metrics[f"nll/{path}"]
    assert metric["count"] == len("hi there") + 1 + len("see you") + 1
    assert metric["low"] < metric["value"] < metric["high"]
    assert found.metrics["refusal_margin"]["denominator"] == 20
    again = measure(tiny_folder, config, tmp_path / "store")
    assert again.is_reused
    assert again.metrics == found.metrics


def test_multiple_choice_folder_in_both_layouts(real_data):
    assert len(choice_items(str(real_data / "mmlu" / "test"))) == 1140
    assert len(choice_items(str(real_data / "bbh" / "navigate.json"))) == 250


def test_folder_without_items_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"to hold \.csv or \.json files"):
        choice_items(str(tmp_path))


def test_every_part_of_a_measurement_has_a_bar(tiny_folder, tmp_path):
    path = tmp_path / "replies.jsonl"
    path.write_text('{"prompt": "hello", "response": "hi there"}\n')
    config = EvaluateConfig(limit=2, over_refusal=[], task=False, benign_nll=False, max_new_tokens=2, nll=[str(path)])
    seen = {}
    measure_model(
        ModelSpec(str(tiny_folder), dtype="float32"),
        "fingerprint",
        config,
        task=None,
        system="",
        artifacts=ArtifactStore(tmp_path / "store"),
        bars=lambda name: lambda done, total: seen.update({name: (done, total)}),
    )
    assert set(seen) == {"", "refusal margin", "NLL of replies.jsonl"}
    assert all(done == total > 0 for done, total in seen.values())
