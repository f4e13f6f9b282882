from __future__ import annotations

from itertools import islice

import pytest
import torch

from experiments.conformance import rmu as derivation
from framework.errors import ConfigError, WiringError
from methods.rmu import RMU, RMUConfig, control_direction, kept_names, state_distance
from tests.conftest import make_model
from tests.methods.unlearning_runs import make_data, make_store, trained, write_pairs
from tests.tiny_runs import make_batch
from tests.tiny_vision import make_image_text_model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Trains with some settings; models and files are written once."""
    folder = tmp_path_factory.mktemp("rmu")
    store, forget = make_store(folder), write_pairs(folder / "forget.jsonl", 4)

    def train(*, model=None, **settings):
        method = RMU(RMUConfig(source=forget, **{"layer": 1, "train_layers": [1], **settings}))
        return trained(store, method, model=model), method

    train.store, train.forget = store, forget
    return train


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"c": 0}, "Expected `c` to be a number > 0, but got 0."),
        ({"alpha": -1}, "Expected `alpha` to be a number >= 0, but got -1."),
        ({"layer": -1}, "Expected `layer` to be a whole number >= 0 or null, but got -1."),
        ({"train_layers": []}, "Expected `train_layers` to be a list of whole numbers >= 0 or null, but got ()."),
        ({"modules": [""]}, "Expected `modules` to be a list of module names, but got ('',)."),
        ({"seed": "a"}, "Expected `seed` to be a whole number >= 0, but got 'a'."),
        ({"reference": "copy"}, "Expected `reference` to be one of cached, live, but got 'copy'."),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, text):
    with pytest.raises(ConfigError) as caught:
        RMUConfig(**settings)
    assert text in caught.value.problems


def test_the_direction_has_length_one_and_positive_entries():
    u = control_direction(32, seed=0)
    assert float(u.norm()) == pytest.approx(1.0)
    assert float(u.min()) >= 0
    assert torch.equal(u, control_direction(32, seed=0))
    assert not torch.equal(u, control_direction(32, seed=1))


def test_the_distance_in_double_precision():
    torch.manual_seed(0)
    states, target, rows = torch.randn(3, 4).double().requires_grad_(), torch.randn(4).double(), torch.tensor([0, 0, 1])
    off = [float(((states.detach()[i] - target) ** 2).sum() / 4) for i in range(3)]
    found = state_distance(states, target, rows, num_rows=2)
    assert float(found.detach()) == pytest.approx(((off[0] + off[1]) / 2 + off[2]) / 2)
    assert torch.autograd.gradcheck(lambda h: state_distance(h, target, rows, num_rows=2), states)


def test_only_the_named_layers_and_modules_are_trained(run):
    names = frozenset({"model.layers.1.mlp.down_proj.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"})
    assert kept_names(names, [1], ["down_proj"]) == {"model.layers.1.mlp.down_proj.weight"}
    with pytest.raises(WiringError, match=r"Expected something to train in layers \[0\] under any"):
        kept_names(names, [0], [])
    before = dict(make_model().named_parameters())
    fitted, method = run(model=make_model(), modules=["down_proj"], c=50.0, alpha=0.0)
    moved = [name for name, p in fitted.module.model.named_parameters() if not torch.equal(p, before[name])]
    assert moved == ["model.layers.1.mlp.down_proj.weight"]
    # Three steps bring the states of forget rows nearer to the direction.
    batch, target = method._forget.batch(0, make_batch(4)), 50.0 * control_direction(32, seed=0).float()
    cosines = [
        torch.cosine_similarity(method._reply_states(model, batch)[0].detach(), target).mean()
        for model in (make_model(), fitted.module.model)
    ]
    assert cosines[1] > cosines[0] + 1e-3


def test_states_turn_and_cached_and_live_references_train_alike(run):
    cached, method = run(alpha=3.0)
    live, _ = run(alpha=3.0, reference="live")
    torch.testing.assert_close(cached.weights, live.weights, rtol=1e-4, atol=1e-6)
    assert method.effects["stored_bytes"] > 0
    free, loose = run(alpha=0.0)
    assert "retain_loss" not in loose.reports
    assert not torch.equal(free.weights, cached.weights)


def test_training_all_there_is_freezes_nothing_and_is_no_error(run):
    _, method = run(train_layers=[0, 1])
    assert method.effects["parameters_frozen"] == 0


def test_a_strength_of_zero_is_plain_training(run):
    method = RMU(RMUConfig(source="nowhere", weight=0.0))
    method.allow_no_effect = True
    assert torch.equal(trained(run.store, method).weights, trained(run.store).weights)


def test_layers_outside_the_model_are_refused(run):
    for settings, text in (
        ({"layer": 2}, r"Expected `layer` to be from 0 to 1, but got 2\."),
        ({"layer": 0, "train_layers": (1,)}, r"Expected `train_layers` to be from 0 to 0, but got 1\."),
    ):
        method = RMU(RMUConfig(source=run.forget, **settings))
        with pytest.raises(WiringError, match=text):
            method.prepare(make_model(), make_data(), run.store)
    scaled = RMU(RMUConfig(source=run.forget, reference="live"))
    scaled.prepare(make_model(layers=12), make_data(), run.store)
    assert (scaled._layer, scaled._trained_layers) == (3, (1, 2, 3))


def test_loss_and_gradient_are_those_derived_again(tmp_path, monkeypatch):
    rows = list(derivation.deviations(tmp_path / "case"))
    assert len(rows) == 6
    assert [row.quantity for row in rows if not row.deviation <= row.bound] == []
    monkeypatch.setattr(derivation, "ALPHA", 5.0)
    # The method keeps its own strength.
    monkeypatch.setattr(derivation, "RMUConfig", lambda **given: RMUConfig(**given | {"alpha": 4.0}))
    assert all(row.deviation > row.bound for row in islice(derivation.deviations(tmp_path / "wrong"), 2))


def test_layers_of_a_vision_tower_are_not_trained(tmp_path):
    model, store = make_image_text_model(), make_store(tmp_path)
    forget = write_pairs(tmp_path / "forget.jsonl", 4)
    method = RMU(RMUConfig(source=forget, layer=1, train_layers=[1], alpha=0.0))
    method.prepare(model, make_data(), store)
    kept = method.select_parameters(frozenset(name for name, _ in model.named_parameters()))
    assert kept
    assert all(name.startswith("model.language_model.layers.1.") for name in kept)
    with pytest.raises(WiringError, match="Expected `layer` to be from 0 to 1, but got 3"):
        RMU(RMUConfig(source=forget, layer=3)).prepare(model, make_data(), store)
