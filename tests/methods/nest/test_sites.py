from __future__ import annotations

import pytest
import torch
from torch import nn

from framework.errors import WiringError
from methods.nest.sites import find_projections, find_sites
from tests.conftest import make_model
from tests.methods.nest.tiny_neurons import make_gpt2, make_neox, make_phi3
from tests.tiny_runs import make_lora


def keys(model, **options):
    return [(site.module, site.kind, site.start, site.stop) for site in find_sites(find_projections(model), **options)]


def test_gate_and_up_of_a_llama():
    assert keys(make_model()) == [
        (f"model.layers.{layer}.mlp.{kind}_proj", kind, 0, 64) for layer in (0, 1) for kind in ("gate", "up")
    ]
    assert [kind for _, kind, *_ in keys(make_model(), kinds=("gate",))] == ["gate", "gate"]


def test_a_fused_projection_is_two_sites():
    assert keys(make_phi3())[:2] == [
        ("model.layers.0.mlp.gate_up_proj", "gate", 0, 32),
        ("model.layers.0.mlp.gate_up_proj", "up", 32, 64),
    ]


@pytest.mark.parametrize(
    ("make", "name", "rows", "is_transposed"),
    [(make_gpt2, "c_fc", 64, True), (make_neox, "dense_h_to_4h", 32, False)],
)
def test_a_plain_mlp_counts_as_up(make, name, rows, is_transposed):
    projections = find_projections(make())
    assert {one.name.rpartition(".")[2] for one in projections.values()} == {name}
    assert all(
        one.is_transposed == is_transposed and one.num_rows == rows and one.width == 16 for one in projections.values()
    )
    assert {site.kind for site in find_sites(projections)} == {"up"}
    with pytest.raises(
        WiringError, match=r"`projections` to be a kind the model has, but got gate: its MLPs have no gate"
    ):
        find_sites(projections, kinds=("gate",))


def test_adapter_layers_are_called_and_base_weights_folded_into():
    model = make_lora(make_model())
    wrapped = find_projections(model)
    assert sorted(wrapped) == sorted(find_projections(make_model()))
    assert all(one.weight.shape == (64, 32) for one in wrapped.values())


def test_other_names_are_taken_when_they_are_given():
    model = make_model()
    for layer in model.model.layers:
        layer.mlp.inner = layer.mlp.down_proj
    assert len(find_projections(model, ["down_proj"])) == 6


def test_a_model_without_mlps_is_refused():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(2, 2)])

    with pytest.raises(WiringError, match=r"needs MLP projections in numbered layers, .* but the model has none"):
        find_projections(Bare())


@pytest.mark.parametrize("weight", [torch.zeros(8, 4, dtype=torch.uint8), torch.zeros(8, 4, dtype=torch.int8), None])
def test_packed_weights_are_refused(weight):
    model = make_model()
    projection = model.model.layers[0].mlp.gate_proj
    del projection.weight
    if weight is not None:
        projection.weight = nn.Parameter(weight, requires_grad=False)
    with pytest.raises(
        WiringError, match=r"1 projections \(`model.layers.0.mlp.gate_proj` first\) hold packed numbers"
    ):
        find_projections(model)


def test_experts_are_left_out():
    model = make_model()
    model.model.layers[0].mlp.experts = nn.ModuleList([nn.ModuleDict({"gate_proj": nn.Linear(2, 2)})])
    assert not [name for name in find_projections(model) if "experts" in name]
