from __future__ import annotations

import json

import pytest
import pytorch_lightning as pl
import torch

from datamodules.finetune import FineTuneDataModule
from framework.chat import ChatEncoder
from framework.composition import methods_of
from framework.errors import ConfigError, NoEffectError, WiringError
from framework.examples import Example, Turn
from methods.lisa import Lisa, LisaConfig, half_square_distance, rows_of_steps
from methods.safety_mix import SafetyMix, SafetyMixConfig
from methods.smh import SMH, SMHConfig
from tests.conftest import make_model, make_tokenizer
from tests.tiny_runs import make_lora, run_fit

TASK = [Example(f"t{i}", (Turn("user", f"word {i}"),), "yes " * (i % 5 + 1)) for i in range(9)]
TURNS = {"alignment_steps": 2, "task_steps": 3}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "refusals.jsonl"
    rows = [{"prompt": f"do harm {i}", "response": "No, I cannot help with that."} for i in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def make_data(total_steps=6, *, seed=0):
    data = FineTuneDataModule(
        ChatEncoder(make_tokenizer()), batch_size=4, total_steps=total_steps, max_length=200, seed=seed
    )
    data.add_source("task", TASK)
    return data


def train(methods, *, total_steps=6, **options):
    data = make_data(total_steps)
    run = run_fit(make_lora(make_model()), methods, data=data, total_steps=total_steps, **options)
    return run, data


def make_method(pairs, **settings):
    return Lisa(LisaConfig(**{**TURNS, "skip_share": 0.0, "source": pairs, **settings}))


def test_rows_go_round_within_each_state():
    rows = rows_of_steps([0, 1, 2], [3, 4], **TURNS, total_steps=10, batch_size=2, seed=1)
    steps = [rows[i : i + 2] for i in range(0, 20, 2)]
    assert [max(step) < 3 for step in steps] == [True, True, False, False, False] * 2
    assert sorted(rows.count(i) for i in range(3)) == [2, 3, 3]
    assert [rows.count(3), rows.count(4)] == [6, 6]
    assert rows == rows_of_steps([0, 1, 2], [3, 4], **TURNS, total_steps=10, batch_size=2, seed=1)
    assert rows != rows_of_steps([0, 1, 2], [3, 4], **TURNS, total_steps=10, batch_size=2, seed=2)


def test_the_distance_keeps_float64_and_its_gradient_is_the_difference():
    w, anchor = torch.randn(3, 2).double().requires_grad_(), torch.randn(3, 2).double()
    (gradient,) = torch.autograd.grad(half_square_distance({"w": w}, {"w": anchor}), w)
    torch.testing.assert_close(gradient, w.detach() - anchor, rtol=0, atol=1e-15)


class Seen(Lisa):
    """Keeps what every step trains on and adds."""

    def __init__(self, config):
        super().__init__(config)
        self.seen = []

    def loss_term(self, ctx):
        term = super().loss_term(ctx)
        self.seen.append((ctx.step, ctx.batch.example_ids.tolist(), None if term is None else float(term.detach())))
        return term


def test_states_take_turns_on_their_own_rows_and_start_without_distance(pairs):
    method = Seen(LisaConfig(**TURNS, skip_share=0.0, source=pairs))
    _, data = train([method])
    kinds = [{data.rows[i].kind for i in rows} for _, rows, _ in method.seen]
    assert kinds == [{"safety"}, {"safety"}, {"task"}, {"task"}, {"task"}, {"safety"}]
    assert [value == 0.0 for _, _, value in method.seen] == [True, False, True, False, False, True]
    assert method.effects["switches"] == 2
    assert method.reports["drift"] > 0


def test_the_first_share_of_the_steps_goes_without_the_term(pairs):
    method = Seen(LisaConfig(**TURNS, skip_share=0.5, source=pairs))
    train([method])
    assert [value is None for _, _, value in method.seen] == [True, True, True, False, False, False]


def test_without_weight_only_the_rows_differ_from_plain_training(pairs):
    alternating = make_method(pairs, weight=0.0)
    alternating.allow_no_effect = True
    held = make_method(pairs, weight=5.0)
    (free, _), (near, _), (plain, _) = train([alternating]), train([held]), train([])
    assert not torch.equal(free.weights, plain.weights)
    assert not torch.equal(near.weights, free.weights)


def test_switched_off_it_is_plain_training(pairs):
    method = make_method(pairs, alignment_steps=0)
    method.allow_no_effect = True
    assert torch.equal(train([method])[0].weights, train([])[0].weights)
    with pytest.raises(NoEffectError, match="Method `lisa` did nothing: it added no data source"):
        train([make_method(pairs, alignment_steps=0)])


def test_rows_of_another_method_count_as_the_tasks(pairs):
    method = Seen(LisaConfig(**TURNS, skip_share=0.0, source=pairs))
    _, data = train([SafetyMix(SafetyMixConfig(count=6, source=pairs)), method], total_steps=10)
    served = {i for step, rows, _ in method.seen if step % 5 >= 2 for i in rows}
    assert {data.rows[i].kind for i in served} == {"task", "safety"}
    own = {i for step, rows, _ in method.seen if step % 5 < 2 for i in rows}
    assert all(data.rows[i].id.startswith("lisa/") for i in own)


def test_a_second_method_that_orders_the_rows_is_refused(pairs):
    data = make_data()
    make_method(pairs).configure_data(data)
    with pytest.raises(WiringError, match="Expected one order of the rows, but got a second one"):
        data.set_order(list)
    assert SMH(SMHConfig(count=0)).configure_data(data) is None


@pytest.mark.parametrize("steps", [6, 7])
def test_a_run_that_never_leaves_the_first_state_is_refused(pairs, steps):
    with pytest.raises(WiringError, match=f"below the 6 steps of the run, but got {steps}"):
        train([make_method(pairs, alignment_steps=steps)])


def test_the_shortest_run_takes_one_step_on_the_task(pairs):
    method = Seen(LisaConfig(**{**TURNS, "alignment_steps": 5}, skip_share=0.0, source=pairs))
    _, data = train([method])
    assert {data.rows[i].kind for i in method.seen[-1][1]} == {"task"}


class BackToStart(pl.Callback):
    """Puts the weights back that entered the run after the fourth step, as a guard does."""

    def on_train_start(self, trainer, pl_module):
        self.start = {name: p.detach().clone() for name, p in pl_module.model.named_parameters()}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step != 4:
            return
        with torch.no_grad():
            for name, p in pl_module.model.named_parameters():
                p.copy_(self.start[name])
        for method in methods_of(trainer):
            method.weights_restored(pl_module.model)


def test_weights_that_are_put_back_are_the_anchor_from_then_on(pairs):
    method = Seen(LisaConfig(**TURNS, skip_share=0.0, source=pairs))
    train([method], observers=[BackToStart()])
    # Steps 2 to 4 are one state; the fifth step comes after the roll back in the middle of it.
    values = [value for _, _, value in method.seen]
    assert values[3] > 0.0
    assert values[4] == 0.0
    assert (method.effects["anchors_restored"], method.effects["switches"]) == (1, 2)


def test_weights_put_back_before_there_is_an_anchor_are_none(pairs):
    method = make_method(pairs)
    method.weights_restored(make_model())
    assert (method._anchor, method.effects["anchors_restored"]) == ({}, 0)


def test_a_stage_without_rows_of_its_own_is_refused(pairs):
    data = FineTuneDataModule(ChatEncoder(make_tokenizer()), batch_size=4, total_steps=6, max_length=200)
    with pytest.raises(WiringError, match="needs alignment rows and others, but got 6 and 0"):
        run_fit(make_lora(make_model()), [make_method(pairs)], data=data)


def test_all_problems_of_the_settings_are_listed():
    wrong = {"weight": -1, "alignment_steps": True, "task_steps": 0, "skip_share": 1, "source": "", "count": 0}
    with pytest.raises(ConfigError) as caught:
        LisaConfig(**wrong)
    assert len(caught.value.problems) == 6
    assert "Expected `skip_share` to be a share from 0 to 1, 1 left out, but got 1." in caught.value.problems
    assert LisaConfig(count=3).count == 3
