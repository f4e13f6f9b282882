"""What decides an artefact besides its settings."""

from __future__ import annotations

import json

import pytest

from experiments.fingerprints import (
    content_hashes,
    data_hashes,
    embedded_hash,
    resolved_methods,
    tokenizer_hashes,
    versions,
)
from framework.models import choose_dtype, resolved_dtype
from tests.conftest import make_tokenizer


def test_an_edited_file_changes_the_hashes(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("one")
    before = content_hashes({"source": str(path), "count": 3})
    path.write_text("two")
    after = content_hashes({"source": str(path), "count": 3})
    assert set(before) == set(after) == {str(path)}
    assert before != after


def test_a_folder_counts_with_every_file(tmp_path):
    (tmp_path / "a").write_text("a")
    (tmp_path / "b").write_text("b")
    assert len(content_hashes([str(tmp_path)])) == 2


def test_names_that_are_no_files_count_by_name_alone():
    assert content_hashes({"source": "embedded", "weight": 1.0, "none": None}) == {}


def test_methods_are_spelt_out_with_their_defaults():
    assert resolved_methods({"asft": {}}) == resolved_methods({"asft": {"weight": 1.0}})
    assert resolved_methods({"asft": {}}) != resolved_methods({"asft": {"weight": 2.0}})


def test_versions_and_embedded_sets_are_known():
    assert set(versions()) == {"torch", "transformers", "peft", "pytorch-lightning"}
    assert len(embedded_hash()) == 16


def test_where_rollouts_are_kept_decides_nothing(tmp_path):
    (tmp_path / "rollouts.jsonl").write_text("one")
    assert resolved_methods({"smh": {"store": str(tmp_path)}}) == resolved_methods({"smh": {}})
    assert resolved_methods({"smh": {"store": str(tmp_path), "ratio": 2.0}}) != resolved_methods({"smh": {}})


def test_files_below_the_folder_of_data_sets_count_by_content(tmp_path, monkeypatch):
    monkeypatch.delenv("SEAWALL_DATA", raising=False)
    plain = resolved_methods({"circuit_breakers": {}})
    monkeypatch.setenv("SEAWALL_DATA", str(tmp_path))
    assert resolved_methods({"circuit_breakers": {}}) == plain  # the file is not there: it is refused later
    path = tmp_path / "alpaca-mix" / "alpaca_2.5k_p_0.1.json"
    path.parent.mkdir()
    found = []
    for text in ("one", "two"):
        path.write_text(text)
        found.append(resolved_methods({"circuit_breakers": {}})[0]["files"])
    assert list(found[0]) == list(found[1]) == ["alpaca_mix: alpaca-mix/alpaca_2.5k_p_0.1.json"]
    assert found[0] != found[1]
    (tmp_path / "own.jsonl").write_text("three")
    assert set(data_hashes({"harmful": ["own.jsonl", "embedded"], "weight": 1.0})) == {"own.jsonl: own.jsonl"}


def test_judges_of_a_method_count_by_what_they_are(monkeypatch):
    before = resolved_methods({"smh": {"judges": ["rules"]}})
    monkeypatch.setattr("framework.evaluation.verdict_cache._package_hash", lambda: "other rules")
    assert resolved_methods({"smh": {"judges": ["rules"]}}) != before
    assert "judges" not in resolved_methods({"asft": {}})[0]


def test_tokenizer_and_chat_template_count(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    before = tokenizer_hashes(tmp_path)
    tokenizer.chat_template = "{{ 'other' }}" + tokenizer.chat_template
    tokenizer.save_pretrained(tmp_path)
    after = tokenizer_hashes(tmp_path)
    assert before
    assert before != after
    (tmp_path / "config.json").write_text(json.dumps({"a": 1}))
    assert tokenizer_hashes(tmp_path) == after


@pytest.mark.parametrize("has_hardware", [False, True])
def test_the_automatic_type_is_resolved(monkeypatch, has_hardware):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("framework.models.has_bf16_hardware", lambda: has_hardware)
    assert resolved_dtype("auto") == ("bfloat16" if has_hardware else "float32")
    assert f"torch.{resolved_dtype('auto')}" == str(choose_dtype("auto"))
    assert resolved_dtype("float16") == "float16"
