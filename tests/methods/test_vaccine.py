from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from datamodules.finetune import FineTuneDataModule
from experiments.contract.tiny import task_examples
from framework.chat import ChatEncoder
from framework.errors import ConfigError, NoEffectError, WiringError
from framework.module import FineTuneModule
from methods.vaccine import Vaccine, VaccineConfig, _gradients, attention_blocks, scaled_shifts, square_norm
from tests.conftest import make_model, make_tokenizer
from tests.tiny_runs import TinyData, make_batch, make_lora, relative, run_fit
from tests.tiny_vision import make_image_text_model


def train(*, micro_batch_size=4, rho=2.0, data=None, model=None, **options):
    method = Vaccine(VaccineConfig(rho=rho))
    if data is None:
        data = FineTuneDataModule(
            ChatEncoder(make_tokenizer()), batch_size=4, micro_batch_size=micro_batch_size, total_steps=2, max_length=99
        )
        data.add_source("task", task_examples(8))
        options["accumulate_grad_batches"] = 4 // micro_batch_size
    return run_fit(model or make_lora(make_model()), [method], data=data, total_steps=2, **options), method


def test_shifts_have_the_norm_together():
    gradients = [torch.randn(2, 3, 4), torch.randn(2, 3, 4)]
    norm = float(square_norm(gradients).sqrt())
    assert float(square_norm(scaled_shifts(gradients, norm, rho=3.0)).sqrt()) == pytest.approx(3.0, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "blocks"), [("layers.3.self_attn", 1), ("h.0.attn", 1), ("attn", 0), ("layers.x.self_attn", 0)]
)
def test_attention_blocks_are_found_by_name(name, blocks):
    model = nn.Module()
    here: nn.Module = model
    for part in ["model", *name.split(".")]:
        child = nn.Module()
        here.add_module(part, child)
        here = child
    if blocks:
        assert attention_blocks(model) == [here]
    else:
        with pytest.raises(WiringError, match="attention blocks in numbered layers, named like"):
            attention_blocks(model)


def test_the_step_is_the_same_however_it_is_cut():
    (whole, method), (cut, _) = train(), train(micro_batch_size=1)
    assert relative(cut.gradients[0], whole.gradients[0]) < 1e-6
    assert relative(cut.weights, whole.weights) < 1e-6
    assert method.effects["modules_matched"] == 2
    assert method.reports["gradient_norm"] > 0


def test_the_shifted_loss_is_higher_and_no_hook_stays():
    run, method = train()
    assert method.reports["term"] > 0
    assert not any(module._forward_hooks for module in run.module.model.modules())


def test_gradients_keep_their_direction_in_half_precision():
    model, batch = make_lora(make_model()), replace(make_batch(8), step_reply_tokens=8000)

    def direction(*, is_half):
        with torch.autocast("cpu", dtype=torch.float16, enabled=is_half):
            found = _gradients(model, attention_blocks(model), batch)
        return torch.cat([gradient.double().flatten() for gradient in found])

    half, full = direction(is_half=True), direction(is_half=False)
    assert relative(half / half.norm(), full / full.norm()) < 2e-3


def test_micro_batches_need_a_data_module_that_shows_a_step():
    with pytest.raises(WiringError, match="must see a whole step before its first micro-batch, but TinyData has no"):
        train(data=TinyData(micro_batches=2))


def test_layers_below_the_first_trained_one_are_shifted_too():
    model = make_model().requires_grad_(False)
    model.model.layers[1].requires_grad_(True)
    run, method = train(model=model, data=TinyData(steps=1))
    assert method.effects["modules_matched"] == 2
    assert run.gradients[0].norm() > 0


def test_gradient_checkpointing_is_refused():
    module = FineTuneModule(make_model().train(), learning_rate=1e-3, total_steps=1, gradient_checkpointing=True)
    with pytest.raises(WiringError, match="gradient checkpointing would compute them again without the shifts"):
        train(module=module, data=TinyData(steps=1))


def test_a_norm_of_zero_did_nothing():
    with pytest.raises(NoEffectError, match="Method `vaccine` did nothing"):
        train(rho=0.0, data=TinyData(steps=1))


@pytest.mark.parametrize("rho", [-1, "2", True, float("inf")])
def test_a_norm_that_is_none_is_refused(rho):
    with pytest.raises(ConfigError, match="Expected `rho` to be a number >= 0, but got"):
        VaccineConfig(rho=rho)


def test_attention_blocks_of_a_vision_tower_do_not_count():
    model = make_image_text_model()
    assert attention_blocks(model) == [layer.self_attn for layer in model.model.language_model.layers]
