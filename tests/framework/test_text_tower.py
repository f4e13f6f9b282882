"""The text tower of an image-text model: where methods and adapters go, and its names in the weight files."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig

from framework.adapters import AdapterSpec, add_adapter
from framework.errors import ModelError, WiringError
from framework.model_files import is_image_text_folder, read_model, read_processor, read_tokenizer, save_model
from framework.models import ModelSpec, load_model
from framework.text_tower import names_outside_text, text_prefix, text_tower
from framework.weight_files import WeightFiles
from methods.nest.sites import find_projections
from tests.conftest import make_model, make_tokenizer
from tests.tiny_vision import make_image_text_model, save_image_text_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_image_text_model(tmp_path_factory.mktemp("vision") / "model")


def make_smolvlm() -> SmolVLMForConditionalGeneration:
    torch.manual_seed(0)
    vision = SmolVLMVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    text = {
        "model_type": "llama", "vocab_size": 264, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1,
    }  # fmt: skip
    return SmolVLMForConditionalGeneration(
        SmolVLMConfig(vision_config=vision, text_config=text, scale_factor=2, pad_token_id=0)
    )


def test_the_tower_of_a_language_model_is_all_of_it(tiny_model):
    assert text_tower(tiny_model) is tiny_model
    assert text_prefix(tiny_model) == ""
    assert names_outside_text(tiny_model) == []


@pytest.mark.parametrize(
    ("make", "prefix"),
    [(make_image_text_model, "model.language_model."), (make_smolvlm, "model.text_model.")],
    ids=["llava", "smolvlm"],
)
def test_neurons_and_adapters_lie_in_the_text_tower_alone(make, prefix):
    model = make()
    names = list(find_projections(model))
    assert len(names) == 4
    assert all(name.startswith(prefix) for name in names)
    adapted = add_adapter(model, AdapterSpec(targets=("q_proj", "v_proj")))
    pairs = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert len(pairs) == 8
    assert all(prefix in name for name in pairs)
    assert list(find_projections(adapted)) == names
    assert text_prefix(model) == text_prefix(adapted) == prefix


def test_a_model_that_hides_its_decoder_is_refused():
    class Blend(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = type("Config", (), {"vision_config": {}})()
            self.vision_tower = nn.Linear(2, 2)

    with pytest.raises(WiringError, match="Blend to have a decoder apart from its vision tower"):
        text_tower(Blend())


def test_files_are_read_by_the_names_in_memory_and_written_under_their_own(folder, tmp_path):
    files = WeightFiles(folder)
    assert files.stored_name("model.language_model.norm.weight") == "language_model.model.norm.weight"
    assert files.stored_name("lm_head.weight") == "language_model.lm_head.weight"
    model = read_model(folder, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        assert name in files, name
        assert torch.equal(files.read(name).tensor, parameter), name
    loaded = load_model(ModelSpec(str(folder), "bfloat16"))
    save_model(loaded.model, loaded.tokenizer, tmp_path / "saved", dtype=torch.float32, processor=loaded.processor)
    assert list(WeightFiles(tmp_path / "saved")) == list(files)
    again = load_model(ModelSpec(str(tmp_path / "saved"), "float32"))
    assert type(again.processor) is type(loaded.processor)


def test_the_config_says_what_kind_of_model_it_is(folder, tmp_path):
    assert is_image_text_folder(folder)
    make_model().save_pretrained(tmp_path)
    assert not is_image_text_folder(tmp_path)


def test_a_processor_that_is_not_there_is_refused(folder, tmp_path):
    make_image_text_model().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="to hold the processor of an image-text model, but got"):
        read_processor(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="to hold the processor of an image-text model, but got"):
        read_processor(tmp_path)


def test_a_processor_whose_packages_are_missing_is_refused_with_their_names(folder, monkeypatch):
    def fail(*arguments, **options):
        raise ImportError("it requires the Torchvision library.")

    monkeypatch.setattr("transformers.AutoProcessor.from_pretrained", fail)
    with pytest.raises(
        ModelError, match=r"the packages that the processor in .* needs, but got: it requires the Torch"
    ):
        read_processor(folder)


def test_a_template_beside_the_tokenizer_is_found(tmp_path):
    tokenizer = make_tokenizer()
    template, tokenizer.chat_template = tokenizer.chat_template, None
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert read_tokenizer(tmp_path).chat_template == template
