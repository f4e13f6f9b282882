from __future__ import annotations

from itertools import islice

import pytest
import torch

from experiments.conformance import circuit_breakers as derivation
from framework.errors import ConfigError, WiringError
from methods.circuit_breakers import (
    CircuitBreakers,
    CircuitBreakersConfig,
    reroute_loss,
    retain_loss,
    scheduled_strengths,
    token_cosines,
)
from tests.conftest import make_model
from tests.methods.unlearning_runs import STEPS, make_data, make_store, trained, write_pairs
from tests.tiny_runs import make_lora

OTHER = {"alpha": 10.0}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Trains with some settings; models and files are written once."""
    folder = tmp_path_factory.mktemp("circuit_breakers")
    store, forget = make_store(folder), write_pairs(folder / "forget.jsonl", 4)

    def train(*, model=None, **settings):
        method = CircuitBreakers(CircuitBreakersConfig(source=forget, **{"layers": [0, 1], **settings}))
        return trained(store, method, model=model), method

    train.store, train.forget = store, forget
    return train


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"alpha": 0}, "Expected `alpha` to be a number > 0, but got 0."),
        ({"task_weight": -1}, "Expected `task_weight` to be a number >= 0, but got -1."),
        ({"layers": []}, "Expected `layers` to be a list of whole numbers >= 0 or null, but got ()."),
        ({"layers": 3}, "Expected `layers` to be a list of whole numbers >= 0 or null, but got 3."),
        ({"schedule_steps": 0}, "Expected `schedule_steps` to be a whole number >= 1 or null, but got 0."),
        ({"reference": "cached"}, "Expected `reference` to be one of copy, live, but got 'cached'."),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, text):
    with pytest.raises(ConfigError) as caught:
        CircuitBreakersConfig(**settings)
    assert text in caught.value.problems


def test_strength_moves_from_rerouting_to_retaining():
    found = [scheduled_strengths(step, total_steps=150, alpha=10.0) for step in (0, 75, 150, 400)]
    assert [tuple(one) for one in found] == [(10.0, 0.0), (7.5, 2.5), (5.0, 5.0), (5.0, 5.0)]


def test_both_losses_in_double_precision():
    torch.manual_seed(0)
    states = [torch.randn(2, 3, 4).double().requires_grad_() for _ in range(2)]
    start = [torch.randn(2, 3, 4).double() for _ in range(2)]
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    rerouted, held = [], []
    for h, h0 in zip(states, start, strict=True):
        rows = [[(h[b, t].detach(), h0[b, t]) for t in range(length)] for b, length in enumerate((2, 3))]
        cosines = [[max(0.0, float(x @ y / (x.norm() * y.norm()))) for x, y in row] for row in rows]
        norms = [[float((x - y).norm()) for x, y in row] for row in rows]
        rerouted.append(sum(sum(row) / len(row) for row in cosines) / 2)
        held.append(sum(sum(row) / len(row) for row in norms) / 2)
    assert float(reroute_loss(states, start, mask).detach()) == pytest.approx(sum(rerouted) / 2)
    assert float(retain_loss(states, start, mask).detach()) == pytest.approx(sum(held) / 2)
    for loss in (reroute_loss, retain_loss):
        assert torch.autograd.gradcheck(lambda one, loss=loss: loss([one], start[:1], mask), states[0])


def test_what_points_away_is_left_alone_and_no_distance_has_no_gradient():
    h = torch.tensor([[[1.0, 0.0]]], requires_grad=True)
    (away,) = torch.autograd.grad(reroute_loss([h], [-h.detach() + 0.1], torch.ones(1, 1)), h)
    assert away.abs().sum() == 0
    (same,) = torch.autograd.grad(retain_loss([h], [h.detach()], torch.ones(1, 1)), h)
    assert same.abs().sum() == 0
    assert float(token_cosines([h.detach()], [h.detach()], torch.ones(1, 1))[0]) == pytest.approx(1.0)


def test_cosines_fall_and_the_copy_trains_as_the_adapter_switched_off(run):
    live, method = run()
    assert method.reports["cosine"] < 0.999
    assert method.reports["retain_strength"] == pytest.approx(10.0 * (STEPS - 1) / (2 * STEPS))
    copied, other = run(reference="copy", task_weight=1.0)
    same, _ = run(task_weight=1.0)
    torch.testing.assert_close(copied.weights, same.weights, rtol=1e-3, atol=1e-5)
    assert other.effects["stored_numbers"] > 0
    assert not torch.equal(live.weights, same.weights)


def test_full_fine_tuning_needs_the_copy(run):
    with pytest.raises(WiringError, match="Method `circuit_breakers` needs an adapter to switch off"):
        run(model=make_model())
    before = dict(make_model().named_parameters())
    fitted, _ = run(model=make_model(), reference="copy", task_weight=0.5)
    assert all(not torch.equal(p, before[name]) for name, p in fitted.module.model.named_parameters())


def test_a_strength_of_zero_is_plain_training(run):
    method = CircuitBreakers(CircuitBreakersConfig(source="nowhere", weight=0.0))
    method.allow_no_effect = True
    assert torch.equal(trained(run.store, method).weights, trained(run.store).weights)


def test_layers_outside_the_model_are_refused_and_the_default_follows_the_depth(run):
    with pytest.raises(WiringError, match=r"Expected `layers` to be from 0 to 1, but got 2\."):
        run(layers=[2])
    method = CircuitBreakers(CircuitBreakersConfig(source=run.forget))
    method.prepare(make_lora(make_model(layers=32, hidden=8)), make_data(), run.store)
    assert method._layers == (9, 19)


def test_loss_and_gradient_are_those_derived_again(tmp_path, monkeypatch):
    rows = list(derivation.deviations(tmp_path / "case"))
    assert len(rows) == 6
    assert [row.quantity for row in rows if not row.deviation <= row.bound] == []
    monkeypatch.setattr(derivation, "ALPHA", 9.0)
    # The method keeps its own strength.
    monkeypatch.setattr(derivation, "CircuitBreakersConfig", lambda **given: CircuitBreakersConfig(**given | OTHER))
    assert all(row.deviation > row.bound for row in islice(derivation.deviations(tmp_path / "wrong"), 2))
