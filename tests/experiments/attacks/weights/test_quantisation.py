"""Quantisation: error bounds of every format, and models that any tool reads."""

from __future__ import annotations

import pytest
import torch

from experiments.attacks.registry import create_attack
from experiments.attacks.weights.quantisation import NF4, quantise_model, quantised
from experiments.contract.tiny import make_model
from framework.errors import ConfigError, WiringError
from framework.weight_files import linear_weights
from tests.experiments.attacks.tiny_targets import make_target, weights


@pytest.fixture
def weight():
    return torch.randn(7, 50, generator=torch.Generator().manual_seed(0))


def test_int8_is_within_half_a_step_of_every_row(weight):
    step = weight.abs().amax(dim=1, keepdim=True) / 127
    error = (quantised(weight, "int8") - weight).abs()
    assert bool((error <= step / 2 * (1 + 1e-5)).all())
    assert float(error.max()) > 0
    assert int(torch.unique(quantised(weight[:1], "int8")).numel()) <= 255


def test_int4_is_within_half_a_step_of_every_group(weight):
    found = quantised(weight, "int4", group=16)
    for start in range(0, 50, 16):
        part = weight[:, start : start + 16]
        step = (part.amax(dim=1, keepdim=True) - part.amin(dim=1, keepdim=True)) / 15
        assert bool(((found[:, start : start + 16] - part).abs() <= step / 2 * (1 + 1e-5) + 1e-7).all())
        assert all(torch.unique(row).numel() <= 16 for row in found[:, start : start + 16])


def test_nf4_takes_the_nearest_of_the_sixteen_values(weight):
    values = torch.tensor(NF4)
    found = quantised(weight, "nf4", group=25)
    for start in (0, 25):
        part = weight[:, start : start + 25]
        scale = part.abs().amax(dim=1, keepdim=True)
        nearest = values[((part / scale)[..., None] - values).abs().argmin(dim=-1)] * scale
        assert torch.allclose(found[:, start : start + 25], nearest, atol=1e-6)


@pytest.mark.parametrize("kind", ["int8", "int4", "nf4"])
def test_zeros_and_what_is_on_the_grid_stay(kind):
    assert torch.equal(quantised(torch.zeros(2, 5), kind, group=4), torch.zeros(2, 5))
    once = quantised(torch.randn(3, 9, generator=torch.Generator().manual_seed(1)), kind, group=4)
    assert torch.allclose(quantised(once, kind, group=4), once, atol=1e-6)


def test_every_linear_weight_but_the_head_is_rounded_in_a_folder_of_its_own(tmp_path):
    target = make_target(tmp_path / "target")
    attack = create_attack("quantisation", {"formats": ["int8", "nf4"], "group": 16})
    assert attack.num_models == 2
    assert attack.missing(target) is None
    before, errors = weights(target.folder), []
    for made in attack.make(target, tmp_path / "work"):
        changed = [n for n, w in weights(made.folder).items() if not torch.equal(w, before[n])]
        assert sorted(changed) == sorted(f"{name}.weight" for name in linear_weights(make_model()))
        assert made.facts["matrices"] == len(changed)
        errors.append(made.facts["relative_error"])
    assert 0 < errors[0] < 0.01 < errors[1] < 0.2


def test_a_model_without_linear_weights_is_refused():
    with pytest.raises(WiringError, match="hold linear modules to quantise, but got none"):
        quantise_model(torch.nn.Sequential(torch.nn.Embedding(2, 2)), "int8", group=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"formats": ["int2"]}, "one of int8, int4, nf4, but got 'int2'"),
        ({"formats": []}, "`formats` to hold at least one value"),
        ({"group": 1}, "a whole number ≥ 2, but got 1"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        create_attack("quantisation", settings)


def test_a_model_that_was_quantised_before_is_refused(tmp_path):
    model = make_model()
    quantise_model(model, "int8", group=64)
    made = create_attack("quantisation", {"formats": ["int8"]}).make(make_target(tmp_path / "target", model), tmp_path)
    with pytest.raises(WiringError, match="`quantisation int8` to change the model, but every "):
        next(made)
