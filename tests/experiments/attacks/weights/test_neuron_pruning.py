"""Neuron pruning: exactly the chosen rows become zero, the control takes others, and layers are limited."""

from __future__ import annotations

import pytest
import torch

from experiments.attacks.registry import create_attack
from experiments.attacks.weights.neuron_pruning import highest_rows, weighted_differences, zero_rows
from experiments.contract.tiny import make_model
from framework.errors import ConfigError, WiringError
from methods.nest.probe import PromptSet
from methods.nest.sites import find_projections, find_sites
from tests.experiments.attacks.test_residual_stream import gpt2
from tests.experiments.attacks.tiny_targets import make_target, weights, write_rows

ROWS = 2 * 2 * 64
"""Rows of gate and up in the two layers of the tiny model."""


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return make_target(tmp_path_factory.mktemp("pruning") / "target")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """Files of two kinds of requests that even a random model tells apart."""
    folder = tmp_path_factory.mktemp("prompts")
    rows = {"harmful": [(f"do !!!! {i}", "no") for i in range(30)], "harmless": [(f"do {i}", "yes") for i in range(30)]}
    return {name: str(write_rows(folder / f"{name}.json", pairs)) for name, pairs in rows.items()}


def zeroed(folder):
    """(name, row) of every row of the MLPs' inputs that is zero."""
    return {
        (name, row)
        for name, weight in weights(folder).items()
        if "gate_proj" in name or "up_proj" in name
        for row in (weight.abs().sum(dim=1) == 0).nonzero().flatten().tolist()
    }


@pytest.mark.parametrize("score", ["probe", "weighted_difference"])
def test_as_many_rows_as_asked_for_become_zero_and_nothing_else_changes(target, prompts, tmp_path, score):
    attack = create_attack("neuron_pruning", {"shares": [0.05], "score": score, **prompts})
    assert attack.num_models == 2
    assert attack.missing(target) is None
    before, found = weights(target.folder), {}
    for made in attack.make(target, tmp_path):
        assert made.spent == 0
        assert made.facts["rows"] == round(0.05 * ROWS) == sum(made.facts["rows_by_layer"].values())
        found[made.setting["neurons"]] = rows = zeroed(made.folder)
        for name, weight in weights(made.folder).items():
            same = (weight == before[name]).reshape(weight.shape[0], -1).all(dim=1)
            changed = {(name, row) for row in (~same).nonzero().flatten().tolist()}
            assert changed == {one for one in rows if one[0] == name}
    assert len(found["safety"]) == len(found["random"]) == round(0.05 * ROWS)
    assert not found["safety"] & found["random"]
    assert list(tmp_path.iterdir()) == []


def test_only_the_first_layers_are_pruned_where_asked(target, tmp_path):
    settings = {"shares": [0.1], "neurons": ["safety"], "score": "weighted_difference", "layers": 1, "count": 20}
    models = create_attack("neuron_pruning", settings).make(target, tmp_path)
    made = next(models)  # whoever lets go of the models lets go of their folders
    assert {name.split(".")[2] for name, _ in zeroed(made.folder)} == {"0"}
    assert made.facts["rows"] == round(0.1 * ROWS / 2)


def test_more_layers_than_there_are_is_refused(target, tmp_path):
    attack = create_attack("neuron_pruning", {"layers": 3, "count": 20})
    with pytest.raises(WiringError, match="`layers` to be at most 2, the layers of the model, but got 3"):
        next(attack.make(target, tmp_path))


def test_a_share_of_no_row_is_refused(target, tmp_path):
    attack = create_attack("neuron_pruning", {"shares": [0.001], "score": "weighted_difference", "count": 20})
    with pytest.raises(WiringError, match=r"a share of 0\.001 of the rows to be at least one"):
        next(attack.make(target, tmp_path))


def test_the_highest_rows_of_all_sites_are_taken_but_never_those_that_speak_against():
    low = -torch.inf
    scores = {"a": torch.tensor([0.1, 5.0, low]), "b": torch.tensor([4.0, low, low])}
    assert {k: v.tolist() for k, v in highest_rows(scores, share=0.34).items()} == {"a": [1], "b": [0]}
    assert {k: v.tolist() for k, v in highest_rows(scores, share=0.5).items()} == {"a": [0, 1], "b": [0]}
    assert sum(v.numel() for v in highest_rows({"a": torch.full((4,), low)}, share=0.5).values()) == 0


def test_zeroing_a_neuron_silences_it_also_where_it_has_a_bias():
    model = gpt2()
    sites = find_sites(find_projections(model))
    rows = {site.key: torch.tensor([0, 5]) for site in sites}
    assert zero_rows(model, sites, rows) == 4
    assert zero_rows(model, sites, rows) == 0
    block, seen = model.transformer.h[1].mlp, []
    block.act.register_forward_hook(lambda m, a, out: seen.append(out.detach()))
    with torch.no_grad():
        model(input_ids=torch.tensor([[5, 6, 7]]))
    assert not seen[0][..., [0, 5]].any()
    assert bool(seen[0][..., 1].all())


def test_weighted_differences_by_hand():
    model = make_model()
    projections = find_projections(model)
    sites = find_sites(projections)[:1]
    features = {sites[0].module: torch.zeros(4, 64)}
    features[sites[0].module][:2, 7] = 3.0
    features[sites[0].module][2:, 8] = 3.0
    prompts = PromptSet(((1,),) * 4, torch.tensor([True, True, False, False]), torch.zeros(4, dtype=torch.bool))
    scores = weighted_differences(model, features, sites, prompts, projections)[sites[0].key]
    expected = 3.0 * float(model.model.layers[0].mlp.down_proj.weight[:, 7].detach().double().norm())
    assert float(scores[7]) == pytest.approx(expected, rel=1e-6)
    assert int(torch.isfinite(scores).sum()) == 1


def test_an_mlp_without_a_known_output_is_refused():
    model = make_model()
    for layer in model.model.layers:
        layer.mlp.mixer = layer.mlp.down_proj
        del layer.mlp.down_proj
    projections = find_projections(model)
    sites = find_sites(projections)
    features = {name: torch.zeros(2, 64) for name in projections}
    prompts = PromptSet(((1,),) * 2, torch.tensor([True, False]), torch.zeros(2, dtype=torch.bool))
    with pytest.raises(WiringError, match="to have an output named like one of"):
        weighted_differences(model, features, sites, prompts, projections)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shares": [0.0]}, r"a share above 0 and at most 0\.5, but got 0\.0"),
        ({"shares": []}, "`shares` to hold at least one value"),
        ({"neurons": ["all"]}, "one of safety, random, but got 'all'"),
        ({"count": 5}, "a whole number ≥ 10, but got 5"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        create_attack("neuron_pruning", settings)
