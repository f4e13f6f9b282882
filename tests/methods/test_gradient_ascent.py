from __future__ import annotations

from itertools import islice

import pytest
import torch

from experiments.conformance import gradient_ascent as derivation
from framework.errors import ConfigError, DataError, NoEffectError, WiringError
from methods.gradient_ascent import GradientAscent, GradientAscentConfig
from tests.conftest import make_model
from tests.methods.unlearning_runs import make_data, make_store, trained, write_pairs
from tests.tiny_runs import TinyData, flat, make_lora, run_fit


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"bound": 0.0}, "Expected `bound` to be a number > 0, but got 0.0."),
        ({"task_weight": -1}, "Expected `task_weight` to be a number >= 0, but got -1."),
        ({"weight": -0.1}, "Expected `weight` to be a share from 0 to 1, but got -0.1."),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, text):
    with pytest.raises(ConfigError) as caught:
        GradientAscentConfig(**settings)
    assert text in caught.value.problems


def test_the_loss_of_the_forget_rows_rises_and_the_bound_stops_it(tmp_path):
    store, forget = make_store(tmp_path), write_pairs(tmp_path / "forget.jsonl", 4)
    free = GradientAscent(GradientAscentConfig(source=forget))
    held = GradientAscent(GradientAscentConfig(source=forget, bound=1e-3))
    first = trained(store, free)
    model = make_lora(make_model(), warm=False)
    start = flat(model)
    with pytest.raises(
        NoEffectError, match=r"`gradient_ascent` did nothing: its loss term .* rows by does not count\."
    ):
        trained(store, held, model=model)
    # Above the bound nothing has a gradient, and the stage's rows count for nothing.
    assert torch.equal(flat(model), start)
    assert not torch.equal(first.weights, start)
    assert free.reports["forget_loss"] > held.reports["forget_loss"]
    assert held.reports["term"] < -1.0  # the task loss that is taken away
    assert free.effects["forget_rows"] == 4


def test_a_bound_above_some_tokens_has_an_effect(tmp_path):
    store, forget = make_store(tmp_path), write_pairs(tmp_path / "forget.jsonl", 4)
    method = GradientAscent(GradientAscentConfig(source=forget, bound=5.6, weight=0.5))
    trained(store, method)
    assert 0.0 < method.largest_term < 0.5 * 5.6


def test_a_strength_of_zero_is_plain_training(tmp_path):
    method = GradientAscent(GradientAscentConfig(source="nowhere", weight=0.0))
    method.allow_no_effect = True
    store = make_store(tmp_path)
    assert torch.equal(trained(store, method).weights, trained(store).weights)


def test_what_cannot_be_prepared_is_refused(tmp_path):
    with pytest.raises(WiringError, match=r"Method `gradient_ascent` has no forget rows yet\. Call `prepare_methods"):
        run_fit(make_lora(make_model()), [GradientAscent(GradientAscentConfig())], data=TinyData())
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(DataError, match="empty"):
        GradientAscent(GradientAscentConfig(source=str(empty))).prepare(make_model(), make_data(), None)
    with pytest.raises(ConfigError, match=r"Expected `harmful` to be one of .*nowhere"):
        GradientAscent(GradientAscentConfig(source="nowhere")).prepare(make_model(), make_data(), None)


def test_loss_and_gradient_are_those_derived_again(tmp_path, monkeypatch):
    rows = list(derivation.deviations(tmp_path / "case"))
    assert len(rows) == 4
    assert all(row.deviation <= row.bound == 1e-5 for row in rows)
    monkeypatch.setattr(derivation, "reply_losses", lambda model, rows: [torch.ones(3).double().requires_grad_()])
    assert any(row.deviation > row.bound for row in islice(derivation.deviations(tmp_path / "wrong"), 2))
