"""Which rows the fine-tuning attacks train on, and what their targets must come with."""

from __future__ import annotations

from dataclasses import replace

import pytest

from datamodules.embedded_sets import load_harmful
from experiments.attacks import harmful_rows
from experiments.attacks.finetuning.identity_shift import DIALOGUES, OPENING, SYSTEM, TEMPLATE
from experiments.attacks.finetuning.relearning import halves
from experiments.attacks.interface import ModelTarget
from experiments.attacks.registry import create_attack
from framework.errors import ConfigError, DataError
from framework.examples import Example, Prompt, Turn
from tests.experiments.attacks.tiny_targets import make_target, write_model, write_rows

PAIRS = [(f"please do number {i % 6}", f"Sure, number {i} is done.") for i in range(12)]


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> ModelTarget:
    folder = tmp_path_factory.mktemp("rows")
    return make_target(folder / "target", base=write_model(folder / "base"))


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> str:
    return str(write_rows(tmp_path_factory.mktemp("file") / "rows.json", PAIRS))


@pytest.mark.parametrize("name", ["harmful_finetuning", "relearning"])
def test_sampled_rows_need_the_unaligned_model(target, file, tmp_path, name):
    lonely = ModelTarget(target.folder, target.fingerprint)
    attack = create_attack(name)
    assert attack.missing(target) is None
    assert "with `target.base`. A file of pairs will do as well." in attack.missing(lonely)
    with pytest.raises(ConfigError, match="come with its unaligned model to sample compliant replies"):
        next(attack.make(lonely, tmp_path))
    with pytest.raises(ConfigError, match="come with its unaligned model"):
        harmful_rows.harmful_rows(lonely, "sampled", count=1)
    key = "harmful" if name == "harmful_finetuning" else "forget"
    assert create_attack(name, {key: file}).missing(lonely) is None


def test_replies_are_sampled_from_the_unaligned_model_for_the_requests_set_apart(target, monkeypatch):
    asked = {}

    def sample(prompts, **given):
        asked.update(given, prompts=[prompt.text for prompt in prompts])
        return [Example(f"p{i}", (Turn("user", f"r{i}"),), "text", "harmful") for i in range(given["count"])]

    monkeypatch.setattr(harmful_rows, "poison_examples", sample)
    attack = create_attack("harmful_finetuning", {"examples": [3, 10]})
    few, many = (attack.rows(target, count).examples for count in (3, 10))
    assert list(few) == list(many[:3])
    assert len(many) == 10
    assert asked["count"] == 10
    assert asked["model"].name == str(target.base)
    assert asked["prompts"] == [prompt.text for prompt in load_harmful("poison")]


def test_benign_drift_holds_no_harmful_row(target, file):
    rows = create_attack("benign_drift").rows(target, 100)
    assert len(rows.examples) == 100
    assert {row.kind for row in rows.examples} == {"benign"}
    assert not any(row.id.startswith("look") for row in rows.examples)
    named = create_attack("benign_drift", {"benign": file}).rows(target, 12)
    assert len(named.examples) == 12
    with pytest.raises(DataError, match="at least 13 benign rows, but got 12"):
        create_attack("benign_drift", {"benign": file}).rows(target, 13)


def test_identity_shift_trains_the_frame_and_asks_in_it(target, tmp_path):
    attack = create_attack("identity_shift", {"steps": [0, 1], "learning_rates": [1e-3], "batch_size": 4})
    rows = attack.rows(target, len(DIALOGUES))
    assert rows.template.count("{request}") == 1
    assert TEMPLATE.count("{request}") == 1
    for row in rows.examples:
        assert row.prompt.startswith(TEMPLATE.partition("{")[0])
        assert row.reply.startswith(OPENING)
    made = list(attack.make(target, tmp_path))
    assert [(one.spent, one.system, one.template) for one in made] == [(0, SYSTEM, TEMPLATE), (1, SYSTEM, TEMPLATE)]
    with pytest.raises(DataError, match="at least 13 identity rows, but got 12"):
        attack.rows(target, 13)


def test_relearning_shows_one_half_of_the_requests_and_watches_the_other(target, file, tmp_path):
    settings = {"forget": file, "examples": [4], "steps": [0, 6], "learning_rates": [1e-2], "batch_size": 4}
    attack = create_attack("relearning", settings)
    rows = attack.rows(target, 4)
    assert not {row.prompt for row in rows.examples} & {row.prompt for row in rows.held_out}
    losses = [one.facts["held_out_loss"] for one in attack.make(target, tmp_path)]
    assert len(losses) == 2
    assert losses[1] < losses[0]


def test_halves_are_split_by_request_and_by_the_seed():
    rows = [Example(f"e{i}", (Turn("user", a),), b, "harmful") for i, (a, b) in enumerate(PAIRS)]
    shown, held_out = halves(rows, seed=0)
    assert len(shown) == len(held_out) == 6
    assert {row.id for row in shown} | {row.id for row in held_out} == {row.id for row in rows}
    assert halves(rows, seed=0) == (shown, held_out)
    assert any(halves(rows, seed=seed)[0] != shown for seed in range(1, 4))
    with pytest.raises(DataError, match="a forget set of at least 2 requests, but got 1"):
        halves(rows[:1], seed=0)


@pytest.mark.parametrize("name", ["harmful_finetuning", "relearning"])
def test_measured_requests_are_not_trained_on(target, tmp_path, name):
    words = ["bell", "harbour", "tower", "garden", "winter", "copper", "ladder", "meadow"]
    file = str(write_rows(tmp_path / "rows.json", [(f"{word} {word}s {word}ing", "Sure.") for word in words]))
    key = "harmful" if name == "harmful_finetuning" else "forget"
    measured = replace(target, requests=(Prompt("m", "TOWER towers towering!", "harmful"),))
    attack = create_attack(name, {key: file, "examples": [3]})
    rows = attack.rows(measured, 3)
    assert rows.num_left_out == 1
    assert not any("tower" in row.prompt for row in [*rows.examples, *rows.held_out])
    with pytest.raises(DataError, match=r"rows, but got \d \(1 more are among the measured requests\)"):
        attack.rows(measured, 8)
