"""Attacks in a model card: of `seawall attack` on the released weights, and written by hand."""

from __future__ import annotations

import pytest

from experiments.attacks import attack_files
from experiments.release.attacks import read_attacks
from experiments.release.bundle import ReleaseOptions, release_run
from experiments.release.model_card import model_card
from experiments.release.verify import VerifyOptions, verify_bundle
from framework.errors import DataError
from framework.evaluation.rates import Rate
from framework.files import read_json, to_plain, write_json
from framework.model_files import model_fingerprint
from tests.experiments.release.conftest import NOW

RATE = {"value": 0.5, "numerator": 2, "denominator": 4, "low": 0.15, "high": 0.85}
OURS = "0123456789abcdef"


def rate(hits, total=10):
    return to_plain(Rate.of("attack_success", hits, total))


def attack_file(fingerprint=OURS, **changes):
    """What `seawall attack` writes: one attack that trains, at two points, the later one below the floor."""
    points = [
        {
            "spent": spent,
            "metrics": {"attack_success": rate(hits), "refusal_rate": rate(1), "utility_share": {"value": utility}},
            "setting": {"learning_rate": 0.001, "facts": {"loss": 3.0}},
            "successes": {"r1": True},
        }
        for spent, hits, utility in ((10, 6, 0.9), (50, 9, 0.2))
    ]
    outcome = {
        "name": "lora", "attack": "harmful_finetuning", "kind": "finetuning", "unit": "steps", "settings": {},
        "points": points, "cost": {"seconds": 1055.5048783849925, "queries": 20}, "transcript": "transcript-lora.jsonl",
    }  # fmt: skip
    model = {"name": "model", "label": "x", "endpoint": False, "fingerprint": fingerprint}
    return {
        "format": attack_files.READABLE[-1],
        "model": model,
        "suite": {"utility_floor": 0.8},
        "outcomes": [outcome],
    } | changes


def test_attacks_are_read_without_their_transcripts_and_stand_in_the_card(tmp_path, model_bundle):
    path = tmp_path / "attacks.json"
    attack = {"name": "harmful_lora", "budget": {"steps": 50}, "metrics": {"attack_success": RATE}}
    write_json(path, {"attacks": [attack | {"transcript": ["bad"]}]})
    found = read_attacks(path, fingerprint=OURS)
    assert found == [attack | {"origin": "by_hand", "cost": {}}]
    facts = read_json(model_bundle / "release.json")
    assert "No attack was tried on this model" in model_card(facts)
    card = model_card(facts | {"attacks": found})
    assert "No attack was tried" not in card
    assert "| harmful_lora | steps 50 |  | attack_success | 50.0 % (2/4; 15.0" in card
    assert "| a list written by hand |" in card


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"attacks": []}, "to list attacks, but got none"),
        ({}, "to list attacks, but got none"),
        ([{"budget": {}}], "to have a name"),
        ([{"name": "x", "metrics": {"attack_success": {"value": 0.1}}}], "to have counts and bounds"),
        ([{"name": "x", "metrics": [1]}], "Expected `metrics` of attack `x` to be a mapping, but got"),
        ([{"name": "x", "budget": "50 steps"}], "Expected `budget` of attack `x` to be a mapping, but got '50 steps'"),
        (
            [{"name": "x", "metrics": {"attack_success": rate(9) | {"value": 0.0}}}],
            "to agree with its own counts, but it has the value 0, but its counts 9/10 give 0.9",
        ),
    ],
)
def test_file_of_attacks_without_what_a_card_needs_is_refused(value, message, tmp_path):
    write_json(tmp_path / "a.json", value)
    with pytest.raises(DataError, match=message):
        read_attacks(tmp_path / "a.json", fingerprint=OURS)
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(DataError, match="to be a JSON file of attacks"):
        read_attacks(tmp_path / "b.json", fingerprint=OURS)


def test_results_of_seawall_attack_are_taken_at_the_point_that_it_shows(tmp_path, model_bundle):
    write_json(tmp_path / "attack.json", attack_file())
    found = read_attacks(tmp_path / "attack.json", fingerprint=OURS)
    assert found == read_attacks(tmp_path, fingerprint=OURS)
    parts = {part: value for part, value in rate(6).items() if part != "name"}
    assert found == [
        {
            "name": "lora",
            "origin": "attack",
            "budget": {"steps": 10, "learning_rate": 0.001, "utility_share": 0.9, "utility_floor": 0.8},
            "cost": {"seconds": 1055.5048783849925, "queries": 20},
            "metrics": {"attack_success": parts},
        }
    ]
    card = model_card(read_json(model_bundle / "release.json") | {"attacks": found})
    budget = "steps 10, learning rate 0.001, utility share 0.9, utility floor 0.8"
    assert f"| lora | {budget} | seconds 1055.5, queries 20 | attack_success |" in card
    assert "| `seawall attack` on these weights |" in card


def test_attacks_on_other_weights_are_refused_and_on_unknown_ones_marked(tmp_path):
    path = tmp_path / "attack.json"
    write_json(path, attack_file(fingerprint="f" * 16))
    with pytest.raises(DataError, match=f"on the released model, with fingerprint {OURS}, but got 'ffffffffffffffff'"):
        read_attacks(path, fingerprint=OURS)
    write_json(path, attack_file(model={"name": "http://host/v1#m", "label": "m", "endpoint": True}))
    assert [attack["origin"] for attack in read_attacks(path, fingerprint=OURS)] == ["attack_uncompared"]


def test_results_of_seawall_attack_that_contradict_themselves_are_refused(tmp_path):
    value = attack_file()
    value["outcomes"][0]["points"][1]["metrics"]["attack_success"]["low"] = 0.8
    write_json(tmp_path / "attack.json", value)
    with pytest.raises(DataError, match=r"has the bounds 0\.8 to .*, but the Wilson interval of its counts 9/10"):
        read_attacks(tmp_path, fingerprint=OURS)
    del value["outcomes"][0]["points"][1]["metrics"]["attack_success"]
    write_json(tmp_path / "attack.json", value)
    with pytest.raises(DataError, match="to have counts and bounds"):
        read_attacks(tmp_path, fingerprint=OURS)
    value["outcomes"][0]["points"] = []
    write_json(tmp_path / "attack.json", value)
    with pytest.raises(DataError, match="to have reached something, but got no points"):
        read_attacks(tmp_path, fingerprint=OURS)


def test_release_takes_attacks_on_its_own_model_only_and_verify_names_them(
    finished_run, key_file, public_key, tmp_path
):
    path = tmp_path / "attack.json"
    options = ReleaseOptions(output=tmp_path / "out", key=key_file, attacks=[path])
    write_json(path, attack_file())
    with pytest.raises(DataError, match=r"Expected .* to hold attacks on the released model"):
        release_run(finished_run, options, now=NOW)
    write_json(path, attack_file(model_fingerprint(finished_run / "model")))
    release_run(finished_run, options, now=NOW)
    assert read_json(tmp_path / "out" / "release.json")["attacks"][0]["origin"] == "attack"
    found = verify_bundle(tmp_path / "out", VerifyOptions(key=public_key, prompts=2, seed=0), now=NOW)
    assert found.is_good, found.problems
    assert "attack lora" in found.rerun.unchecked_claims
