from __future__ import annotations

from itertools import islice

import pytest
import torch

from experiments.conformance import grad_diff as derivation
from framework.errors import ConfigError
from methods.grad_diff import GradDiff, GradDiffConfig
from tests.methods.unlearning_runs import make_store, trained, write_pairs


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"gamma": 0}, "Expected `gamma` to be a number > 0, but got 0."),
        ({"alpha": -1.0}, "Expected `alpha` to be a number >= 0, but got -1.0."),
        ({"retain": ""}, "Expected `retain` to be a set's name or a file, but got ''."),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, text):
    with pytest.raises(ConfigError) as caught:
        GradDiffConfig(**settings)
    assert text in caught.value.problems


def test_forget_rows_lose_and_retain_rows_gain(tmp_path):
    store, forget = make_store(tmp_path), write_pairs(tmp_path / "forget.jsonl", 4)
    retain = write_pairs(tmp_path / "retain.jsonl", 4, reply="Apples, pears")
    plain = trained(store)
    both = GradDiff(GradDiffConfig(source=forget, retain=retain))
    assert not torch.equal(trained(store, both).weights, plain.weights)
    only = GradDiff(GradDiffConfig(source=forget, retain=retain, alpha=0.0))
    trained(store, only)
    assert "retain_loss" not in only.reports
    assert both.reports["forget_loss"] > both.reports["retain_loss"]


def test_a_strength_of_zero_is_plain_training(tmp_path):
    method = GradDiff(GradDiffConfig(source="nowhere", weight=0.0))
    method.allow_no_effect = True
    store = make_store(tmp_path)
    assert torch.equal(trained(store, method).weights, trained(store).weights)


def test_loss_and_gradient_are_those_derived_again(tmp_path, monkeypatch):
    rows = list(derivation.deviations(tmp_path / "case"))
    assert [row.quantity for row in rows][::2] == [
        "loss, the stage's rows retained",
        "loss, rows of their own retained",
    ]
    assert all(row.deviation <= row.bound == 1e-5 for row in rows)
    monkeypatch.setattr(derivation, "mean_of_rows", lambda losses: torch.cat(losses).mean())
    assert all(row.deviation > row.bound for row in islice(derivation.deviations(tmp_path / "wrong"), 2))
