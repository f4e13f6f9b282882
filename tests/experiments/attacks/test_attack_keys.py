"""What an attack's outcome depends on besides its settings: each thing alone changes the key."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from experiments.attacks.attack_keys import (
    ROOT,
    code_hash,
    model_key,
    request_keys,
    settings_files,
    source_hashes,
)
from framework.examples import Prompt
from tests.experiments.attacks.tiny_targets import write_model

FILES = (
    "experiments/attacks/carrying_out.py",
    "experiments/attacks/prompts/direct.py",
    "experiments/prefill.py",
    "experiments/compliant_replies.py",
    "methods/nest/probe.py",
)


@pytest.mark.parametrize("changed", FILES)
def test_any_module_that_attacks_are_made_of_changes_the_hash(tmp_path, changed):
    hashes = []
    for name in ("before", "after"):
        for file in (*FILES, "experiments/run.py"):
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("x = 2" if name == "after" and file == changed else "x = 1")
        hashes.append(code_hash(tmp_path / name))
    assert hashes[0] != hashes[1]
    (tmp_path / "before/experiments/run.py").write_text("x = 2")
    code_hash.cache_clear()
    assert code_hash(tmp_path / "before") == hashes[0]
    assert all((ROOT / file).is_file() for file in FILES)


def test_files_below_the_data_folder_are_hashed_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("SEAWALL_DATA", str(tmp_path))
    (tmp_path / "own").mkdir()
    (tmp_path / "own/words.json").write_text("{}")
    before = settings_files({"dictionary": "own/words.json"})
    assert len(before) == 1
    (tmp_path / "own/words.json").write_text("{ }")
    assert settings_files({"dictionary": "own/words.json"}) != before


def test_the_source_of_a_translator_is_hashed(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    inner, outer = tmp_path / "made_up_inner.py", tmp_path / "made_up_outer.py"
    inner.write_text("class Mine:\n    pass\n")
    outer.write_text("from made_up_inner import Mine\n")
    settings = {"translator": "made_up_outer:Mine", "languages": ["de"], "address": "host:port"}
    assert source_hashes(settings) == {}
    __import__("made_up_outer")
    try:
        before = source_hashes(settings)
        assert len(before) == 2
        inner.write_text("class Mine:\n    share = 1\n")
        assert source_hashes([settings]) != before
    finally:
        del sys.modules["made_up_inner"], sys.modules["made_up_outer"]


def test_requests_are_known_by_their_images_too(tmp_path):
    image = tmp_path / "image.png"
    image.write_bytes(b"one")
    requests = [Prompt("a", "text", "harmful"), Prompt("b", "text", "harmful", image=image)]
    before = request_keys(requests)
    assert before[0] == ("a", "text")
    image.write_bytes(b"two")
    after = request_keys(requests)
    assert (after[0], after[1][:2]) == (before[0], before[1][:2])
    assert after[1] != before[1]


def test_a_model_is_its_weights_and_its_tokenizer(tmp_path):
    folder: Path = write_model(tmp_path / "model")
    before = model_key(folder)
    assert before is not None
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    after = model_key(folder)
    assert after is not None
    assert after["weights"] == before["weights"]
    assert after["tokenizer"] != before["tokenizer"]
    assert model_key(None) is None
