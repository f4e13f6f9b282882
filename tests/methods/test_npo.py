from __future__ import annotations

from itertools import islice

import pytest
import torch

from experiments.conformance import npo as derivation
from framework.errors import ConfigError, WiringError
from methods.npo import NPO, NPOConfig, npo_loss, row_sums
from tests.conftest import make_model
from tests.methods.unlearning_runs import make_store, trained, write_pairs


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"beta": 0.0}, "Expected `beta` to be a number > 0, but got 0.0."),
        ({"alpha": -1}, "Expected `alpha` to be a number >= 0, but got -1."),
        ({"reference": "copy"}, "Expected `reference` to be one of cached, live, but got 'copy'."),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, text):
    with pytest.raises(ConfigError) as caught:
        NPOConfig(**settings)
    assert text in caught.value.problems


def test_the_loss_is_that_of_the_paper():
    torch.manual_seed(0)
    ours, theirs = torch.randn(5).double().requires_grad_(), torch.randn(5).double()
    odds = (theirs - ours).exp()  # p / p_start
    expected = (2 / 0.3) * torch.log(1 + odds**0.3).mean()
    torch.testing.assert_close(npo_loss(ours, theirs, beta=0.3), expected)
    assert torch.autograd.gradcheck(lambda nll: npo_loss(nll, theirs, beta=0.3), ours)


def test_it_begins_as_gradient_ascent_and_ends():
    nll = torch.tensor([3.0, 500.0], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(npo_loss(nll, torch.tensor([3.0, 3.0]).double(), beta=0.1), nll)
    # At the start minus one half of a row each; a forgotten reply is left alone.
    assert gradient.tolist() == pytest.approx([-0.5, 0.0], abs=1e-12)
    (small,) = torch.autograd.grad(npo_loss(nll, torch.tensor([2.0, 490.0]).double(), beta=1e-9), nll)
    assert small.tolist() == pytest.approx([-0.5, -0.5])


def test_sums_of_rows():
    values, rows = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1, 0, 1])
    assert row_sums(values, rows, num_rows=2).tolist() == [2.0, 5.0]


def test_cached_and_live_references_train_alike(tmp_path):
    store, forget = make_store(tmp_path), write_pairs(tmp_path / "forget.jsonl", 4)
    cached, live = (NPO(NPOConfig(source=forget, reference=kind)) for kind in ("cached", "live"))
    torch.testing.assert_close(trained(store, cached).weights, trained(store, live).weights, rtol=1e-4, atol=1e-6)
    assert cached.effects["stored_bytes"] > 0
    assert cached.reports["log_ratio"] < 0
    with pytest.raises(WiringError, match="Method `npo` needs an adapter to switch off for its live reference"):
        trained(store, NPO(NPOConfig(source=forget, reference="live")), model=make_model())


def test_a_strength_of_zero_is_plain_training(tmp_path):
    method = NPO(NPOConfig(source="nowhere", weight=0.0))
    method.allow_no_effect = True
    store = make_store(tmp_path)
    assert torch.equal(trained(store, method).weights, trained(store).weights)
    assert not store.artifacts.root.exists()


def test_loss_and_gradient_are_those_derived_again(tmp_path, monkeypatch):
    rows = list(derivation.deviations(tmp_path / "case"))
    assert len(rows) == 8
    assert all(row.deviation <= row.bound == 1e-5 for row in rows)
    monkeypatch.setattr(derivation, "task_loss", lambda case: torch.zeros((), dtype=torch.float64))
    assert all(row.deviation > row.bound for row in islice(derivation.deviations(tmp_path / "wrong"), 2))
