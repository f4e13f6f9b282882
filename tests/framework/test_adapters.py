import copy

import pytest
import torch
from transformers import LlamaForCausalLM

from framework.adapters import AdapterSpec, add_adapter, linear_module_names, merge_adapter
from framework.errors import ConfigError, TrainingError, WiringError

IDS = torch.tensor([[5, 6, 7, 8, 9]])


def _randomise_pairs(model: torch.nn.Module, scale: float) -> None:
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter) * scale


def _trainable(model: torch.nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def test_lora_trains_only_float32_pairs_on_a_bfloat16_model(tiny_model):
    model = add_adapter(tiny_model.bfloat16(), AdapterSpec(rank=4, alpha=8, targets=("q_proj", "v_proj")))
    trained = _trainable(model)
    assert len(trained) == 2 * 2 * 2
    assert all("lora_" in name for name in trained)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert all(dtype == (torch.float32 if "lora_" in name else torch.bfloat16) for name, dtype in dtypes.items())


def test_lora_starts_as_the_same_function(tiny_model):
    with torch.no_grad():
        before = tiny_model(IDS).logits
        after = add_adapter(tiny_model, AdapterSpec(targets="all-linear"))(IDS).logits
    assert torch.equal(before, after)


def test_all_linear_leaves_the_output_head_out(tiny_model):
    names = linear_module_names(tiny_model)
    assert names == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    model = add_adapter(tiny_model, AdapterSpec(targets=("all-linear",)))
    assert len(_trainable(model)) == 2 * 2 * len(names)


def test_full_makes_everything_float32_and_trainable(tiny_model):
    model = add_adapter(tiny_model.bfloat16(), AdapterSpec(kind="full"))
    assert model is tiny_model
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    assert model.config.dtype == torch.float32


def test_none_freezes_everything(tiny_model):
    assert _trainable(add_adapter(tiny_model, AdapterSpec(kind="none"))) == []


def test_a_target_that_matches_nothing_is_refused_with_what_there_is(tiny_model):
    with pytest.raises(WiringError, match=r"match a linear module, but got \['qproj'\].*q_proj"):
        add_adapter(tiny_model, AdapterSpec(targets=("qproj", "v_proj")))


def test_a_model_without_linear_modules_is_refused():
    with pytest.raises(WiringError, match="to hold linear modules for LoRA"):
        add_adapter(torch.nn.Embedding(4, 2), AdapterSpec())


def test_a_second_adapter_is_refused(tiny_model):
    model = add_adapter(tiny_model, AdapterSpec())
    with pytest.raises(WiringError, match="to be a plain model, but got one that carries an adapter"):
        add_adapter(model, AdapterSpec())


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), "all-linear"])
def test_merged_model_equals_the_adapted_one_under_the_original_names(tiny_model, targets):
    keys = set(tiny_model.state_dict())
    model = add_adapter(tiny_model, AdapterSpec(rank=4, targets=targets)).eval()
    _randomise_pairs(model, 0.1)
    with torch.no_grad():
        expected = model(IDS).logits
        merged = merge_adapter(model)
        assert isinstance(merged, LlamaForCausalLM)
        assert set(merged.state_dict()) == keys
        torch.testing.assert_close(merged(IDS).logits, expected, atol=1e-5, rtol=1e-5)
    assert all(p.requires_grad for p in merged.parameters())


def test_merging_a_bfloat16_model_keeps_the_whole_update(tiny_model):
    base = copy.deepcopy(tiny_model).bfloat16()
    start = base.model.layers[0].self_attn.q_proj.weight.detach().float()
    model = add_adapter(base, AdapterSpec(rank=2, alpha=4, targets=("q_proj",)))
    _randomise_pairs(model, 1e-3)  # an update this small is lost when it is added in bfloat16
    pair = model.base_model.model.model.layers[0].self_attn.q_proj
    update = 2 * pair.lora_B["default"].weight.detach() @ pair.lora_A["default"].weight.detach()
    merged = merge_adapter(model)
    weight = merged.model.layers[0].self_attn.q_proj.weight.detach()
    assert weight.dtype == torch.float32
    assert merged.config.dtype == torch.float32
    torch.testing.assert_close(weight - start, update, atol=1e-8, rtol=1e-2)
    in_bfloat16 = (start.bfloat16() + update.bfloat16()).float() - start
    assert (in_bfloat16 - update).norm() > 0.1 * update.norm()


def test_merging_a_plain_model_only_widens_it(tiny_model):
    tiny_model.bfloat16().requires_grad_(False)
    merged = merge_adapter(tiny_model)
    assert merged is tiny_model
    assert all(p.requires_grad and p.dtype == torch.float32 for p in merged.parameters())


def test_merging_a_pair_that_is_not_a_number_is_refused(tiny_model):
    model = add_adapter(tiny_model, AdapterSpec(targets=("q_proj",)))
    _randomise_pairs(model, float("nan"))
    with pytest.raises(TrainingError, match="merged weights to be finite"):
        merge_adapter(model)


def test_every_problem_of_a_spec_is_listed():
    with pytest.raises(ConfigError) as caught:
        AdapterSpec(kind="lorra", rank=0, alpha=-1, dropout=1.0, targets=())
    assert len(caught.value.problems) == 5
    for name in ("kind", "rank", "alpha", "dropout", "targets"):
        assert f"`adapter.{name}` to" in str(caught.value)


def test_one_target_may_be_written_without_a_list():
    assert AdapterSpec(targets="q_proj").targets == ("q_proj",)
    assert AdapterSpec(targets=["q_proj", "v_proj"]).targets == ("q_proj", "v_proj")
