from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from framework import models
from framework.errors import ConfigError, ModelError
from framework.models import ModelSpec, choose_dtype, find_model, has_bf16_hardware, load_model, save_model

SHAPE = {
    "vocab_size": 264,  # transformers' Qwen2 tokenizer adds a token to any vocabulary
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SHAPE)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SHAPE, tie_word_embeddings=True)),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig(**SHAPE, head_dim=8, pad_token_id=0, eos_token_id=1)),
}


@pytest.fixture(autouse=True)
def isolated(tmp_path, monkeypatch):
    """No network, no caches but empty ones, nothing in the current folder."""
    monkeypatch.setenv("SEAWALL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture
def folder(tmp_path, tiny_model, tiny_tokenizer) -> Path:
    save_model(tiny_model, tiny_tokenizer, tmp_path / "model")
    return tmp_path / "model"


def put_into_hub_cache(tmp_path, model, tokenizer, name: str) -> Path:
    repo = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    snapshot = repo / "snapshots" / ("0" * 40)
    save_model(model, tokenizer, snapshot)
    return snapshot


def change_tokenizer(tokenizer, folder: Path, **changes) -> None:
    """Save ``tokenizer`` into ``folder`` with some attributes changed, leaving the shared one as it is."""
    before = {name: getattr(tokenizer, name) for name in changes}
    try:
        for name, value in changes.items():
            setattr(tokenizer, name, value)
        tokenizer.save_pretrained(folder)
    finally:
        for name, value in before.items():
            setattr(tokenizer, name, value)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_loads_from_a_folder(tmp_path, tiny_tokenizer, family):
    kind, config = FAMILIES[family]
    torch.manual_seed(0)
    model = kind(config).eval()
    save_model(model, tiny_tokenizer, tmp_path / "model")
    loaded = load_model(ModelSpec(name=str(tmp_path / "model"), dtype="float32"))
    assert type(loaded.model) is kind
    assert not loaded.model.training
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(loaded.model(ids).logits, model(ids).logits)
    assert (loaded.tokenizer.pad_token_id, loaded.tokenizer.eos_token_id) == (0, 1)
    assert loaded.model.config.pad_token_id == loaded.model.generation_config.pad_token_id == 0
    ends = loaded.model.generation_config.eos_token_id
    assert (ends if isinstance(ends, int) else ends[0]) == 1
    assert loaded.tokenizer.model_max_length == 128
    assert loaded.source == f"folder {tmp_path / 'model'}"
    assert loaded.fingerprint == models.model_fingerprint(loaded.folder)


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
def test_dtype_is_as_asked(folder, name):
    loaded = load_model(ModelSpec(name=str(folder), dtype=name))
    assert loaded.model.dtype == getattr(torch, name)


def test_auto_dtype_follows_the_hardware(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(models, "has_bf16_hardware", lambda: True)
    assert choose_dtype("auto") == torch.bfloat16
    monkeypatch.setattr(models, "has_bf16_hardware", lambda: False)
    assert choose_dtype("auto") == torch.float32
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **k: True)
    assert choose_dtype("auto") == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **k: False)
    assert choose_dtype("auto") == torch.float32


def test_bf16_hardware_is_either_instruction_set(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert not has_bf16_hardware()
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert has_bf16_hardware()


def test_problems_of_a_spec_are_listed():
    with pytest.raises(ConfigError) as caught:
        ModelSpec(name=" ", dtype="float8")
    assert len(caught.value.problems) == 2
    assert "`model.dtype` to be one of auto, float32, bfloat16, float16, but got 'float8'" in str(caught.value)


def test_generation_stops_at_the_end_of_turn_of_the_template(folder, tiny_tokenizer):
    change_tokenizer(tiny_tokenizer, folder, eos_token="<|text|>")
    loaded = load_model(ModelSpec(name=str(folder)))
    assert loaded.model.generation_config.eos_token_id == [1, 3]  # what ends a turn first, then the end of sequence


@pytest.mark.parametrize("pad", [None, "<|end|>"])
def test_padding_is_never_the_end_token(folder, tiny_tokenizer, pad):
    change_tokenizer(tiny_tokenizer, folder, pad_token=pad)
    loaded = load_model(ModelSpec(name=str(folder)))
    assert loaded.tokenizer.pad_token == "<|pad|>"
    assert loaded.model.config.pad_token_id == 0


def test_unknown_token_serves_as_padding(folder, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(models, "_PAD_TOKENS", ())
    change_tokenizer(tiny_tokenizer, folder, pad_token="<|end|>", unk_token="<|text|>")
    assert load_model(ModelSpec(name=str(folder))).tokenizer.pad_token == "<|text|>"


def test_tokenizer_without_a_token_for_padding_is_refused(folder, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(models, "_PAD_TOKENS", ())
    change_tokenizer(tiny_tokenizer, folder, pad_token="<|end|>", unk_token=None)
    with pytest.raises(ModelError, match=r"padding token other than its end token '<\|end\|>', but got '<\|end\|>'"):
        load_model(ModelSpec(name=str(folder)))


def test_model_without_a_chat_template_is_refused(folder, tiny_tokenizer):
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    change_tokenizer(tiny_tokenizer, folder, chat_template=None)
    with pytest.raises(ModelError, match="to have a chat template"):
        load_model(ModelSpec(name=str(folder)))


def test_tokenizer_of_a_larger_model_is_refused(tmp_path, tiny_tokenizer):
    model = LlamaForCausalLM(LlamaConfig(**SHAPE | {"vocab_size": 100}))
    save_model(model, tiny_tokenizer, tmp_path / "model")
    with pytest.raises(ModelError, match="at most 100 tokens, as many as the model embeds, but got 260"):
        load_model(ModelSpec(name=str(tmp_path / "model")))


@pytest.mark.parametrize("name", ["./model", "nowhere/to/go", "my model", "a--b/c"])
def test_missing_folder_says_where_it_looked(name):
    with pytest.raises(ModelError, match=r"to be a known model, but got .*Looked for: folder `"):
        find_model(ModelSpec(name=name))


def test_folder_that_holds_no_model_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"to hold config\.json, but got none"):
        find_model(ModelSpec(name=str(tmp_path / "empty")))


def test_misspelt_name_gets_the_nearest_one():
    with pytest.raises(ModelError, match=r"Did you mean 'smollm2-135m-instruct'\?"):
        find_model(ModelSpec(name="smolm2-135m-instruct"))


def test_unknown_hub_name_offline_says_what_was_left_out():
    with pytest.raises(ModelError, match=r"hub cache; hub \(left out: HF_HUB_OFFLINE is set\)\. Give a folder"):
        find_model(ModelSpec(name="zzz/qqq"))


def test_missing_gguf_file_is_refused(tmp_path):
    with pytest.raises(ModelError, match="to be a GGUF file, but got no such file"):
        find_model(ModelSpec(name=str(tmp_path / "m.gguf")))


def test_gguf_file_is_converted_once(tmp_path, folder, monkeypatch):
    calls = []

    def convert(path, target, *, progress):
        calls.append(path)
        for file in folder.iterdir():
            (target / file.name).write_bytes(file.read_bytes())

    monkeypatch.setattr(models, "convert_gguf", convert)
    path = tmp_path / "tiny.GGUF"
    path.write_bytes(b"x")
    loaded = load_model(ModelSpec(name=str(path)))
    assert loaded.source == f"GGUF file {path}"
    assert loaded.folder.is_relative_to(tmp_path / "cache" / "models" / "tiny")
    load_model(ModelSpec(name=str(path)))
    assert calls == [path]
    path.write_bytes(b"y")
    load_model(ModelSpec(name=str(path)))
    assert len(calls) == 2


@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "SmolLM2-135M-Instruct"])
def test_default_model_never_asks_the_hub(folder, monkeypatch, name):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: pytest.fail("asked the hub"))
    monkeypatch.setattr(models, "obtain_default_model", lambda *, progress: folder)
    assert find_model(ModelSpec(name=name)).folder == folder


def test_hub_name_of_the_default_model_takes_the_hub_cache_then_the_wheel(
    tmp_path, folder, tiny_model, tiny_tokenizer, monkeypatch
):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: pytest.fail("asked the hub"))
    monkeypatch.setattr(models, "obtain_default_model", lambda *, progress: folder)
    name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert find_model(ModelSpec(name=name)).folder == folder
    cached = put_into_hub_cache(tmp_path, tiny_model, tiny_tokenizer, name)
    assert find_model(ModelSpec(name=name)) == (cached, f"hub cache {name}")


def test_hub_cache_is_used_offline(tmp_path, tiny_model, tiny_tokenizer):
    cached = put_into_hub_cache(tmp_path, tiny_model, tiny_tokenizer, "someone/tiny")
    loaded = load_model(ModelSpec(name="someone/tiny"))
    assert (loaded.folder, loaded.source) == (cached, "hub cache someone/tiny")
    with pytest.raises(ModelError, match=r"Did you mean 'someone/tiny'\?"):
        find_model(ModelSpec(name="someone/tinny"))


def test_half_a_model_in_the_hub_cache_is_not_used(tmp_path, tiny_model, tiny_tokenizer):
    cached = put_into_hub_cache(tmp_path, tiny_model, tiny_tokenizer, "someone/tiny")
    (cached / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"Looked for: .*hub cache \(Expected .*\.safetensors, but got none"):
        find_model(ModelSpec(name="someone/tiny"))


def test_no_network_ends_with_what_was_looked_for(monkeypatch):
    class ConnectError(Exception):
        """The hub's HTTP client has errors of its own, which are no OSError."""

    class Api:
        def model_info(self, name, *, revision, timeout):
            assert timeout <= 5
            raise ConnectError("Name or service not known")

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    with pytest.raises(ModelError, match=r"Looked for: folder `zzz/qqq`; hub cache; hub \(Name or service not known\)"):
        find_model(ModelSpec(name="zzz/qqq"))


def test_model_is_fetched_from_the_hub(folder, monkeypatch):
    class Api:
        def model_info(self, name, *, revision, timeout):
            assert (name, revision) == ("zzz/qqq", "v1")

    def fetch(name, *, local_files_only=False, **options):
        if local_files_only:
            raise huggingface_hub.errors.LocalEntryNotFoundError("not there")
        assert options["revision"] == "v1"
        assert not any(pattern.endswith((".bin", ".pt")) for pattern in options["allow_patterns"])
        return str(folder)

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert find_model(ModelSpec(name="zzz/qqq", revision="v1")) == (folder, "hub zzz/qqq")
