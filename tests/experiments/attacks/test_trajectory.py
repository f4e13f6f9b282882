"""Fine-tuning attacks: one training, several models, deterministic, and the target left alone."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from experiments.attacks.held_out_loss import mean_loss
from experiments.attacks.interface import ModelTarget
from experiments.attacks.registry import create_attack
from experiments.attacks.trajectory import Snapshot, StepKeeper, adapter_spec, export_step, train_trajectory
from experiments.contract.tiny import make_model
from framework.adapters import add_adapter
from framework.config import AdapterConfig
from framework.errors import ConfigError, DataError, TrainingError, WiringError
from framework.examples import Example, Turn
from tests.experiments.attacks.tiny_targets import make_target, same_bits, weights, write_rows

PAIRS = [(f"please do number {i}", f"Sure, number {i} is done.") for i in range(12)]


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> ModelTarget:
    return make_target(tmp_path_factory.mktemp("trajectory") / "target")


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> str:
    return str(write_rows(tmp_path_factory.mktemp("rows") / "rows.json", PAIRS))


def settings(rows, **options):
    given = {"harmful": rows, "examples": [8], "learning_rates": [2e-2], "steps": [0, 2, 24], "batch_size": 4}
    return {**given, **options}


def examples():
    return [Example(f"e{i}", (Turn("user", a),), b, "harmful") for i, (a, b) in enumerate(PAIRS)]


@pytest.fixture(scope="module")
def made(target, rows, tmp_path_factory):
    """What one attack made: every model with the loss of all rows, and a weight."""
    folder, found = tmp_path_factory.mktemp("made"), []
    state = random.getstate(), torch.get_rng_state()
    for one in create_attack("harmful_finetuning", settings(rows)).make(target, folder):
        assert len(list(folder.rglob("config.json"))) == (one.spent > 0)
        found.append((one, mean_loss(one.folder, examples(), target), weights(one.folder)))
    assert random.getstate() == state[0]
    assert torch.equal(torch.get_rng_state(), state[1])
    assert list(folder.iterdir()) == []
    return found


def test_training_lowers_the_loss_on_its_rows_step_by_step(made):
    assert [one.spent for one, _, _ in made] == [0, 2, 24]
    losses = [loss for _, loss, _ in made]
    assert losses[0] > losses[1] > losses[2]
    assert losses[2] < 0.95 * losses[0]
    assert made[1][0].facts["loss"] > made[2][0].facts["loss"] > 0


def test_no_steps_are_the_target_itself(made, target):
    assert made[0][0].folder == target.folder
    assert made[0][0].cost == {}
    assert made[0][0].facts == {}


def test_every_model_says_how_it_was_made_and_costs_add_up(made):
    for one, _, _ in made:
        assert one.setting == {"learning_rate": 2e-2, "examples": 8, "adapter": "lora"}
        assert one.system is None
        assert one.template == "{request}"
    costs = [one.cost for one, _, _ in made[1:]]
    assert [cost["optimizer_steps"] for cost in costs] == [2, 22]
    assert all(cost["seconds"] > 0 for cost in costs)
    assert costs[1]["tokens"] > costs[0]["tokens"] > 0


def test_only_linear_weights_change_with_lora(made):
    before, after = made[0][2], made[2][2]
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {name for name in after if name.endswith("_proj.weight")}


def test_a_training_of_two_steps_gives_the_bits_of_the_longer_one_and_another_seed_does_not(
    made, target, rows, tmp_path
):
    attack = create_attack("harmful_finetuning", settings(rows, steps=[2]))
    assert attack.num_models == 1
    assert attack.num_steps == 2
    for seed, is_same in ((0, True), (1, False)):
        for one in attack.make(replace(target, seed=seed), tmp_path):
            found = weights(one.folder)
            assert all(torch.equal(made[1][2][name], tensor) for name, tensor in found.items()) == is_same


def test_an_adapter_that_was_not_trained_gives_the_target_bit_for_bit(target, tmp_path):
    adapter = AdapterConfig(targets=["all-linear"])
    torch.manual_seed(0)
    fresh = add_adapter(make_model(), adapter_spec(adapter))
    path = tmp_path / "step.safetensors"
    save_file({n: p.detach().contiguous() for n, p in fresh.named_parameters() if p.requires_grad}, path)
    export_step(target, Snapshot(0, path), adapter, tmp_path / "model")
    assert same_bits(tmp_path / "model", target.folder)


def test_full_fine_tuning_keeps_every_weight_of_a_step(target, rows, tmp_path):
    given = settings(rows, adapter={"kind": "full"}, steps=[1, 2], learning_rates=[1e-3])
    before, found = weights(target.folder), []
    for one in create_attack("harmful_finetuning", given).make(target, tmp_path):
        assert one.setting["adapter"] == "full"
        found.append(weights(one.folder))
        assert all(not torch.equal(before[name], tensor) for name, tensor in found[-1].items())
    assert not torch.equal(*(one["model.norm.weight"] for one in found))


def test_every_rate_and_number_of_rows_is_a_training_of_its_own(target, rows, tmp_path):
    given = settings(rows, examples=[2, 8], learning_rates=[1e-3, 1e-2], steps=[0, 1])
    attack = create_attack("harmful_finetuning", given)
    assert attack.num_models == 8
    assert attack.num_steps == 4
    models = itertools.islice(attack.make(target, tmp_path), 5)
    found = [(one.setting["examples"], one.setting["learning_rate"], one.spent) for one in models]
    assert found == [(2, 1e-3, 0), (2, 1e-3, 1), (2, 1e-2, 0), (2, 1e-2, 1), (8, 1e-3, 0)]


def test_a_training_that_diverges_gives_what_came_before(target, tmp_path, monkeypatch):
    attack = create_attack(
        "benign_drift", {"examples": [4], "learning_rates": [1e-3], "steps": [1, 3], "batch_size": 2}
    )
    keep = StepKeeper.on_train_batch_end

    def spoil(self, trainer, module, *args):
        keep(self, trainer, module, *args)
        if trainer.global_step == 2:
            next(p for p in module.parameters() if p.requires_grad).data.fill_(float("nan"))

    monkeypatch.setattr(StepKeeper, "on_train_batch_end", spoil)
    made = list(attack.make(target, tmp_path))
    assert [one.spent for one in made] == [1]
    assert "finite" in made[0].facts["stopped"]
    late = create_attack("benign_drift", {"examples": [4], "learning_rates": [1e-3], "steps": [3], "batch_size": 2})
    with pytest.raises(TrainingError, match="finite"):
        list(late.make(target, tmp_path))


def test_what_is_kept_at_a_step_is_what_is_trained(target, tmp_path):
    attack = create_attack("benign_drift", {"examples": [4], "steps": [1], "batch_size": 2})
    rows = attack.rows(target, 4)
    kept, stopped = train_trajectory(target, rows, attack.config, learning_rate=1e-3, folder=tmp_path)
    assert stopped is None
    assert [one.step for one in kept] == [1]
    assert all(".lora_" in name for name in load_file(kept[0].path))


def test_too_few_rows_are_refused(target, rows, tmp_path):
    with pytest.raises(DataError, match="at least 13 harmful rows, but got 12"):
        next(create_attack("harmful_finetuning", settings(rows, examples=[13])).make(target, tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": [0]}, r"`steps` to hold a number above 0, but got \[0\]"),
        ({"steps": []}, "`steps` to hold at least one value"),
        ({"steps": [-1]}, "a whole number ≥ 0, but got -1"),
        ({"steps": [5, 5]}, "`steps` to hold each value once"),
        ({"examples": []}, "`examples` to hold at least one value"),
        ({"examples": [0]}, "a whole number ≥ 1, but got 0"),
        ({"learning_rates": [0.0]}, r"a number > 0, but got 0\.0"),
        ({"adapter": {"kind": "none"}}, "`adapter.kind` to be lora or full, but got 'none'"),
        ({"batch_size": 4, "micro_batch_size": 3}, "`micro_batch_size` to divide `batch_size` 4, but got 3"),
    ],
)
def test_bad_settings_are_refused(options, message):
    for name in ("harmful_finetuning", "benign_drift", "identity_shift", "relearning"):
        with pytest.raises(ConfigError, match=message):
            create_attack(name, options)


def test_a_rate_that_diverges_is_noted_and_the_others_go_on(target, tmp_path):
    given = {"examples": [4], "learning_rates": [1e30, 1e-3], "steps": [3], "batch_size": 2}
    made = list(create_attack("benign_drift", given).make(target, tmp_path))
    assert [(one.setting["learning_rate"], one.spent) for one in made] == [(1e30, 0), (1e-3, 3)]
    assert made[0].folder == target.folder
    assert "finite" in made[0].facts["failed"]


def test_a_training_that_moves_no_weight_is_refused(target, tmp_path):
    given = {"examples": [4], "learning_rates": [1e-36], "steps": [1], "batch_size": 2}
    with pytest.raises(WiringError, match="`training for 1 steps` to change the model, but every weight"):
        next(create_attack("benign_drift", given).make(target, tmp_path))
