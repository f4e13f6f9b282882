"""Models by name or path: where they are looked for, how they are loaded, and what is refused.

Order: a local folder or GGUF file, the local hub cache, the hub when online; the default model comes out of a Python
wheel (`framework/default_model.py`) and never asks the hub.
"""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from framework.adapters import AdapterSpec, add_adapter, merge_adapter
from framework.chat import ChatEncoder
from framework.default_model import DEFAULT_MODEL, DEFAULT_MODEL_HUB_NAME, obtain_default_model
from framework.endpoint_settings import is_endpoint
from framework.errors import ConfigError, ModelError
from framework.files import ArtifactStore, cache_root, hash_file
from framework.gguf_files import CONVERTER_VERSION, Progress, convert_gguf
from framework.model_files import (
    check_model_folder,
    is_image_text_folder,
    model_fingerprint,
    read_model,
    read_processor,
    read_tokenizer,
    save_adapter,
    save_model,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "DEFAULT_MODEL",
    "AdapterSpec",
    "LoadedModel",
    "ModelSpec",
    "add_adapter",
    "choose_device",
    "choose_dtype",
    "find_model",
    "has_bf16_hardware",
    "load_model",
    "merge_adapter",
    "model_fingerprint",
    "resolved_dtype",
    "save_adapter",
    "save_model",
]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "*.py"]
_HUB_TIMEOUT = 5.0
"""Seconds for the first answer of the hub: without a network the user should read why at once."""
_PAD_TOKENS = ("<|endoftext|>", "<pad>", "<|pad|>", "[PAD]", "<|finetune_right_pad_id|>", "<unk>")
"""Tried in this order when a tokenizer names no padding token of its own."""
_UNLIMITED = 10**6
"""Tokens; above it a tokenizer's `model_max_length` means that nobody set one."""


@dataclass(frozen=True)
class ModelSpec:
    """Which model, and how it is loaded."""

    name: str = DEFAULT_MODEL
    """A folder, a GGUF file, a hub id, or the default model's name."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the parameters; auto takes bfloat16 where the device multiplies it in hardware."""
    revision: str | None = None
    """Commit, tag or branch on the hub."""
    trust_remote_code: bool = False
    """Whether Python code that comes with the model may run."""

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: with all problems at once.
        """
        problems = []
        if not self.name.strip():
            problems.append(f"Expected `model.name` to be a name or a path, but got {self.name!r}.")
        if self.dtype not in ("auto", *_DTYPES):
            problems.append(f"Expected `model.dtype` to be one of auto, {', '.join(_DTYPES)}, but got {self.dtype!r}.")
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to train or to generate, and where it came from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str
    """Where it was found, for people to read."""
    fingerprint: str
    """16 hex digits of config and weights."""
    folder: Path
    """Holds the files it was loaded from."""
    processor: Any = None
    """Of an image-text model: makes tokens and pixel values of a text and its image; its tokenizer is ``tokenizer``."""


class FoundModel(NamedTuple):
    """A model folder and where it came from."""

    folder: Path
    source: str


def choose_device(accelerator: str) -> str:
    """Return the torch device that Lightning's ``accelerator`` stands for on this machine.

    Example:
        >>> choose_device("cpu")
        'cpu'
    """
    if accelerator in ("gpu", "cuda", "auto") and torch.cuda.is_available():
        return "cuda"
    if accelerator in ("mps", "gpu", "auto") and torch.backends.mps.is_available():
        return "mps"
    return "cpu"


def load_model(spec: ModelSpec, *, progress: Progress | None = None) -> LoadedModel:
    """Return model and tokenizer, in evaluation mode, on the CPU.

    The tokenizer gets a padding token that is not an end token, and the model's generation stops where the chat
    template ends a reply.

    Args:
        spec: which model.
        progress: told how far fetching and converting are; not called when nothing of that is needed.

    Raises:
        ModelError: the model is not found, damaged, not safetensors, or without a chat template.
        StorageError: the cache cannot be written.
    """
    found = find_model(spec, progress=progress)
    tokenizer = read_tokenizer(found.folder, trust_remote_code=spec.trust_remote_code)
    processor = None
    if is_image_text_folder(found.folder):
        processor = read_processor(found.folder, trust_remote_code=spec.trust_remote_code)
        processor.chat_template = getattr(processor, "chat_template", None) or tokenizer.chat_template
        processor.tokenizer = tokenizer
    encoder = ChatEncoder(tokenizer)
    model = read_model(found.folder, dtype=choose_dtype(spec.dtype), trust_remote_code=spec.trust_remote_code)
    _fit_tokenizer(tokenizer, model, encoder)
    return LoadedModel(model, tokenizer, found.source, model_fingerprint(found.folder), found.folder, processor)


def find_model(spec: ModelSpec, *, progress: Progress | None = None) -> FoundModel:
    """Return the folder of a model; fetches and converts it when needed.

    Args:
        spec: which model.
        progress: told how far fetching and converting are.

    Raises:
        ModelError: nothing was found (names what was looked for), or what was found is damaged.
        StorageError: the cache cannot be written.
    """
    if is_endpoint(spec.name):
        raise ModelError(
            f"Expected `model.name` to be a model with weights, but got the endpoint {spec.name!r}. `seawall evaluate` "
            "and prompt attacks ask endpoints; everything else needs a folder, a GGUF file or a hub id."
        )
    path = Path(spec.name).expanduser()
    if path.suffix.lower() == ".gguf":
        return _convert_local(path, progress)
    is_hub_name = _is_hub_name(spec.name)
    is_default = spec.name.lower() in (DEFAULT_MODEL, DEFAULT_MODEL_HUB_NAME.lower()) and spec.revision is None
    if path.is_dir() and ((path / "config.json").is_file() or not (is_hub_name or is_default)):
        check_model_folder(path)
        return FoundModel(path, f"folder {path}")
    tried = [f"folder `{path}`" + (" (no config.json in it)" if path.is_dir() else "")]
    if is_hub_name:
        cached = _find_in_hub_cache(spec, tried)
        if cached is not None:
            return FoundModel(cached, f"hub cache {spec.name}")
    if is_default:
        return FoundModel(obtain_default_model(progress=progress), f"default model {DEFAULT_MODEL} (4-bit, widened)")
    if is_hub_name:
        fetched = _fetch_from_hub(spec, tried)
        if fetched is not None:
            return FoundModel(fetched, f"hub {spec.name}")
    near = difflib.get_close_matches(spec.name, _known_names(), n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else f" Give a folder, a GGUF file, a hub id or {DEFAULT_MODEL!r}."
    raise ModelError(
        f"Expected `model.name` to be a known model, but got {spec.name!r}. Looked for: {'; '.join(tried)}.{hint}"
    )


def choose_dtype(name: str) -> torch.dtype:
    """Return the parameter type for ``auto`` or a name.

    Without bfloat16 multiplication in hardware a CPU trains in bfloat16 several times slower than in float32.
    """
    if name != "auto":
        return _DTYPES[name]
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if has_bf16_hardware() else torch.float32


def resolved_dtype(name: str) -> str:
    """Return the name of the type that ``choose_dtype`` takes here, for fingerprints: ``auto`` differs by machine.

    Example:
        >>> resolved_dtype("float32")
        'float32'
    """
    return str(choose_dtype(name)).removeprefix("torch.")


def has_bf16_hardware() -> bool:
    """Return whether this CPU multiplies bfloat16 in hardware."""
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(bool(getattr(torch.cpu, check, bool)()) for check in checks)


def _convert_local(path: Path, progress: Progress | None) -> FoundModel:
    if not path.is_file():
        raise ModelError(f"Expected `{path}` to be a GGUF file, but got no such file. Check the path.")
    key = {"gguf": hash_file(path), "converter": CONVERTER_VERSION}
    store, kind = ArtifactStore(cache_root()), f"models/{path.stem}"
    if store.find(kind, key) is None:
        with store.writing(kind, key) as folder:
            if store.find(kind, key) is None:
                convert_gguf(path, folder, progress=progress)
    return FoundModel(store.path(kind, key), f"GGUF file {path}")


def _is_hub_name(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def _is_offline() -> bool:
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _find_in_hub_cache(spec: ModelSpec, tried: list[str]) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(spec.name, revision=spec.revision, local_files_only=True))
        check_model_folder(folder)  # a download that was interrupted leaves a part of a model
    except LocalEntryNotFoundError:
        tried.append("hub cache")
        return None
    except ModelError as error:
        tried.append(f"hub cache ({error})")
        return None
    return folder


def _fetch_from_hub(spec: ModelSpec, tried: list[str]) -> Path | None:
    from huggingface_hub import HfApi, snapshot_download

    if _is_offline():
        tried.append("hub (left out: HF_HUB_OFFLINE is set)")
        return None
    try:
        HfApi().model_info(spec.name, revision=spec.revision, timeout=_HUB_TIMEOUT)
        folder = snapshot_download(
            spec.name, revision=spec.revision, allow_patterns=_HUB_FILES, etag_timeout=_HUB_TIMEOUT
        )
    except Exception as error:  # the hub's HTTP client, and with it its errors, differs between versions
        lines = str(error).strip().splitlines()
        tried.append(f"hub ({lines[0] if lines else type(error).__name__})")
        return None
    check_model_folder(Path(folder))
    return Path(folder)


def _known_names() -> list[str]:
    from huggingface_hub import constants

    cached = Path(constants.HF_HUB_CACHE).glob("models--*--*")
    return [
        DEFAULT_MODEL,
        DEFAULT_MODEL_HUB_NAME,
        *(p.name.removeprefix("models--").replace("--", "/") for p in cached),
    ]


def _fit_tokenizer(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, encoder: ChatEncoder) -> None:
    embeddings: Any = model.get_input_embeddings()
    rows = embeddings.weight.shape[0]
    if len(tokenizer) > rows:
        raise ModelError(
            f"Expected the tokenizer to have at most {rows} tokens, as many as the model embeds, but got "
            f"{len(tokenizer)}. Use the tokenizer that was saved with the model."
        )
    tokenizer.pad_token = _choose_pad_token(tokenizer, encoder.stop_ids)
    tokenizer.padding_side = "left"
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context and tokenizer.model_max_length > _UNLIMITED:
        tokenizer.model_max_length = context
    model.config.pad_token_id = tokenizer.pad_token_id
    generation = model.generation_config
    if generation is not None:
        listed = generation.eos_token_id
        ends = listed if isinstance(listed, list) else [] if listed is None else [listed]
        stops = list(dict.fromkeys([*encoder.stop_ids, *ends]))
        generation.eos_token_id = stops[0] if len(stops) == 1 else stops
        generation.pad_token_id = tokenizer.pad_token_id


def _choose_pad_token(tokenizer: PreTrainedTokenizerBase, stop_ids: tuple[int, ...]) -> str:
    """Return a padding token that does not end a reply.

    A model trained with its end token masked as padding never learns to stop.
    """
    vocab = tokenizer.get_vocab()
    named = [tokenizer.pad_token, *(token for token in _PAD_TOKENS if token in vocab), tokenizer.unk_token]
    for token in named:
        if token is not None and vocab.get(str(token)) not in (None, *stop_ids):
            return str(token)
    raise ModelError(
        f"Expected the tokenizer to have a padding token other than its end token {tokenizer.eos_token!r}, but got "
        f"{tokenizer.pad_token!r}. Name one it knows: `tokenizer.pad_token = ...; tokenizer.save_pretrained(folder)`."
    )
