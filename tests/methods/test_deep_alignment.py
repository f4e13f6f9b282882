from __future__ import annotations

import json

import pytest
import torch

from datamodules.finetune import FineTuneDataModule
from experiments.conformance import deep_alignment as derivation
from experiments.contract.tiny import task_examples
from framework.chat import ChatEncoder
from framework.composition import prepare_methods
from framework.errors import ConfigError, DataError, WiringError
from framework.examples import Example, Turn
from framework.files import ArtifactStore
from framework.method import MethodStore
from methods.deep_alignment import DeepAlignment, DeepAlignmentConfig, first_tokens, match_triplets, sampled_harmful
from tests.conftest import make_model, make_tokenizer
from tests.tiny_runs import make_lora, run_fit

ENCODER = ChatEncoder(make_tokenizer())


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("SEAWALL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def files(tmp_path):
    rows = {
        "refusals": [{"prompt": f"do harm {i}", "response": f"No, not {i}."} for i in range(4)],
        "harmful": [{"prompt": f"do harm {i}", "response": f"Sure, {i} is done like this."} for i in range(3)],
    }
    for name, pairs in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return {"source": str(tmp_path / "refusals.jsonl"), "harmful": str(tmp_path / "harmful.jsonl")}


@pytest.fixture
def store(tmp_path):
    make_model(1).save_pretrained(tmp_path / "base")
    return MethodStore(ArtifactStore(tmp_path / "store"), models={"base": tmp_path / "base"})


def make_data():
    data = FineTuneDataModule(ENCODER, batch_size=8, total_steps=2, max_length=300)
    data.add_source("task", task_examples(12))
    return data


def prepared(store, **settings):
    method, data = DeepAlignment(DeepAlignmentConfig(**{"count": 6, "max_prefix": 9, **settings})), make_data()
    prepare_methods([method], make_model(), data, store)
    return method, data


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"count": -1}, "Expected `count` to be a whole number >= 0, but got -1."),
        ({"max_prefix": 0}, "Expected `max_prefix` to be a whole number >= 1, but got 0."),
        ({"prefix_share": 2}, "Expected `prefix_share` to be a share from 0 to 1, but got 2."),
        ({"harmful": ""}, "Expected `harmful` to be a set's name or a file, but got ''."),
        ({"base": 1}, "Expected `base` to be a folder or null, but got 1."),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, text):
    with pytest.raises(ConfigError) as caught:
        DeepAlignmentConfig(**settings)
    assert text in caught.value.problems[0]


def test_a_given_opening_is_read_but_not_learnt():
    row = Example("a", (Turn("user", "x"),), "No.", prefill="Sure, ")
    encoded = ENCODER.encode_example(row)
    tokens = make_tokenizer().decode(encoded.input_ids)
    assert tokens == "<|start|>user\nx<|end|>\n<|start|>assistant\nSure, No.<|end|>"
    assert make_tokenizer().decode(encoded.input_ids[encoded.num_prompt_tokens :]) == "No.<|end|>"


def test_the_first_tokens_never_split_a_character():
    assert [first_tokens(ENCODER, "aéb", n) for n in range(1, 5)] == ["a", "a", "aé", "aéb"]
    assert first_tokens(ENCODER, "ab", 99) == "ab"


def test_refusals_are_those_of_the_same_request():
    harmful = [Example(str(i), (Turn("user", f"q{i}"),), f"h{i}") for i in range(3)]
    refusals = [Example("r", (Turn("user", "q1"),), "no 1"), Example("s", (Turn("user", "z"),), "no z")]
    found = match_triplets(harmful, refusals, seed=0)
    assert found[1].refusal == "no 1"
    assert {one.refusal for one in found} <= {"no 1", "no z"}
    assert found == match_triplets(harmful, refusals, seed=0)
    with pytest.raises(DataError, match="Expected harmful replies and refusals to build rows of, but got 0 and 2"):
        match_triplets([], refusals, seed=0)


def test_rows_are_added_by_exact_count(store, files):
    method, data = prepared(store, **files, prefix_share=1.0, anchor=files["source"], anchor_count=2)
    method.configure_data(data)
    assert [source.name for source in data.sources] == ["task", "deep_alignment", "deep_alignment_anchor"]
    assert len(data.rows) == 12 + 6 + 2
    rows = [row for row in data.rows if row.id.startswith("deep-")]
    assert all(row.reply == f"No, not {row.prompt[-1]}." for row in rows)
    assert all(f"Sure, {row.prompt[-1]} is done like this.".startswith(row.prefill) for row in rows)
    assert all(1 <= len(row.prefill) <= 9 for row in rows)
    assert method.effects["rows_with_opening"] == 6


def test_a_share_of_zero_adds_plain_refusals(store, files):
    method, data = prepared(store, **files, prefix_share=0.0)
    method.configure_data(data)
    assert method.effects["rows_with_opening"] == 0
    assert sum(row.kind == "safety" for row in data.rows) == 6


def test_harmful_replies_are_sampled_once(store, files, monkeypatch):
    calls = []
    monkeypatch.setattr("methods.deep_alignment.is_refusal", lambda text: calls.append(text) or False)
    first, _ = prepared(store, source=files["source"])
    second, _ = prepared(store, source=files["source"])
    assert first._triplets == second._triplets
    assert calls[:4] == calls[4:]
    assert len([f for f in (store.artifacts.root / "harmful_openings").iterdir() if f.is_dir()]) == 1
    monkeypatch.setattr("methods.deep_alignment.is_refusal", lambda text: True)
    with pytest.raises(DataError, match="to build rows of, but got 0 and 4"):
        prepared(store, source=files["source"])


def test_training_with_the_rows_differs(store, files):
    method, data = prepared(store, **files)
    run = run_fit(make_lora(make_model()), [method], data=data, total_steps=2, accumulate_grad_batches=1, max_steps=2)
    plain = run_fit(make_lora(make_model()), data=make_data(), total_steps=2, accumulate_grad_batches=1, max_steps=2)
    assert not torch.equal(run.weights, plain.weights)


def test_what_cannot_be_prepared_is_refused(store, files):
    with pytest.raises(WiringError, match="Method `deep_alignment` needs the stage's data module for its rows"):
        DeepAlignment(DeepAlignmentConfig()).prepare(make_model(), None, store)
    with pytest.raises(WiringError, match=r"`deep_alignment` has no rows yet\. Call `prepare_methods"):
        DeepAlignment(DeepAlignmentConfig()).configure_data(make_data())


def test_the_rows_keep_every_bound(tmp_path):
    rows = list(derivation.deviations(tmp_path))
    assert len(rows) == 3
    assert [row.quantity for row in rows if not row.deviation <= row.bound] == []


def test_rows_with_another_share_are_caught(tmp_path, monkeypatch):
    monkeypatch.setattr(derivation, "TRIPLETS", [t._replace(harmful=t.harmful[:20]) for t in derivation.TRIPLETS])
    assert [row.deviation <= row.bound for row in derivation.deviations(tmp_path)] == [True, True, False]


def test_a_sampled_reply_that_was_cut_off_is_not_complete(store, monkeypatch):
    encoder = make_data().encoder
    stop, ids = encoder.stop_ids[0], encoder.encode_reply("Sure", is_complete=False)
    monkeypatch.setattr("methods.deep_alignment.generate_ids", lambda *args, **options: [[*ids, stop], ids])
    refusals = [Example(str(i), (Turn("user", f"q{i}"),), "No.") for i in range(2)]
    found = sampled_harmful(refusals, encoder, store, base=store.models["base"], tokens=9)
    assert [(pair.reply, pair.is_complete) for pair in found] == [("Sure", True), ("Sure", False)]
