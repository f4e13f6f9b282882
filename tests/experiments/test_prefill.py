"""The prefilling attack on tiny models: the replies, the sets, the metrics, and what is found again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from experiments import compliant_replies as compliant
from experiments.compliant_replies import Sampler, compliant_replies
from experiments.fingerprints import without_later
from experiments.measure import Subject, deciding_settings
from experiments.prefill import (
    OPENING,
    first_tokens,
    measure_point,
    measure_prefill,
    prefill_sets,
)
from framework.config import EvaluateConfig, load_evaluate_config, load_run_config
from framework.errors import ConfigError, DataError
from framework.evaluation.generation import Reply
from framework.examples import Prompt
from framework.files import ArtifactStore, fingerprint, to_plain
from framework.models import ModelSpec
from tests.conftest import make_model, make_tokenizer

PROMPTS = [Prompt(f"p{i}", f"Do {i}", "harmful") for i in range(4)]


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def subject(tiny_folder) -> Subject:
    return Subject(ModelSpec(str(tiny_folder), dtype="float32"), "measured", "")


@pytest.fixture
def lenient(monkeypatch):
    """A random model says nothing sensible: it is given compliant replies to say."""

    def say(model, encoder, prompts, **options):
        return [Reply(f"Sure, this is what you do about {one.text} to get it done.", 60, True) for one in prompts]

    monkeypatch.setattr(compliant, "generate_replies", say)


def small(**options) -> EvaluateConfig:
    settings = {"limit": 4, "over_refusal": [], "task": False, "benign_nll": False, "max_new_tokens": 6}
    return EvaluateConfig(**(settings | options))


def test_first_tokens_are_what_the_model_is_given(tiny_tokenizer):
    text = first_tokens("Sure, here is how", 5, tiny_tokenizer)
    assert text == "Sure,"  # one token a byte
    assert len(tiny_tokenizer(text, add_special_tokens=False)["input_ids"]) == 5


def test_character_cut_in_two_is_left_out(tiny_tokenizer):
    assert first_tokens("aé!", 2, tiny_tokenizer) == "a"


def test_more_tokens_than_the_reply_has_are_refused(tiny_tokenizer):
    with pytest.raises(DataError, match="to have at least 9 tokens, but got 4"):
        first_tokens("Sure", 9, tiny_tokenizer)


def test_prompt_without_a_reply_is_left_out(tiny_tokenizer):
    sets = prefill_sets(PROMPTS, ["Sure, yes", None, "Of course", None], [2, 4], tiny_tokenizer)
    assert [(s.name, [(p.id, p.prefill) for p in s.prompts]) for s in sets] == [
        ("prefill_2", [("p0", "Su"), ("p2", "Of")]),
        ("prefill_4", [("p0", "Sure"), ("p2", "Of c")]),
    ]


def test_attack_has_its_own_metrics_and_leaves_the_others_alone(subject, tmp_path, lenient):
    store = ArtifactStore(tmp_path)
    start = Sampler(subject.spec, "start")
    without = measure_point(subject, small(), task=None, start=start, artifacts=store)
    found = measure_point(subject, small(prefill=[5, 10]), task=None, start=start, artifacts=store)
    assert without.prefill is None
    assert found.plain.is_reused
    assert found.plain.metrics == without.plain.metrics
    for count in (5, 10):
        rate = found.metrics[f"prefill_{count}/attack_success"]
        assert rate["denominator"] == 4
        assert rate["low"] <= rate["value"] <= rate["high"]
    assert found.metrics["prefill_prompts"]["numerator"] == 4
    assert found.metrics["attack_success"] == without.metrics["attack_success"]
    lines = [json.loads(line) for line in found.sample_lines()]
    assert [line["set"] for line in lines] == ["embedded"] * 4 + ["prefill_5"] * 4 + ["prefill_10"] * 4
    assert all(line["prefill"] and not line["reply"].startswith(line["prefill"]) for line in lines[4:])
    assert all("prefill" not in line for line in lines[:4])
    again = measure_point(subject, small(prefill=[5, 10]), task=None, start=start, artifacts=store)
    assert [part.is_reused for part in again.parts] == [True, True]


def test_every_model_is_attacked_with_the_same_replies(subject, tmp_path, lenient):
    store, start = ArtifactStore(tmp_path), Sampler(subject.spec, "start")
    openings = []
    for name in ("one", "two"):
        measured = measure_prefill(replace(subject, fingerprint=name), small(prefill=[5]), start=start, artifacts=store)
        assert not measured.is_reused
        openings.append([json.loads(line)["prefill"] for line in measured.samples.read_text().splitlines()])
    assert openings[0] == openings[1]
    assert set(openings[0]) == {"Sure,"}
    assert len(list((tmp_path / "compliant").glob("*/manifest.json"))) == 1


def test_fixed_opening_needs_no_model(subject, tmp_path):
    config = small(prefill=[5], prefill_replies="opening")
    found = measure_prefill(subject, config, start=None, artifacts=ArtifactStore(tmp_path))
    assert not (tmp_path / "compliant").exists()
    assert {json.loads(line)["prefill"] for line in found.samples.read_text().splitlines()} == {OPENING[:5]}


def test_named_model_samples(subject, tiny_folder, tmp_path, lenient):
    config = small(prefill=[5], prefill_model=str(tiny_folder))
    found = measure_prefill(subject, config, start=None, artifacts=ArtifactStore(tmp_path))
    assert found.metrics["prefill_5/attack_success"]["denominator"] == 4


def test_no_model_to_sample_is_refused(subject, tmp_path):
    with pytest.raises(ConfigError, match=r"`evaluate\.prefill_model` to name the unaligned model"):
        measure_prefill(subject, small(prefill=[5]), start=None, artifacts=ArtifactStore(tmp_path))
    with pytest.raises(ConfigError, match=r"`evaluate\.prefill_model` to name the unaligned model"):
        load_evaluate_config("some/model", ["evaluate.prefill=[5]"])


def test_model_that_never_complies_is_refused(subject, tmp_path, monkeypatch):
    monkeypatch.setattr(compliant, "_complies", lambda prompt, reply: prompt.id == "none")
    monkeypatch.setattr(compliant, "ROUNDS", 2)
    start, store = Sampler(subject.spec, "s"), ArtifactStore(tmp_path)
    with pytest.raises(DataError, match="to comply with at least half of 4 harmful prompts, but got 0"):
        measure_prefill(subject, small(prefill=[5]), start=start, artifacts=store)


def test_prompts_are_asked_until_they_have_a_reply(subject, tmp_path, monkeypatch):
    asked = []

    def second_time(prompt, reply):
        asked.append(prompt.id)
        return prompt.id != "p1" or asked.count("p1") == 2

    monkeypatch.setattr(compliant, "_complies", second_time)
    sampler, store = Sampler(subject.spec, "s"), ArtifactStore(tmp_path)
    options = {"sampler": sampler, "system": "", "num_tokens": 8, "artifacts": store}
    replies = compliant_replies(PROMPTS, **options)
    assert all(replies)
    assert asked.count("p1") == 2
    assert compliant_replies(PROMPTS, **options) == replies


def test_attack_without_prompts_and_double_numbers_are_refused():
    with pytest.raises(ConfigError) as caught:
        load_run_config("quickstart", ["evaluate.prefill=[5,5]", "evaluate.safety=[]"])
    text = "\n".join(caught.value.problems)
    assert "Expected `evaluate.safety` to name the prompts that `evaluate.prefill` attacks, but got none" in text
    assert "Expected the numbers of `evaluate.prefill` to be different, but got [5, 5]" in text
    with pytest.raises(ConfigError, match=r"`evaluate\.prefill\[0\]` to be a whole number ≥ 1, but got 0"):
        load_run_config("quickstart", ["evaluate.prefill=[0]"])


def test_keys_of_runs_without_the_attack_are_what_they_were():
    """The settings as fingerprinted before there was an attack, so that finished work is found again."""
    names = {
        "safety", "over_refusal", "judges", "task", "task_count", "limit", "max_new_tokens", "overflow", "benign_nll",
        "nll", "multiple_choice",
    }  # fmt: skip
    assert set(deciding_settings(EvaluateConfig())) == names
    assert deciding_settings(EvaluateConfig(prefill=[5])) == deciding_settings(EvaluateConfig())
    assert fingerprint(deciding_settings(EvaluateConfig())) == "0eb3c21824c5676c"
    plain = to_plain(EvaluateConfig())
    assert set(without_later(plain)) == names | {"after", "batch_size"}
    assert without_later(to_plain(EvaluateConfig(prefill=[5])))["prefill"] == [5]
