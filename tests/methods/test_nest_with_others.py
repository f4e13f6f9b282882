"""NeST beside methods that edit or train the same weights: which patch is written, and which rows are held."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from framework.adapters import AdapterSpec, add_adapter
from framework.composition import compose
from framework.errors import WiringError
from framework.method import Method
from framework.parameters import lora_pairs
from framework.weight_edits import digits_of, restore_digits
from framework.weight_files import WeightFiles
from methods.nest.config import NeSTConfig
from methods.nest.method import NeST
from tests.conftest import make_model
from tests.methods.nest.tiny_neurons import make_gpt2, make_neox, make_phi3, prepared
from tests.tiny_runs import make_lora, run_fit

MODELS = {"llama": make_model, "gpt2": make_gpt2, "neox": make_neox, "phi3": make_phi3}
TARGETS = {"llama": ("gate_proj", "up_proj", "q_proj"), "gpt2": ("c_fc",), "neox": ("dense_h_to_4h",)}


class Shifts(Method):
    """Moves every number of the finished model."""

    name = "shifts"

    def __init__(self) -> None:
        super().__init__(None)

    def edit_weights(self, model: nn.Module) -> None:
        for parameter in model.parameters():
            parameter.add_(0.01)


class Nudges(Method):
    """Moves a frozen tensor while training, and edits nothing at the end."""

    name = "nudges"

    def __init__(self) -> None:
        super().__init__(None)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        with torch.no_grad():
            pl_module.model.model.norm.weight.mul_(1.01)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


class Adds(Method):
    """Trains a tensor of its own and leaves it on the model."""

    name = "adds"

    def __init__(self) -> None:
        super().__init__(None)

    def prepare_model(self, model: nn.Module) -> None:
        model.model.norm.own = nn.Parameter(torch.zeros(3))


def frozen():
    return add_adapter(make_model(), AdapterSpec(kind="none"))


def tensors_of(model):
    return (model.float().merge_and_unload() if hasattr(model, "peft_config") else model).state_dict()


def held_parts(method, state, *, is_transposed=False):
    """The selected rows of weights and biases in a state, by name."""
    found = {}
    for one in method._selection.neurons:
        weight = state[f"{one.site.module}.weight"]
        found[f"{one.site.key} weight"] = (weight.T if is_transposed else weight)[list(one.rows)]
        if (bias := state.get(f"{one.site.module}.bias")) is not None:
            found[f"{one.site.key} bias"] = bias[list(one.rows)]
    return found


# ---- the patch -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [Shifts, Nudges, Adds])
def test_no_patch_is_written_when_the_model_is_more_than_start_and_vectors(tmp_path, other):
    model = frozen()
    method, second = prepared(tmp_path, model), other()
    run_fit(model, [method, second], order=["nest", second.name])
    assert method.effects["patches_left_out"] == 1
    method.write_files(tmp_path)
    assert not (tmp_path / "nest.safetensors").exists()


def test_no_patch_is_written_for_a_model_with_a_low_rank_update(tmp_path):
    model = make_lora(make_model())
    method = prepared(tmp_path, model)
    run_fit(model, [method])
    assert method._patch is None
    assert method.effects["patches_left_out"] == 1


@pytest.mark.parametrize("kind", ["none", "lora", "full"])
def test_everything_but_the_selected_rows_leaves_with_the_digits_of_its_file(tmp_path, kind):
    model = make_model().to(torch.bfloat16)
    model = make_lora(model, warm=False) if kind == "lora" else add_adapter(model, AdapterSpec(kind=kind))
    method = prepared(tmp_path, model)
    make_model().save_pretrained(tmp_path / "start")  # more digits than the model in memory was loaded with
    run_fit(model, [method], precision="bf16-mixed")
    state, start = tensors_of(model), make_model().state_dict()
    for key, part in method._patch.parts.items():
        name = f"{part.module}.weight"
        start[name][part.rows] += method._patch.updates(key)
    assert set(state) == set(start)
    assert [name for name in start if not torch.equal(state[name], start[name])] == []


def test_digits_come_back_to_a_widened_model_and_what_moved_is_named(tmp_path):
    make_model().save_pretrained(tmp_path / "start")
    model, files, norm = make_model().to(torch.bfloat16).float(), WeightFiles(tmp_path / "start"), "model.norm.weight"
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    assert restore_digits(model, files) == {norm}
    start = make_model().state_dict()
    start[norm] *= 2
    assert [name for name, value in model.state_dict().items() if not torch.equal(value, start[name])] == []
    value = torch.tensor([0.1, 1e-9])
    assert digits_of(value.half().float(), value) is value
    assert digits_of(moved := value + 1, value) is moved


# ---- held rows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"), [*((name, "full") for name in MODELS), *((name, "lora") for name in TARGETS)]
)
@pytest.mark.parametrize("others", [[], [Shifts]])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
def test_selected_rows_are_held_while_the_rest_moves(tmp_path, name, kind, others):
    start = MODELS[name]()
    spec = AdapterSpec(rank=2, targets=TARGETS[name]) if kind == "lora" else AdapterSpec(kind="full")
    model = add_adapter(MODELS[name](), spec)
    method = prepared(tmp_path, model, train="all_but_neurons", max_rows=5)
    start.save_pretrained(tmp_path / "start")
    methods = [*(other() for other in others), method]
    run_fit(model, methods, order=[m.name for m in methods], learning_rate=1e-2)
    state, before = tensors_of(model), start.state_dict()
    ours, theirs = (held_parts(method, s, is_transposed=name == "gpt2") for s in (state, before))
    assert any("bias" in key for key in ours) == (name in ("gpt2", "neox"))
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    for one in method._selection.neurons:
        weight, old = (s[f"{one.site.module}.weight"] for s in (state, before))
        moved = (weight != old).any(dim=0 if name == "gpt2" else 1)
        free = torch.ones_like(moved)
        free[
            [row for part in method._selection.neurons if part.site.module == one.site.module for row in part.rows]
        ] = 0
        assert moved[free].float().mean() > 0.6
        if kind == "full" and (bias := state.get(f"{one.site.module}.bias")) is not None:
            assert (bias != before[f"{one.site.module}.bias"])[free].float().mean() > 0.6
    assert method.effects["rows_held"] == method._selection.num_rows


@pytest.mark.parametrize("others", [[], [Shifts]])
def test_held_rows_of_a_bfloat16_model_leave_with_the_digits_of_its_file(tmp_path, others):
    model = add_adapter(make_model().to(torch.bfloat16), AdapterSpec(rank=2, targets=TARGETS["llama"]))
    method = prepared(tmp_path, model, train="all_but_neurons", max_rows=5)
    methods = [*(other() for other in others), method]
    run_fit(model, methods, order=[m.name for m in methods], precision="bf16-mixed")
    assert all(bool(pair.B.any()) for pair in lora_pairs(model).values())
    ours, theirs = held_parts(method, tensors_of(model)), held_parts(method, make_model().state_dict())
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


def test_holding_rows_beside_another_edit_needs_an_order_with_nest_last(tmp_path):
    model = add_adapter(make_model(), AdapterSpec(kind="full"))
    method, other = prepared(tmp_path, model, train="all_but_neurons"), Shifts()
    with pytest.raises(WiringError, match=r"both fill `edit_weights`"):
        compose([method, other])
    with pytest.raises(WiringError, match=r"`nest` to come last .* `order: \[shifts, nest\]`"):
        run_fit(model, [method, other], order=["nest", "shifts"])


@pytest.mark.parametrize("train", ["deltas", "deltas+adapter"])
def test_vectors_are_folded_before_other_edits_and_an_order_says_so(tmp_path, train):
    method, other = NeST(NeSTConfig(train=train)), Shifts()
    with pytest.raises(
        WiringError, match=r"`nest` to come first .* got \['shifts', 'nest'\].* `order: \[nest, shifts\]`"
    ):
        compose([method, other], order=["shifts", "nest"])
    assert compose([other, method], order=["nest", "shifts"]) == [method, other]
