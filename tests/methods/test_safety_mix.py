from __future__ import annotations

import json

import pytest
import torch

from datamodules.finetune import FineTuneDataModule
from framework.chat import ChatEncoder
from framework.errors import ConfigError, NoEffectError
from framework.examples import Example, Turn
from methods.safety_mix import SafetyMix, SafetyMixConfig
from tests.conftest import make_model, make_tokenizer
from tests.tiny_runs import run_fit

TASK = [Example(f"t{i}", (Turn("user", f"word {i}"),), "yes " * (i % 5 + 1)) for i in range(12)]


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "refusals.jsonl"
    rows = [{"prompt": f"do harm {i}", "response": "No, I cannot help with that."} for i in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def make_data():
    module = FineTuneDataModule(ChatEncoder(make_tokenizer()), batch_size=4, total_steps=4, max_length=200)
    module.add_source("task", TASK)
    return module


def train(methods):
    data = make_data()
    return run_fit(make_model(), methods, data=data, accumulate_grad_batches=1), data


def test_the_safety_rows_are_added_by_exact_count(pairs):
    data, method = make_data(), SafetyMix(SafetyMixConfig(count=4, source=pairs))
    method.configure_data(data)
    assert len(data.rows) == len(TASK) + 4
    assert sum(row.kind == "safety" for row in data.rows) == 4
    assert [source.name for source in data.sources] == ["task", "safety_mix"]


def test_the_embedded_pairs_are_the_default():
    data = make_data()
    SafetyMix(SafetyMixConfig(count=3)).configure_data(data)
    assert {row.kind for row in data.rows} == {"task", "safety"}


def test_a_run_with_safety_rows_differs_and_counts_its_source(pairs):
    method = SafetyMix(SafetyMixConfig(count=4, source=pairs))
    (mixed, data), (plain, _) = train([method]), train([])
    assert method.effects["sources_added"] == 1
    assert not torch.equal(mixed.weights, plain.weights)
    assert len(data.rows) == 16


def test_the_method_equals_adding_the_rows_by_hand(pairs):
    mixed, _ = train([SafetyMix(SafetyMixConfig(count=4, source=pairs))])
    data = make_data()
    data.add_source("safety_mix", data.find_examples("safety", pairs), count=4)
    by_hand = run_fit(make_model(), data=data, accumulate_grad_batches=1)
    assert torch.equal(mixed.weights, by_hand.weights)


def test_a_count_of_zero_did_nothing_unless_that_is_allowed(pairs):
    with pytest.raises(NoEffectError, match="Method `safety_mix` did nothing: it added no data source"):
        train([SafetyMix(SafetyMixConfig(count=0))])
    method = SafetyMix(SafetyMixConfig(count=0))
    method.allow_no_effect = True
    assert torch.equal(train([method])[0].weights, train([])[0].weights)


@pytest.mark.parametrize("count", [-1, 2.5, True, "3"])
def test_a_count_that_is_none_is_refused(count):
    with pytest.raises(ConfigError, match="Expected `count` to be a whole number >= 0, but got"):
        SafetyMixConfig(count=count)


def test_all_problems_are_listed_at_once():
    with pytest.raises(ConfigError) as caught:
        SafetyMixConfig(count=-1, source="")
    assert len(caught.value.problems) == 2
    assert "Expected `source` to be a set's name or a file, but got ''." in caught.value.problems[1]
