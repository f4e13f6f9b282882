from __future__ import annotations

import pytest
import torch

from datamodules.finetune import FineTuneDataModule
from framework.chat import ChatEncoder
from framework.composition import prepare_methods
from framework.errors import ConfigError, WiringError
from framework.examples import Example, Turn
from methods.sppft import SPPFT, SPPFTConfig, _last_states, layer_gaps, safety_layers
from tests.conftest import make_tokenizer
from tests.methods.asft.aligned_pair import make_aligned
from tests.tiny_runs import make_lora, run_fit
from tests.tiny_vision import make_image_text_model


def prompts(texts, reply="ok"):
    return [Example(f"row-{i}", (Turn("user", text),), reply) for i, text in enumerate(texts)]


class Prompts(FineTuneDataModule):
    """A data module with prompts of its own."""

    def __init__(self, benign, safety):
        super().__init__(ChatEncoder(make_tokenizer()), batch_size=4, total_steps=2, max_length=200)
        self.sets = {"benign": prompts(benign), "safety": prompts(safety)}

    def find_examples(self, kind, name_or_path):
        return self.sets[kind]


@pytest.fixture
def data():
    return Prompts([f"list {i} fruits" for i in range(4)], [f"DO HARM {i}" for i in range(4)])


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"safety": ""}, "Expected `safety` to be a set's name or a file, but got ''."),
        ({"benign": 1}, "Expected `benign` to be a set's name or a file, but got 1."),
        ({"count": 1}, "Expected `count` to be a whole number >= 2, but got 1."),
        ({"onset": 0}, "with 0 < onset <= plateau <= 1, but got 0 and 0.9."),
        ({"onset": 0.95}, "with 0 < onset <= plateau <= 1, but got 0.95 and 0.9."),
        ({"plateau": "high"}, "with 0 < onset <= plateau <= 1, but got 0.1 and 'high'."),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, text):
    with pytest.raises(ConfigError) as caught:
        SPPFTConfig(**settings)
    assert any(text in problem for problem in caught.value.problems), caught.value.problems


def test_the_gap_is_the_difference_of_mean_angles():
    along, across, between = [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]
    ordinary = torch.tensor([[along, along], [along, between]])
    harmful = torch.tensor([[across, along], [between, along]])
    # layer 0: 90 and 45 degrees against 0 and 0; layer 1: 0 and 45 against 45 and 45
    torch.testing.assert_close(layer_gaps(ordinary, harmful), torch.tensor([67.5, -22.5]), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("gaps", "onset", "plateau", "chosen"),
    [
        ([0.0, 1.0, 5.0, 10.0, 9.0], 0.1, 0.9, [1, 2, 3]),
        ([0.0, 1.0, 5.0, 10.0, 9.0], 0.2, 0.5, [2]),
        ([10.0, 1.0], 0.1, 0.9, [0]),
        ([1.0, 10.0], 1.0, 1.0, [1]),
    ],
)
def test_the_layers_are_those_in_which_the_gap_grows(gaps, onset, plateau, chosen):
    assert list(safety_layers(torch.tensor(gaps), onset=onset, plateau=plateau)) == chosen


def test_prompts_that_no_layer_tells_apart_are_refused():
    with pytest.raises(WiringError, match=r"ordinary prompts, but the largest gap is -1\.00 degrees"):
        safety_layers(torch.tensor([-3.0, -1.0]), onset=0.1, plateau=0.9)


def test_a_run_leaves_the_chosen_layer_where_it_was(store, data):
    model = make_lora(make_aligned())
    method = SPPFT(SPPFTConfig(onset=1.0, plateau=1.0))
    prepare_methods([method], model, data, store)
    (chosen,) = method._found["layers"]
    run = run_fit(model, [method])
    before = make_lora(make_aligned())
    for name, parameter in before.named_parameters():
        if "lora_B" in name:
            moved = not torch.equal(run.module.model.get_parameter(name), parameter)
            assert moved == (f"layers.{chosen}." not in name)
    assert method.reports["first_layer"] == method.reports["last_layer"] == chosen
    assert method.reports["largest_gap"] == max(method._found["gaps"]) > 0


def test_the_scan_is_stored_once_and_leaves_the_model_alone(store, data):
    model = make_lora(make_aligned()).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(2):
        prepare_methods([SPPFT(SPPFTConfig(onset=1.0, plateau=1.0))], model, data, store)
    assert len(list(store.artifacts.root.glob("safety_layers/*/layers.json"))) == 1
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_what_cannot_be_scanned_is_refused(store, data):
    method = SPPFT(SPPFTConfig())
    with pytest.raises(WiringError, match="needs the stage's data module for its prompts, but got none"):
        prepare_methods([method], make_aligned(), None, store)
    with pytest.raises(WiringError, match="Expected at least 2 prompts of each kind, but got 1"):
        prepare_methods([method], make_aligned(), Prompts(["a"], ["b", "c"]), store)
    with pytest.raises(WiringError, match="needs numbered layers, but no module of the model is one"):
        prepare_methods([method], torch.nn.Linear(2, 2), data, store)
    with pytest.raises(WiringError, match=r"has not scanned the layers yet\. Call `prepare_methods"):
        method.select_parameters(frozenset(["model.layers.0.x"]))


def test_of_an_image_text_model_the_text_layers_are_scanned():
    model = make_image_text_model()
    config = model.config.text_config
    states = _last_states(model, [[1, 2, 3], [4, 5]])
    assert states.shape == (2, config.num_hidden_layers, config.hidden_size)
    assert model.config.vision_config.num_hidden_layers > 0
