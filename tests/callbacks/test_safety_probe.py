from __future__ import annotations

import math

import pytest
import torch

from callbacks.guard_decisions import decide
from callbacks.safety_probe import SafetyProbe, direction_cosine, mean_divergence, refusal_direction, separation
from framework.chat import ChatEncoder
from framework.errors import DataError
from framework.evaluation.margin import refusal_margin
from framework.examples import Prompt
from framework.guard_settings import GUARD_METRICS, GuardSettings
from tests.conftest import make_model, make_tokenizer

HARMFUL = [Prompt(f"h{i}", f"harm number {'x' * i} {i}", "harmful") for i in range(4)]
BENIGN = [Prompt(f"b{i}", f"kill a process {i}", "benign") for i in range(5)]


@pytest.fixture(scope="module")
def encoder():
    return ChatEncoder(make_tokenizer())


@pytest.fixture(scope="module")
def probe(encoder):
    return SafetyProbe(encoder, HARMFUL, BENIGN)


def last_states(model, encoder, prompts, layer):
    """One prompt at a time, without padding."""
    rows = []
    for prompt in prompts:
        ids = torch.tensor([encoder.encode_prompt(prompt.messages)])
        rows.append(model(ids, output_hidden_states=True).hidden_states[layer][0, -1])
    return torch.stack(rows)


def test_the_direction_is_the_difference_of_means_on_every_second_prompt(probe, encoder):
    model = make_model()
    with torch.no_grad():
        harmful, benign = (last_states(model, encoder, p[::2], 1) for p in (HARMFUL, BENIGN))
    expected = (harmful.mean(0) - benign.mean(0)) / (harmful.mean(0) - benign.mean(0)).norm()
    torch.testing.assert_close(probe.start(model).direction, expected, rtol=1e-4, atol=1e-5)


def test_at_the_start_nothing_has_turned_or_diverged(probe, encoder):
    model = make_model()
    found = probe.measure(model, probe.start(model))
    assert found["direction_cosine"] == pytest.approx(1.0, abs=1e-5)
    assert found["kl_to_start"] == pytest.approx(0.0, abs=1e-6)
    assert found["refusal_margin"] == refusal_margin(model, encoder, HARMFUL, batch_size=4).mean
    assert 0.0 <= found["direction_auroc"] <= 1.0


def test_another_model_has_turned_and_diverged(probe):
    start = probe.start(make_model())
    found = probe.measure(make_model(seed=3), start)
    assert found["direction_cosine"] < 0.9
    assert found["kl_to_start"] > 0.0


def test_a_broken_model_is_measured_as_not_finite_so_that_a_guard_can_act(probe):
    start, model = probe.start(make_model()), make_model()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    found = probe.measure(model, start)
    assert {name: math.isfinite(value) for name, value in found.items()} == dict.fromkeys(GUARD_METRICS, False)
    for threshold in (
        {"min_refusal_margin": 0.0},
        {"min_direction_auroc": 0.1},
        {"min_direction_cosine": 0.1},
        {"max_kl": 9},
    ):
        settings = GuardSettings(action="roll_back", **threshold)
        assert decide(settings, found, roll_backs=0, weight=None, low=None).kind == "roll_back"


def test_measuring_leaves_the_model_and_random_numbers_alone(probe):
    model = make_model().train()
    model.model.layers[0].eval()
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    probe.measure(model, probe.start(model))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training
    assert not model.model.layers[0].training


def test_separation_is_the_share_of_ordered_pairs():
    direction = torch.tensor([1.0, 0.0])
    harmful, benign = torch.tensor([[3.0, 9.0], [1.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 5.0]])
    assert separation(direction, harmful, benign) == 0.75
    assert separation(-direction, harmful, benign) == 0.25


def test_directions_and_divergence_by_hand():
    a = refusal_direction(torch.tensor([[1.0, 1.0]]), torch.tensor([[0.0, 1.0]]))
    b = refusal_direction(torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 0.0]]))
    assert (direction_cosine(a, a), direction_cosine(a, b), direction_cosine(a, -a)) == (1.0, 0.0, -1.0)
    even, skewed = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    assert mean_divergence(even, skewed) == pytest.approx(0.143841, abs=1e-5)


def test_what_cannot_be_measured_is_refused(encoder):
    with pytest.raises(DataError, match="at least 4 harmful and 4 harmless prompts to measure on, but got 3 and 5"):
        SafetyProbe(encoder, HARMFUL[:3], BENIGN)
    with pytest.raises(DataError, match="to separate, but got one kind: all 2 labels are positive"):
        separation(torch.ones(3), torch.ones(2, 3), torch.ones(0, 3))
    with pytest.raises(DataError, match="to differ in their hidden states, but got the same mean"):
        refusal_direction(torch.ones(2, 3), torch.ones(4, 3))
