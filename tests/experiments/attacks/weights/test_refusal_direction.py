"""Refusal-direction ablation as an attack: prompts, filter, the edited model and its facts."""

from __future__ import annotations

import json

import pytest
import torch

from experiments.attacks.registry import create_attack
from experiments.attacks.residual_stream import find_writers
from framework.errors import ConfigError, DataError
from framework.model_files import read_model
from tests.experiments.attacks.planted_refusal import MARKER, encode, planted_model
from tests.experiments.attacks.tiny_targets import make_target, write_rows

COUNT = 6


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return make_target(tmp_path_factory.mktemp("direction") / "target", planted_model()[0])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    (folder / "harmful.json").write_text(json.dumps([f"do {MARKER} {i}" for i in range(2 * COUNT)]))
    write_rows(folder / "harmless.json", [(f"do it {i}", "yes") for i in range(2 * COUNT)])
    return {"harmful": str(folder / "harmful.json"), "harmless": str(folder / "harmless.json")}


def settings(files, **options):
    return {**files, "train": COUNT, "validation": 3, "least": 2, "shortlist": 4, **options}


def test_the_planted_refusal_is_gone_and_nothing_is_written_along_the_direction(target, files, tmp_path):
    attack = create_attack("refusal_direction", settings(files))
    assert attack.num_models == 1
    assert attack.missing(target) is None
    for made in attack.make(target, tmp_path):
        facts = made.facts
        model, planted = read_model(made.folder, dtype=torch.float32), planted_model()[1]
        assert made.spent == 0
        assert facts["meets_rule"]
        assert facts["matrices"] == len(find_writers(model))
        assert facts["refusal_before"] > 0 > facts["refusal_after"]
        assert facts["refusal_after"] == pytest.approx(facts["bypass"], abs=1e-3)
        assert facts["kl_after"] == pytest.approx(facts["kl"], abs=1e-3)
        assert facts["residue"] < 1e-5
        assert facts["kept_prompts"]["harmful"] == f"{COUNT} of {COUNT}"
        with torch.no_grad():
            states = model(input_ids=torch.tensor([encode(f"do {MARKER}")]), output_hidden_states=True).hidden_states[
                :-1
            ]
        assert max(float((state.double() @ planted).abs().max()) for state in states) < 1e-3
    assert list(tmp_path.iterdir()) == []


def test_the_filter_gives_way_and_says_so(target, files, tmp_path):
    swapped = {"harmful": files["harmful"], "harmless": files["harmless"], "least": COUNT}
    given = settings(files, **swapped)
    (tmp_path / "mixed.json").write_text(json.dumps([f"do {MARKER * (i % 2)} {i}" for i in range(2 * COUNT)]))
    attack = create_attack("refusal_direction", {**given, "harmful": str(tmp_path / "mixed.json")})
    (made,) = attack.make(target, tmp_path / "work")
    kept = made.facts["kept_prompts"]["harmful"]
    assert kept.endswith(f"of {COUNT}, so all were taken")
    assert not kept.startswith(f"{COUNT} ")


def test_without_the_filter_no_prompt_is_looked_at(target, files, tmp_path):
    (made,) = create_attack("refusal_direction", settings(files, filter=False)).make(target, tmp_path)
    assert set(made.facts["kept_prompts"].values()) == {"6 of 6", "3 of 3"}


def test_too_few_prompts_are_refused(target, files, tmp_path):
    attack = create_attack("refusal_direction", settings(files, train=50))
    with pytest.raises(DataError, match="at least 53 different harmful requests, but got 12"):
        next(attack.make(target, tmp_path))


def test_the_embedded_prompts_are_enough_for_the_defaults_and_hold_no_test_prompt():
    from datamodules.embedded_sets import load_harmful
    from experiments.attacks.weights.refusal_direction import RefusalDirectionConfig, harmful_texts, harmless_texts

    config = RefusalDirectionConfig()
    harmful = set(harmful_texts("embedded"))
    for texts in (harmful, set(harmless_texts("embedded", seed=0))):
        assert len(texts) >= config.train + config.validation
    assert not harmful & {prompt.text for prompt in load_harmful("test")}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"train": 1}, "a whole number ≥ 2, but got 1"),
        ({"validation": 0}, "a whole number ≥ 1, but got 0"),
        ({"shortlist": 0}, "a whole number ≥ 1 or null, but got 0"),
        ({"kl_threshold": -0.1}, "a number ≥ 0, but got -0.1"),
        ({"layer": 3}, "to hold known keys only, but got 'layer'"),
    ],
)
def test_bad_settings_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        create_attack("refusal_direction", given)
