"""GGUF files to folders that plain transformers loads: safetensors weights, config and tokenizer.

Two ways. Llama-type files with a byte-level BPE vocabulary are read directly, in one pass and in seconds. Every other
architecture goes through transformers' own reader, which parses the file several times (about half a minute for 135M
parameters). Both leave float32: a de-quantised value is a product (and sum) of half-precision numbers and small
integers and does not fit 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save_file

from framework.errors import ModelError
from framework.quiet import quiet_bars

if TYPE_CHECKING:
    from gguf import GGUFReader
    from transformers import LlamaConfig, PreTrainedTokenizerFast

__all__ = ["Progress", "convert_gguf"]

Progress = Callable[[str, float], None]
"""Called with what is being done and the share done, in [0, 1]."""

CONVERTER_VERSION = 1
"""Part of the fingerprint of a converted model; raised when the output changes."""

_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LLAMA_KEYS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
_DIGIT_SPLITTING = frozenset({"smollm"})
"""Values of ``tokenizer.ggml.pre`` for byte-level BPE whose digits are split one by one first."""
_PLAIN_BYTE_LEVEL = frozenset({"gpt-2", "default"})
_CONTROL_TOKEN = 3
_USER_DEFINED_TOKEN = 4


def convert_gguf(path: Path, folder: Path, *, progress: Progress | None = None) -> None:
    """Write the model in a GGUF file to ``folder`` as config, float32 safetensors and tokenizer.

    Args:
        path: the GGUF file.
        folder: an existing folder; the caller makes it atomic.
        progress: told how far the conversion is.

    Raises:
        ModelError: the file is not readable as GGUF or its architecture is not known.
    """
    reader = _open(path)
    if _is_direct(reader):
        _convert_llama(reader, folder, progress or _silent)
    else:
        del reader
        _convert_with_transformers(path, folder, progress or _silent)


def _silent(text: str, share: float) -> None:
    """Report to nobody."""


def _open(path: Path) -> GGUFReader:
    from gguf import GGUFReader

    class PlainReader(GGUFReader):
        """Slices a plain array: slicing a memory map costs three times more, and a vocabulary takes 150 000 slices."""

        @property
        def data(self) -> Any:
            return self._plain

        @data.setter
        def data(self, mapped: Any) -> None:
            self._plain = mapped.view(np.ndarray)

    try:
        return PlainReader(path)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise ModelError(
            f"Expected `{path}` to be a complete GGUF file, but got: {error or type(error).__name__}. "
            "Copy or download it again."
        ) from error


def _field(reader: GGUFReader, key: str, default: Any = None) -> Any:
    field = reader.fields.get(key)
    return default if field is None else field.contents()


def _is_direct(reader: GGUFReader) -> bool:
    """Return whether everything in the file is understood by the direct reader."""
    understood = {f"llama.{key}" for key in _LLAMA_KEYS.values()}
    understood |= {"llama.rope.freq_base", "llama.rope.dimension_count", "llama.vocab_size"}
    extra = {key for key in reader.fields if key.startswith("llama.")} - understood
    return (
        _field(reader, "general.architecture") == "llama"
        and not extra
        and all(_target_name(tensor.name) for tensor in reader.tensors)
        and _field(reader, "tokenizer.ggml.model") == "gpt2"
        and _field(reader, "tokenizer.ggml.pre") in _DIGIT_SPLITTING | _PLAIN_BYTE_LEVEL
        and not _field(reader, "tokenizer.ggml.add_bos_token", False)
    )


def _target_name(name: str) -> str | None:
    """Return the transformers name of a llama tensor, or None when there is none.

    Example:
        >>> _target_name("blk.3.attn_q.weight")
        'model.layers.3.self_attn.q_proj.weight'
    """
    stem, _, kind = name.rpartition(".")
    if kind != "weight":
        return None
    if stem in _TOP_NAMES:
        return f"{_TOP_NAMES[stem]}.weight"
    parts = stem.split(".")
    if len(parts) == 3 and parts[0] == "blk" and parts[2] in _LAYER_NAMES:
        return f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}.weight"
    return None


def _unpermute(weight: np.ndarray[Any, Any], num_heads: int) -> np.ndarray[Any, Any]:
    """Return query or key rows in the half-split order of transformers; GGUF keeps rotary pairs side by side.

    Args:
        weight: ``(out, in)`` with ``out = num_heads * head_size``.
        num_heads: query heads, or key heads for a key weight.
    """
    half = weight.shape[0] // num_heads // 2
    return weight.reshape(num_heads, half, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def _convert_llama(reader: GGUFReader, folder: Path, progress: Progress) -> None:
    from transformers import GenerationConfig

    tokenizer = _byte_level_tokenizer(reader)
    config = _llama_config(reader, tokenizer)
    state = _llama_state(reader, config, progress)
    save_file(state, str(folder / "model.safetensors"), metadata={"format": "pt"})
    config.save_pretrained(folder)
    GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    progress("convert model", 1.0)


def _llama_state(reader: GGUFReader, config: LlamaConfig, progress: Progress) -> dict[str, torch.Tensor]:
    from gguf.quants import dequantize

    key_heads = config.num_key_value_heads or config.num_attention_heads
    heads = {"attn_q": config.num_attention_heads, "attn_k": key_heads}
    state = {}
    for i, tensor in enumerate(reader.tensors):
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        part = tensor.name.split(".")[-2]
        if part in heads:
            weight = _unpermute(weight, heads[part])
        state[str(_target_name(tensor.name))] = torch.from_numpy(np.ascontiguousarray(weight))
        progress("convert model", i / len(reader.tensors))
    return state


def _llama_config(reader: GGUFReader, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    from transformers import LlamaConfig

    values = {name: _field(reader, f"llama.{key}") for name, key in _LLAMA_KEYS.items()}
    values["num_key_value_heads"] = values["num_key_value_heads"] or values["num_attention_heads"]
    # The file holds float32: six digits give back the number that was meant (1e-05, not 9.999999747378752e-06).
    values["rms_norm_eps"] = float(f"{values['rms_norm_eps']:.6g}")
    return LlamaConfig(
        **values,
        vocab_size=len(tokenizer),
        rope_parameters={"rope_type": "default", "rope_theta": float(_field(reader, "llama.rope.freq_base", 10000.0))},
        tie_word_embeddings=all(tensor.name != "output.weight" for tensor in reader.tensors),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        architectures=["LlamaForCausalLM"],
        dtype="float32",
    )


def _byte_level_tokenizer(reader: GGUFReader) -> PreTrainedTokenizerFast:
    """Return the tokenizer with the end and padding tokens the file's ids mean, never one token for both."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens: list[str] = _field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in _field(reader, "tokenizer.ggml.merges")]
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    splits_digits = _field(reader, "tokenizer.ggml.pre") in _DIGIT_SPLITTING
    core.pre_tokenizer = (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), split]) if splits_digits else split
    )
    core.decoder = decoders.ByteLevel()
    kinds = _field(reader, "tokenizer.ggml.token_type", [1] * len(tokens))
    for kind, is_special in ((_CONTROL_TOKEN, True), (_USER_DEFINED_TOKEN, False)):
        chosen = [token for token, k in zip(tokens, kinds, strict=True) if k == kind]
        added = [AddedToken(token, special=is_special, normalized=False) for token in chosen]
        core.add_special_tokens(added) if is_special else core.add_tokens(added)
    ids = _token_ids(reader)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        model_max_length=_field(reader, "llama.context_length"),
        clean_up_tokenization_spaces=False,
        **{name: tokens[i] for name, i in ids.items()},
    )
    tokenizer.chat_template = _field(reader, "tokenizer.chat_template")
    return tokenizer


def _token_ids(reader: GGUFReader) -> Mapping[str, int]:
    keys = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    found = {name: _field(reader, f"tokenizer.ggml.{key}_token_id") for name, key in keys.items()}
    ids = {name: int(i) for name, i in found.items() if i is not None}
    if ids.get("pad_token") == ids.get("eos_token"):
        # One token for both: a model trained with its padding masked would never learn to end a reply.
        ids.pop("pad_token", None)
        if "unk_token" in ids and ids["unk_token"] != ids.get("eos_token"):
            ids["pad_token"] = ids["unk_token"]
    return ids


def _convert_with_transformers(path: Path, folder: Path, progress: Progress) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    progress("convert model", 0.0)
    where, name = str(path.parent), path.name
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=name)
        with quiet_bars():
            model = AutoModelForCausalLM.from_pretrained(where, gguf_file=name, dtype=torch.float32)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise ModelError(
            f"Expected `{path}` to be a GGUF model that transformers can read, but got: {error}. "
            "Use the model's folder with safetensors weights instead."
        ) from error
    ids = _token_ids(_open(path))
    for name, token_id in ids.items():
        setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(token_id))
    config = model.config.to_dict()
    config.pop("quantization_config", None)
    config.pop("_name_or_path", None)
    # transformers refuses to save a model it has marked as quantised, so the weights move to a fresh one.
    with torch.device("meta"):
        plain = type(model)(type(model.config)(**config))
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    progress("convert model", 1.0)
