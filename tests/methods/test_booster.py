from __future__ import annotations

import json
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from datamodules.finetune import FineTuneDataModule
from experiments.contract.tiny import task_examples
from framework.chat import ChatEncoder, EncodedExample
from framework.composition import StepContext, prepare_methods
from framework.errors import ConfigError, DataError, WiringError
from framework.examples import Example, Turn
from framework.files import ArtifactStore
from framework.method import MethodStore
from methods.booster import Booster, BoosterConfig, moved, rows_of_step, shortened
from tests.conftest import make_model, make_tokenizer
from tests.tiny_runs import make_lora, relative, run_fit


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "harmful.jsonl"
    rows = [{"prompt": f"do harm {i}", "response": "Sure, go on." + "!" * i} for i in range(5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def store(tmp_path):
    make_model().save_pretrained(tmp_path / "base")
    return MethodStore(ArtifactStore(tmp_path / "store"), models={"base": tmp_path / "base"})


def make_data(micro_batch_size=4):
    data = FineTuneDataModule(
        ChatEncoder(make_tokenizer()), batch_size=4, micro_batch_size=micro_batch_size, total_steps=2, max_length=99
    )
    data.add_source("task", task_examples(8))
    return data


def train(pairs, store, *, micro_batch_size=4, **settings):
    method = Booster(BoosterConfig(**{"harmful": pairs, "batch_size": 3, **settings}))
    data, model = make_data(micro_batch_size), make_lora(make_model())
    prepare_methods([method], model, data, store)
    accumulated = 4 // micro_batch_size
    return run_fit(model, [method], data=data, total_steps=2, accumulate_grad_batches=accumulated), method


def test_harmful_rows_go_round_in_passes_of_their_own():
    steps = [rows_of_step(5, batch_size=3, step=step, seed=1) for step in range(5)]
    rows = [row for step in steps for row in step]
    assert [sorted(rows[i : i + 5]) for i in (0, 5, 10)] == [list(range(5))] * 3
    assert steps[2] == rows_of_step(5, batch_size=3, step=2, seed=1)
    assert steps != [rows_of_step(5, batch_size=3, step=step, seed=2) for step in range(5)]
    assert sorted(rows_of_step(2, batch_size=5, step=0, seed=0))[2] in (0, 1)


def test_parameters_are_moved_for_a_block_and_graphs_outside_do_not_notice():
    weight = nn.Parameter(torch.tensor([2.0, 3.0]))
    outside = (weight * weight).sum()
    data = weight.data
    with moved([weight], [torch.tensor([1.0, 1.0])]):
        assert weight.tolist() == [3.0, 4.0]
    with pytest.raises(ZeroDivisionError), moved([weight], [torch.tensor([1.0, 1.0])]):
        1 / 0  # noqa: B018
    assert weight.data.data_ptr() == data.data_ptr()
    assert torch.autograd.grad(outside, weight)[0].tolist() == [4.0, 6.0]


def test_the_step_is_the_same_however_it_is_cut(pairs, store):
    (whole, method), (cut, _) = train(pairs, store), train(pairs, store, micro_batch_size=1)
    assert relative(cut.gradients[0], whole.gradients[0]) < 1e-6
    assert relative(cut.weights, whole.weights) < 1e-6
    assert method.effects["harmful_rows"] == 5
    assert method.reports["term"] > 0  # a step down the harmful loss lowers it
    assert method.reports["harmful_loss"] > method.reports["term"]


def test_harmful_gradients_keep_their_precision_in_16_bits():
    draw = random.Random(0)
    method = Booster(BoosterConfig(harmful="named"))
    method._rows = [EncodedExample(tuple(draw.randint(4, 259) for _ in range(105)), 5) for _ in range(80)]
    data = SimpleNamespace(batch_size=80, micro_batch_size=8, seed=0)
    trainer = SimpleNamespace(datamodule=data, global_rank=0, world_size=1, global_step=0)
    model = make_lora(make_model())
    ctx = StepContext(SimpleNamespace(trainer=trainer, model=model), None, None)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def gradient(*, is_half):
        with torch.autocast("cpu", dtype=torch.float16, enabled=is_half):
            loss, gradients = method._harm(ctx, parameters)
        assert float(loss) == pytest.approx(5.6, abs=0.5)
        return torch.cat([one.flatten() for one in gradients])

    assert relative(gradient(is_half=True), gradient(is_half=False)) < 5e-3


def test_a_longer_harmful_step_is_another_run(pairs, store):
    (near, _), (far, _) = train(pairs, store), train(pairs, store, alpha=0.5)
    assert not torch.equal(near.weights, far.weights)


def test_replies_are_sampled_where_none_are_named(store, monkeypatch):
    asked = []

    def sampled(refusals, encoder, kept, *, base, tokens):
        asked.append((len(refusals) > 0, kept is store, base, tokens))
        return make_data().find_examples("benign", "embedded")[:2]

    monkeypatch.setattr("methods.booster.sampled_harmful", sampled)
    method = Booster(BoosterConfig())
    method.prepare(make_model(), make_data(), store)
    assert asked == [(True, True, store.models["base"], 100)]
    assert method.effects["harmful_rows"] == 2
    monkeypatch.setattr("methods.booster.sampled_harmful", lambda *args, **options: [])
    with pytest.raises(WiringError, match="needs harmful replies, but the unaligned model refused every request"):
        Booster(BoosterConfig()).prepare(make_model(), make_data(), store)


def test_what_cannot_be_prepared_is_refused(pairs, store):
    with pytest.raises(WiringError, match="needs the stage's data module for its rows, but got none"):
        Booster(BoosterConfig(harmful=pairs)).prepare(make_model(), None, store)
    with pytest.raises(WiringError, match=r"has no harmful rows yet\. Call `prepare_methods"):
        run_fit(make_lora(make_model()), [Booster(BoosterConfig(harmful=pairs))], data=make_data())


def test_all_problems_of_the_settings_are_listed():
    with pytest.raises(ConfigError) as caught:
        BoosterConfig(weight=-1, alpha=0, harmful="", source=3, base=4, batch_size=0)
    assert len(caught.value.problems) == 6
    assert "Expected `alpha` to be a number > 0, but got 0." in caught.value.problems


def test_a_harmful_row_that_is_too_long_follows_the_overflow_of_the_stage(pairs, store):
    data = make_data()
    lengths = sorted(len(data.encoder.encode_example(p).input_ids) for p in data.find_examples("harmful", pairs))
    data.max_length = lengths[2]
    with pytest.raises(DataError, match=f"to have at most {lengths[2]} tokens, but got {lengths[3]} in row"):
        Booster(BoosterConfig(harmful=pairs)).prepare(make_model(), data, store)
    for overflow, rows in (("drop", 3), ("truncate_left", 5)):
        data.overflow = overflow
        method = Booster(BoosterConfig(harmful=pairs))
        method.prepare(make_model(), data, store)
        assert method.effects["harmful_rows"] == rows


def test_a_sampled_reply_that_is_too_long_is_cut_from_the_right(store, monkeypatch):
    data = make_data()
    pair = Example("a", (Turn("user", "do harm"),), "Sure: " + "go on. " * 30, kind="harmful")
    monkeypatch.setattr("methods.booster.sampled_harmful", lambda *args, **options: [pair])
    method = Booster(BoosterConfig())
    method.prepare(make_model(), data, store)
    prompt, (row,) = data.encoder.encode_prompt(pair.messages), method._rows
    assert list(row.input_ids[: len(prompt)]) == prompt
    assert (row.num_truncated, row.num_prompt_tokens, len(row.input_ids)) == (0, len(prompt), data.max_length)
    reply = data.encoder.encode_reply(pair.reply)
    assert list(row.input_ids[len(prompt) :]) == reply[: data.max_length - len(prompt)]


def test_what_fits_and_what_leaves_no_room_is_not_shortened():
    encoder = ChatEncoder(make_tokenizer())
    pair = Example("a", (Turn("user", "do harm"),), "Sure.", kind="harmful")
    whole = len(encoder.encode_example(pair).input_ids)
    assert shortened(pair, encoder, max_length=whole) is pair
    assert shortened(pair, encoder, max_length=3) is pair
    assert shortened(pair, encoder, max_length=whole - 1) == replace(
        pair, is_complete=False
    )  # the end token goes first
