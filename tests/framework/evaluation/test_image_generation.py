"""Replies to prompts with an image: the same as transformers', beside others, and what is refused."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from transformers import GenerationConfig

from framework.chat import ChatEncoder
from framework.errors import DataError, ModelError
from framework.evaluation.generation import generate_replies
from framework.examples import Prompt
from framework.models import LoadedModel, ModelSpec, load_model
from tests.tiny_vision import save_image_text_model, save_picture


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("vision")


@pytest.fixture(scope="module")
def loaded(folder) -> LoadedModel:
    found = load_model(ModelSpec(str(save_image_text_model(folder / "model")), "float32"))
    with torch.no_grad():  # random weights say one thing whatever they are shown
        found.model.model.multi_modal_projector.linear_2.weight.mul_(30)
    return found


@pytest.fixture(scope="module")
def prompts(folder) -> list[Prompt]:
    red = save_picture(folder / "red.png")
    blue = save_picture(folder / "blue.png", (0, 20, 250), (40, 16))
    return [
        Prompt("a", "say hi", "benign"),
        Prompt("b", "what is it", "benign", image=red),
        Prompt("c", "what is it", "benign", image=blue),
        Prompt("d", "and a longer one: what is it", "benign", image=blue, prefill="It is"),
        Prompt("e", "hello there", "benign"),
    ]


def encoder(loaded, **options) -> ChatEncoder:
    return ChatEncoder(loaded.tokenizer, system="be brief", processor=loaded.processor, **options)


def test_a_model_with_a_vision_tower_is_loaded_with_its_processor(loaded):
    assert type(loaded.model).__name__ == "LlavaForConditionalGeneration"
    assert loaded.processor.tokenizer is loaded.tokenizer
    text = encoder(loaded).render_prompt(Prompt("a", "say hi", "benign").messages)
    assert text == "<|start|>system\nbe brief<|end|>\n<|start|>user\nsay hi<|end|>\n<|start|>assistant\n"


def test_replies_are_those_of_transformers_and_do_not_depend_on_the_batch(loaded, prompts):
    seen = []
    together = generate_replies(
        loaded.model,
        encoder(loaded),
        prompts,
        max_new_tokens=6,
        progress=lambda done, total: seen.append((done, total)),
    )
    alone = [generate_replies(loaded.model, encoder(loaded), [p], max_new_tokens=6)[0] for p in prompts]
    assert together == alone
    assert together[1] != together[2]
    assert together[3].text.startswith("It is")
    assert seen[0] == (18, 30)
    assert seen[-1] == (30, 30)
    chat = [{"role": "system", "content": [{"type": "text", "text": "be brief"}]}]
    chat += [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it"}]}]
    text = loaded.processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    with Image.open(prompts[1].image) as image:
        inputs = loaded.processor(text=[text], images=[[image.convert("RGB")]], return_tensors="pt")
    theirs = loaded.model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert loaded.tokenizer.decode(theirs, skip_special_tokens=True) == together[1].text
    assert together[1].num_tokens == len(theirs)


def test_text_alone_is_replied_to_as_by_the_whole_model(loaded, prompts):
    made = generate_replies(loaded.model, encoder(loaded), [prompts[0]], max_new_tokens=6)[0]
    ids = torch.tensor([encoder(loaded).encode_prompt(prompts[0].messages)])
    theirs = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    assert loaded.tokenizer.decode(theirs[0, ids.shape[1] :], skip_special_tokens=True) == made.text


def test_a_sample_depends_on_seed_and_number_alone(loaded, prompts):
    def sample(chosen, **options):
        return generate_replies(loaded.model, encoder(loaded), chosen, max_new_tokens=6, temperature=1.0, **options)

    together = sample(prompts, seed=3)
    assert sample([prompts[2]], seed=3, numbers=[2]) == [together[2]]
    assert sample(prompts, seed=4) != together


def test_an_image_for_a_model_that_sees_none_is_refused(loaded, prompts):
    blind = ChatEncoder(loaded.tokenizer)
    with pytest.raises(ModelError, match="a model that looks at images for prompt 'b', but got one for text alone"):
        generate_replies(loaded.model, blind, prompts, max_new_tokens=2)


def test_what_is_no_image_and_what_does_not_fit_is_refused(loaded, folder, prompts):
    (folder / "text.png").write_text("no pixels")
    wrong = Prompt("x", "what", "benign", image=folder / "text.png")
    with pytest.raises(DataError, match=r"text\.png` to be an image, but got"):
        generate_replies(loaded.model, encoder(loaded), [wrong], max_new_tokens=2)
    with pytest.raises(DataError, match=r"512 new tokens to fit the model's context of 512 tokens, but got"):
        generate_replies(loaded.model, encoder(loaded), prompts[1:2], max_new_tokens=512)


def test_images_that_make_no_batch_are_refused_with_the_remedy(loaded, prompts):
    class Picky:
        apply_chat_template = staticmethod(loaded.processor.apply_chat_template)

        def __call__(self, **inputs):
            raise ValueError("sizes differ")

    picky = ChatEncoder(loaded.tokenizer, processor=Picky())
    with pytest.raises(DataError, match=r"to make one batch, but got: sizes differ\. Set the batch size to 1"):
        generate_replies(loaded.model, picky, prompts[1:3], max_new_tokens=2)


def test_settings_of_the_model_do_not_decide_how_replies_are_decoded(loaded, prompts, monkeypatch):
    def reply():
        return generate_replies(loaded.model, encoder(loaded), prompts[1:3], max_new_tokens=6)

    plain = reply()
    own = GenerationConfig(repetition_penalty=50.0, no_repeat_ngram_size=1, num_beams=2, pad_token_id=0)
    monkeypatch.setattr(loaded.model, "generation_config", own)
    assert reply() == plain
    assert loaded.model.generation_config is own
