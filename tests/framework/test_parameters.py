from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from framework.parameters import (
    checksum,
    clean_name,
    count_parameters,
    freeze,
    lora_pairs,
    nonfinite_names,
    trainable_names,
)
from tests.conftest import make_model
from tests.tiny_runs import make_lora

PLAIN = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    "name",
    [
        PLAIN,
        f"module.{PLAIN}",
        f"_orig_mod.{PLAIN}",
        f"module.base_model.model.{PLAIN}",
        "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight",
        "_forward_module.model.layers.0._fsdp_wrapped_module.self_attn.q_proj.weight",
        "model.layers.0._orig_mod.self_attn._orig_mod.q_proj.weight",
    ],
)
def test_wrappers_are_taken_off_a_name(name):
    assert clean_name(name) == PLAIN


def test_only_whole_parts_of_a_name_are_wrappers():
    assert clean_name("my_module.weight") == "my_module.weight"
    assert clean_name("model.base_layers.weight") == "model.base_layers.weight"


def test_names_of_a_peft_model_are_those_of_the_plain_model():
    plain = {name for name, _ in make_model().named_parameters()}
    wrapped = {clean_name(name) for name, _ in make_lora(make_model()).named_parameters()}
    assert plain < wrapped
    assert all("lora_" in name for name in wrapped - plain)


def test_freezing_counts_what_was_trainable_and_leaves_the_rest():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].bias.requires_grad_(False)
    assert freeze(model, ["0.weight", "0.bias", "nothing"]) == 1
    assert trainable_names(model) == {"1.weight", "1.bias"}


def test_shared_tensors_count_once():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    assert count_parameters(model) == (9, 9)
    freeze(model, ["0.weight"])
    assert count_parameters(model) == (0, 9)


def test_weights_that_are_not_finite_are_named_when_they_train():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert nonfinite_names(model) == []
    with torch.no_grad():
        model[0].weight[0, 0] = torch.inf
        model[1].bias[1] = torch.nan
    freeze(model, ["0.weight"])
    assert nonfinite_names(model) == ["1.bias"]


def test_lora_pairs_give_the_update_of_each_module():
    model = make_lora(make_model(), rank=4)
    pairs = lora_pairs(model)
    assert set(pairs) == {f"model.layers.{i}.self_attn.{m}" for i in (0, 1) for m in ("q_proj", "v_proj")}
    pair = pairs["model.layers.1.self_attn.v_proj"]
    assert pair.A.shape == (4, 32)
    assert pair.B.shape == (16, 4)
    assert pair.scale == 8.0 / 4
    before = pair.weight.clone()
    merged = model.merge_and_unload().get_submodule("model.layers.1.self_attn.v_proj").weight
    torch.testing.assert_close(merged - before, (pair.scale * pair.B @ pair.A).detach())


def test_lora_pairs_are_found_below_further_wrapping_and_by_adapter():
    model = make_lora(make_model())
    assert set(lora_pairs(nn.ModuleDict({"module": model}))) == set(lora_pairs(model))
    assert lora_pairs(model, adapter="other") == {}
    assert lora_pairs(make_model()) == {}


def test_a_weight_stored_transposed_is_shown_as_out_in():
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2}
    plain = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=1))
    config = LoraConfig(target_modules=["c_attn"], r=2, fan_in_fan_out=True, init_lora_weights=False)
    pair = lora_pairs(get_peft_model(plain, config))["transformer.h.0.attn.c_attn"]
    assert pair.is_transposed
    assert pair.weight.shape == (24, 8) == (pair.B.shape[0], pair.A.shape[1])
    assert not lora_pairs(make_lora(make_model()))["model.layers.0.self_attn.q_proj"].is_transposed


def test_a_checksum_changes_with_any_value():
    tensors = [torch.arange(4.0), torch.ones(2, 2, dtype=torch.bfloat16), torch.tensor([3])]
    assert checksum(tensors) == ((6.0, 14.0), (4.0, 4.0), (3.0, 9.0))
    before = checksum(tensors)
    tensors[0][2] += 1e-6
    assert checksum(tensors) != before
    assert checksum([]) == ()


def test_a_checksum_that_is_not_a_number_equals_itself():
    tensors = [torch.tensor([1.0, torch.nan]), torch.ones(2)]
    before = checksum(tensors)
    assert checksum(tensors) == before
    assert not {*enumerate(checksum(tensors))} ^ {*enumerate(before)}
    tensors[1][0] = 2.0
    assert checksum(tensors) != before
    tensors[1][0], tensors[0][1] = 1.0, 3.0
    assert checksum(tensors) != before
