"""Weights of a model folder read tensor by tensor, so that two models can be compared in the memory of one matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import torch
from safetensors import safe_open
from torch import nn

from framework.errors import ConfigError, WiringError
from framework.files import read_json
from framework.model_files import check_model_folder
from framework.parameters import clean_name, lora_pairs

__all__ = [
    "LinearWeight",
    "ModuleWeights",
    "StoredWeight",
    "WeightFiles",
    "WeightSource",
    "check_same_tokenizer",
    "dequantised",
    "is_quantised",
    "linear_weights",
]

FOUR_BITS = 2.0**-3
"""Relative spacing that stands for weights of four bits."""


class StoredWeight(NamedTuple):
    """One weight, widened."""

    tensor: torch.Tensor
    """float32"""
    spacing: float
    """Relative spacing of the numbers it was stored in, e.g. 2^-7 for bfloat16."""
    dtype: torch.dtype
    """Number format it was stored in."""


class WeightSource(Protocol):
    """Where weights come from: files, or a model in memory."""

    @property
    def place(self) -> str:
        """What a message calls it."""
        ...

    def read(self, name: str) -> StoredWeight:
        """Return a weight by its full parameter name."""
        ...

    def __contains__(self, name: str) -> bool: ...


class LinearWeight(NamedTuple):
    """The weight of a linear module in a model."""

    parameter: nn.Parameter
    """As the model stores it."""
    is_transposed: bool
    """Whether that is ``(in, out)``, as in GPT-2."""

    @property
    def oriented(self) -> torch.Tensor:
        """The weight as ``(out, in)``."""
        return self.parameter.T if self.is_transposed else self.parameter


class WeightFiles:
    """The safetensors weights of a model folder by plain parameter name; nothing is read before it is asked for."""

    def __init__(self, folder: Path) -> None:
        """Look up which file holds which tensor.

        Raises:
            ModelError: the folder holds no complete model.
        """
        check_model_folder(folder)
        self.folder = folder
        self._files: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            if not path.name.startswith("adapter_"):
                with safe_open(path, "pt") as file:
                    self._files.update(dict.fromkeys(file.keys(), path))
        self._by_core: dict[str, list[str]] = {}
        if read_json(folder / "config.json").get("vision_config"):
            for name in self._files:
                self._by_core.setdefault(_core(name), []).append(name)

    def stored_name(self, name: str) -> str:
        """Return what the files call a parameter; other than the model in memory only in some image-text models.

        Example: ``model.language_model.layers.0.mlp.up_proj.weight`` may be stored as
        ``language_model.model.layers.0.mlp.up_proj.weight``.
        """
        same = self._by_core.get(_core(name), [])
        return same[0] if name not in self._files and len(same) == 1 else name

    @property
    def place(self) -> str:
        """The folder."""
        return str(self.folder)

    def __contains__(self, name: str) -> bool:
        return self.stored_name(name) in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._files))

    def read(self, name: str) -> StoredWeight:
        """Return a weight in float32.

        Raises:
            WiringError: there is no such weight, or it is stored in packed form.
        """
        stored = self.stored_name(name)
        if stored not in self._files:
            raise WiringError(
                f"Expected `{self.folder}` to hold the weight `{name}`, but it is not there. Name a folder of a plain "
                "model of the same architecture."
            )
        with safe_open(self._files[stored], "pt") as file:
            tensor = file.get_tensor(stored)
        if not tensor.is_floating_point():
            raise WiringError(
                f"Expected `{self.folder}` to hold `{name}` in floating point, but got {tensor.dtype}: the model is "
                "quantised. Name a folder of the same model that is not."
            )
        return StoredWeight(tensor.float(), torch.finfo(tensor.dtype).eps, tensor.dtype)


def _core(name: str) -> str:
    """Return a parameter name without the parts that old and new spellings of image-text models put elsewhere."""
    return ".".join(part for part in name.split(".") if part not in ("model", "language_model", "vision_model"))


class ModuleWeights:
    """The frozen linear weights of a model in memory, four-bit ones de-quantised when they are read."""

    place = "the model in memory"

    def __init__(self, model: nn.Module, *, decode: Callable[[torch.Tensor, Any], torch.Tensor] | None = None) -> None:
        """Keep references.

        Args:
            model: plain or with LoRA pairs.
            decode: turns a packed weight and its state into numbers; None takes bitsandbytes.
        """
        self._weights: dict[str, tuple[torch.Tensor, bool]] = {
            f"{name}.weight": (pair.weight, pair.is_transposed) for name, pair in lora_pairs(model).items()
        }
        for name, weight in linear_weights(model).items():
            self._weights.setdefault(f"{name}.weight", (weight.oriented, weight.is_transposed))
        self._decode = decode

    def __contains__(self, name: str) -> bool:
        return name in self._weights

    def read(self, name: str) -> StoredWeight:
        """Return a weight in float32, oriented as the model stores it.

        Raises:
            WiringError: there is no such weight.
        """
        if name not in self._weights:
            raise WiringError(
                f"Expected the model in memory to hold the weight `{name}`, but it is not there. Name the folder of "
                "the aligned model."
            )
        weight, is_transposed = self._weights[name]
        full = dequantised(weight, decode=self._decode)
        packed = getattr(weight, "quant_state", None) is not None
        spacing = FOUR_BITS if packed else torch.finfo(weight.dtype).eps
        return StoredWeight(full.T if is_transposed else full, spacing, full.dtype if packed else weight.dtype)


def dequantised(
    weight: torch.Tensor, *, decode: Callable[[torch.Tensor, Any], torch.Tensor] | None = None
) -> torch.Tensor:
    """Return a weight in float32; one packed into four bits by bitsandbytes is unpacked.

    Args:
        weight: a parameter; packed ones carry ``quant_state``.
        decode: turns packed numbers and their state into a matrix; None takes bitsandbytes.

    Raises:
        ConfigError: the weight is packed and bitsandbytes is not installed.
    """
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight.detach().float()
    if decode is None:
        try:
            from bitsandbytes.functional import dequantize_4bit
        except ImportError as error:
            raise ConfigError(
                "Expected the package bitsandbytes for a model of four bits, but got none. Run `pip install "
                "'seawall[gpu]'`, or name a folder of the same model that is not quantised."
            ) from error
        decode = cast(Callable[[torch.Tensor, Any], torch.Tensor], dequantize_4bit)
    return decode(weight.data, state).float()


def is_quantised(folder: Path) -> bool:
    """Return whether a model folder holds quantised weights."""
    check_model_folder(folder)
    return bool(read_json(folder / "config.json").get("quantization_config"))


def linear_weights(model: nn.Module, targets: Iterable[str] | None = None) -> dict[str, LinearWeight]:
    """Return the weights of a model's linear modules by clean module name, the output head left out.

    Args:
        model: without adapters.
        targets: last parts of module names; None takes all.
    """
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    wanted = None if targets is None else set(targets)
    found = {}
    for name, module in model.named_modules():
        is_transposed = type(module).__name__ == "Conv1D"
        if module is head or not (isinstance(module, nn.Linear) or is_transposed):
            continue
        plain = clean_name(name + ".").rstrip(".")
        if wanted is None or plain.rpartition(".")[2] in wanted:
            found[plain] = LinearWeight(cast(nn.Parameter, module.weight), is_transposed)
    return found


def check_same_tokenizer(ours: Path, theirs: Path) -> None:
    """Refuse two model folders whose token ids mean different things.

    Compared are the sizes of the vocabularies, and where both folders hold tokenizer.json, the ids of all tokens.

    Raises:
        ModelError: a folder holds no model.
        WiringError: says what differs.
    """
    for folder in (ours, theirs):
        check_model_folder(folder)
    sizes = [read_json(folder / "config.json").get("vocab_size") for folder in (ours, theirs)]
    if sizes[0] != sizes[1]:
        raise WiringError(
            f"Expected `{ours}` and `{theirs}` to have one tokenizer, but got vocabularies of {sizes[0]} and "
            f"{sizes[1]} tokens. Name two models of the same family."
        )
    vocabularies = [_vocabulary(folder / "tokenizer.json") for folder in (ours, theirs)]
    if None not in vocabularies and vocabularies[0] != vocabularies[1]:
        first, second = (cast("dict[str, int]", v) for v in vocabularies)
        odd = sorted(token for token in {*first, *second} if first.get(token) != second.get(token))
        raise WiringError(
            f"Expected `{ours}` and `{theirs}` to have one tokenizer, but {len(odd)} tokens have other ids ({odd[0]!r} "
            f"first: {first.get(odd[0])} and {second.get(odd[0])}). Name two models of the same family."
        )


def _vocabulary(path: Path) -> dict[str, int] | None:
    if not path.is_file():
        return None
    content = read_json(path)
    vocab = content.get("model", {}).get("vocab", {})
    # Unigram tokenizers keep a list of [token, score]; the place is the id.
    ids = dict(vocab) if isinstance(vocab, dict) else {entry[0]: i for i, entry in enumerate(vocab)}
    return {**ids, **{token["content"]: token["id"] for token in content.get("added_tokens", [])}}
