from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from framework import gguf_files
from framework.errors import ModelError
from framework.files import read_json
from framework.gguf_files import convert_gguf

IDS = torch.tensor([[5, 6, 7, 8, 200, 9]])
MERGED = ["ab", "ĠĠ"]
VOCAB = 260 + len(MERGED)
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str, family: str) -> str:
    stem, _, kind = name.rpartition(".")
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    if stem in top:
        return f"{top[stem]}.{kind}"
    _, _, layer, rest = stem.split(".", 3)
    if family == "gemma3" and rest == "post_attention_layernorm":
        return f"blk.{layer}.post_attention_norm.{kind}"
    return f"blk.{layer}.{LAYER_NAMES[rest]}.{kind}"


def permute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows as llama.cpp's converter writes them."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    tokenizer,
    *,
    family: str = "llama",
    pre: str = "smollm",
    kind: gguf.GGMLQuantizationType | None = None,
    extra: dict[str, float] | None = None,
) -> None:
    config = model.config
    writer = gguf.GGUFWriter(path, family)
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if family == "gemma3":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    for key, value in (extra or {}).items():
        writer.add_float32(key, value)
    vocab = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    vocab += MERGED
    writer.add_tokenizer_model("llama" if family == "gemma3" else "gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocab)
    special = set(tokenizer.all_special_tokens)
    writer.add_token_types([3 if token in special else 1 for token in vocab])
    writer.add_token_scores([-float(i) for i in range(len(vocab))])
    writer.add_token_merges(["a b", "Ġ Ġ"])
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(1)
    writer.add_add_bos_token(False)
    writer.add_chat_template(tokenizer.chat_template)
    state = model.state_dict()
    if config.tie_word_embeddings:
        state.pop("lm_head.weight")
    for name, tensor in state.items():
        weight = tensor
        if family == "llama" and ("q_proj" in name or "k_proj" in name):
            weight = permute(weight, config.num_attention_heads if "q_proj" in name else config.num_key_value_heads)
        if family == "gemma3" and "norm" in name:
            weight = weight + 1
        data = weight.numpy().astype(np.float32)
        if kind is not None and data.ndim == 2:
            data = gguf.quants.quantize(data, kind)
            writer.add_tensor(gguf_name(name, family), data, raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name, family), data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def randomise(model: PreTrainedModel) -> PreTrainedModel:
    torch.manual_seed(3)
    for parameter in model.parameters():
        parameter.data = parameter.data + 0.1 * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture
def llama() -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
        tie_word_embeddings=True,
    )
    return randomise(LlamaForCausalLM(config))


@pytest.fixture
def no_fallback(monkeypatch):
    monkeypatch.setattr(gguf_files, "_convert_with_transformers", lambda *a: pytest.fail("not read directly"))


def convert(path: Path, folder: Path) -> Path:
    folder.mkdir()
    convert_gguf(path, folder)
    return folder


def test_llama_read_directly_gives_the_original_weights(tmp_path, llama, tiny_tokenizer, no_fallback):
    write_gguf(tmp_path / "m.gguf", llama, tiny_tokenizer)
    loaded = load(convert(tmp_path / "m.gguf", tmp_path / "out"))
    for name, tensor in llama.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert torch.equal(logits(loaded), logits(llama))


def test_untied_head_is_kept(tmp_path, llama, tiny_tokenizer, no_fallback):
    llama.config.tie_word_embeddings = False
    llama.lm_head.weight = torch.nn.Parameter(torch.randn(VOCAB, 32))
    write_gguf(tmp_path / "m.gguf", llama, tiny_tokenizer)
    loaded = load(convert(tmp_path / "m.gguf", tmp_path / "out"))
    assert torch.equal(loaded.lm_head.weight, llama.lm_head.weight)
    assert not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)


@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.Q4_1, gguf.GGMLQuantizationType.Q8_0])
def test_direct_reading_equals_transformers_reading(tmp_path, llama, tiny_tokenizer, kind, no_fallback):
    write_gguf(tmp_path / "m.gguf", llama, tiny_tokenizer, kind=kind)
    direct = load(convert(tmp_path / "m.gguf", tmp_path / "out"))
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).eval()
    assert (logits(direct) - logits(reference)).abs().max() < 1e-5
    assert (logits(direct) - logits(llama)).abs().max() > 1e-4  # quantised, so not the original


def test_settings_come_from_the_file(tmp_path, llama, tiny_tokenizer, no_fallback):
    write_gguf(tmp_path / "m.gguf", llama, tiny_tokenizer, extra={"llama.rope.freq_base": 5000.0})
    config = read_json(convert(tmp_path / "m.gguf", tmp_path / "out") / "config.json")
    assert config["rope_parameters"] == {"rope_theta": 5000.0, "rope_type": "default"}
    assert config["rms_norm_eps"] == 1e-5
    assert (config["eos_token_id"], config["pad_token_id"], config["bos_token_id"]) == (1, 0, 2)
    assert config["dtype"] == "float32"
    generation = read_json(tmp_path / "out" / "generation_config.json")
    assert (generation["eos_token_id"], generation["pad_token_id"]) == (1, 0)


def test_end_and_padding_tokens_differ_and_the_template_is_kept(tmp_path, llama, tiny_tokenizer, no_fallback):
    write_gguf(tmp_path / "m.gguf", llama, tiny_tokenizer)
    tokenizer = AutoTokenizer.from_pretrained(convert(tmp_path / "m.gguf", tmp_path / "out"))
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|end|>", "<|pad|>")
    assert tokenizer.chat_template == tiny_tokenizer.chat_template
    assert tokenizer.model_max_length == 512
    assert tokenizer("<|start|>x<|end|>")["input_ids"][::2] == [2, 1]


def test_tokenizer_merges_splits_digits_and_round_trips(tmp_path, llama, tiny_tokenizer, no_fallback):
    write_gguf(tmp_path / "m.gguf", llama, tiny_tokenizer)
    tokenizer = AutoTokenizer.from_pretrained(convert(tmp_path / "m.gguf", tmp_path / "out"))
    assert tokenizer.tokenize("ab  12") == ["ab", "ĠĠ", "1", "2"]
    text = "Hello  12 wörld\n 3 <|start|> , ok"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_plain_byte_level_does_not_split_digits_off(tmp_path, llama, tiny_tokenizer, no_fallback):
    write_gguf(tmp_path / "m.gguf", llama, tiny_tokenizer, pre="gpt-2")
    tokenizer = AutoTokenizer.from_pretrained(convert(tmp_path / "m.gguf", tmp_path / "out"))
    assert tokenizer.tokenize("ab  12") == ["ab", "Ġ", "Ġ", "1", "2"]


@pytest.mark.parametrize("reason", [{"pre": "llama-bpe"}, {"extra": {"llama.rope.scaling.factor": 2.0}}])
def test_files_with_more_in_them_go_through_transformers(tmp_path, llama, tiny_tokenizer, monkeypatch, reason):
    write_gguf(tmp_path / "m.gguf", llama, tiny_tokenizer, **reason)
    monkeypatch.setattr(gguf_files, "_convert_llama", lambda *a: pytest.fail("read directly"))
    folder = tmp_path / "out"
    folder.mkdir()
    heard: list[float] = []
    convert_gguf(tmp_path / "m.gguf", folder, progress=lambda text, share: heard.append(share))
    assert heard == [0.0, 1.0]
    loaded = load(folder)
    assert (logits(loaded) - logits(llama)).abs().max() < 1e-5
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|end|>", "<|pad|>")
    assert "quantization_config" not in read_json(folder / "config.json")


def test_qwen2_file(tmp_path, tiny_tokenizer):
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    model = randomise(Qwen2ForCausalLM(config))
    write_gguf(tmp_path / "m.gguf", model, tiny_tokenizer, family="qwen2", pre="qwen2")
    loaded = load(convert(tmp_path / "m.gguf", tmp_path / "out"))
    assert type(loaded) is Qwen2ForCausalLM
    assert (logits(loaded) - logits(model)).abs().max() < 1e-5


def test_gemma3_file(tmp_path, tiny_tokenizer):
    config = Gemma3TextConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=8,
        max_position_embeddings=512,
    )
    model = randomise(Gemma3ForCausalLM(config))
    write_gguf(tmp_path / "m.gguf", model, tiny_tokenizer, family="gemma3", pre="default")
    loaded = load(convert(tmp_path / "m.gguf", tmp_path / "out"))
    assert type(loaded) is Gemma3ForCausalLM
    for name, tensor in model.state_dict().items():
        assert (loaded.state_dict()[name] - tensor).abs().max() < 1e-6, name


def test_unknown_architecture_is_refused(tmp_path, llama, tiny_tokenizer):
    write_gguf(tmp_path / "m.gguf", llama, tiny_tokenizer, family="llama")
    data = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(data.replace(b"llama", b"lamma"))
    with pytest.raises(ModelError, match="to be a GGUF model that transformers can read"):
        convert(tmp_path / "m.gguf", tmp_path / "out")


@pytest.mark.parametrize("keep", [0, 3, 100, 3000, -100])
def test_truncated_file_is_refused(tmp_path, llama, tiny_tokenizer, keep):
    write_gguf(tmp_path / "m.gguf", llama, tiny_tokenizer)
    data = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(data[:keep])
    with pytest.raises(ModelError, match="to be a complete GGUF file"):
        convert(tmp_path / "m.gguf", tmp_path / "out")


def test_another_kind_of_file_is_refused(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"not a model " * 50)
    with pytest.raises(ModelError, match="complete GGUF file, but got: GGUF magic invalid"):
        convert(tmp_path / "m.gguf", tmp_path / "out")
