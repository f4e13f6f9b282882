"""Model folders on disk: reading one whole or not at all, saving atomically, and fingerprints of the content."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from framework.errors import ModelError, SeawallError, StorageError, WiringError
from framework.files import cache_root, fingerprint, hash_file, read_json, write_json
from framework.quiet import quiet_bars

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "check_model_folder",
    "gguf_fingerprint",
    "is_image_text_folder",
    "model_fingerprint",
    "read_model",
    "read_processor",
    "read_tokenizer",
    "save_adapter",
    "save_model",
]

_PICKLED = ("*.bin", "*.pt", "*.pth")


def check_model_folder(folder: Path) -> None:
    """Check that a folder holds a model in the one accepted form.

    Raises:
        ModelError: the folder or its config is missing, or the weights are missing or not safetensors.
    """
    if not folder.is_dir():
        raise ModelError(f"Expected `{folder}` to be a model folder, but got no such folder. Check the path.")
    if not (folder / "config.json").is_file():
        hint = " It holds an adapter: merge it into its base model first." if _has_adapter(folder) else ""
        raise ModelError(f"Expected `{folder}` to hold config.json, but got none.{hint or ' Check the path.'}")
    if _weight_files(folder):
        _check_shards(folder)
        return
    pickled = sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern))
    if pickled:
        raise ModelError(
            f"Expected `{folder}` to hold weights as .safetensors, but got {', '.join(pickled)}, which can run code "
            "when opened. If you trust the file, load it with transformers and save it again: "
            "`model.save_pretrained(folder)`."
        )
    raise ModelError(f"Expected `{folder}` to hold weights as .safetensors, but got none. Copy the folder again.")


def read_model(folder: Path, *, dtype: torch.dtype, trust_remote_code: bool = False) -> PreTrainedModel:
    """Return the causal language model or image-text model in ``folder``, in evaluation mode.

    Args:
        folder: holds config.json and safetensors weights.
        dtype: of the parameters.
        trust_remote_code: whether Python code in the folder may run.

    Raises:
        ModelError: a file is missing, truncated or does not fit the config, or the architecture is not known.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    check_model_folder(folder)
    auto: Any = AutoModelForImageTextToText if is_image_text_folder(folder) else AutoModelForCausalLM
    try:
        with quiet_bars():
            loaded: Any = auto.from_pretrained(
                folder,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
            )
    except (SafetensorError, ValueError, KeyError, OSError, RuntimeError) as error:
        raise ModelError(
            f"Expected `{folder}` to hold a complete causal language model, but got: {_first_line(error)}. "
            "Copy or download the folder again."
        ) from error
    model, info = loaded
    _check_complete(folder, info)
    return model.eval()


def read_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Return the tokenizer in ``folder``, as saved.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
        beside = folder / "chat_template.json"  # where older image-text models keep it
        if not found.chat_template and beside.is_file():
            found.chat_template = read_json(beside)["chat_template"]
        return found
    except Exception as error:  # tokenizers raises bare Exception for a damaged tokenizer.json
        raise ModelError(
            f"Expected `{folder}` to hold a tokenizer, but got: {_first_line(error)}. "
            "Copy tokenizer.json and tokenizer_config.json next to the weights."
        ) from error


def is_image_text_folder(folder: Path) -> bool:
    """Return whether the config in ``folder`` is that of a model that also looks at images."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as CLASSES

    config = read_json(folder / "config.json")
    # Some kinds have a class for text alone too; the folder says which one it was saved from.
    return "vision_config" in config and CLASSES.get(config.get("model_type")) in (config.get("architectures") or ())


def read_processor(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Return the processor of the image-text model in ``folder``: tokenizer and image processor in one.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    from transformers import AutoProcessor, logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()  # says every time which backend resizes images
    try:
        found = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except ImportError as error:
        raise ModelError(
            f"Expected the packages that the processor in `{folder}` needs, but got: {_first_line(error)}. "
            "Install them and try again; SmolVLM needs torchvision and num2words."
        ) from error
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"Expected `{folder}` to hold the processor of an image-text model, but got: {_first_line(error)}. "
            "Copy processor_config.json or preprocessor_config.json next to the weights."
        ) from error
    finally:
        logging.set_verbosity(level)
    if getattr(found, "image_processor", None) is None:
        raise ModelError(
            f"Expected `{folder}` to hold the processor of an image-text model, but got {type(found).__name__}. "
            "Copy processor_config.json or preprocessor_config.json next to the weights."
        )
    return found


def model_fingerprint(folder: Path) -> str:
    """Return 16 hex digits that depend on the config and the bytes of every weight file.

    Hashes of weight files are remembered in the cache folder by path, size and time of change.

    Raises:
        ModelError: the folder does not hold a model.
    """
    check_model_folder(folder)
    config = read_json(folder / "config.json")
    for noise in ("transformers_version", "_name_or_path", "_commit_hash"):
        config.pop(noise, None)
    return fingerprint({"config": config, "weights": _known_hashes(folder, _weight_files(folder))})


def gguf_fingerprint(path: Path) -> str:
    """Return 16 hex digits that depend on the bytes of a GGUF file; its hash is remembered as that of weights is."""
    return fingerprint({"gguf": _known_hashes(path, [path])})


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    processor: Any = None,
) -> None:
    """Write a plain model and its tokenizer to ``folder`` so that plain transformers loads them.

    Atomic, and weights only as safetensors.

    Args:
        model: no adapter inside; left as it is.
        tokenizer: saved beside it.
        folder: replaced when it exists.
        dtype: of the written parameters; None keeps the model's.
        processor: of an image-text model, saved with it.

    Raises:
        WiringError: the model carries an adapter.
        StorageError: the folder cannot be written or the disk is full.
    """
    if hasattr(model, "peft_config"):
        raise WiringError(
            "Expected `model` to be a plain model, but got one that carries an adapter. Call `merge_adapter` first, or "
            "`save_adapter` to keep the adapter alone."
        )
    with _replacing(folder) as partial, quiet_bars():
        if dtype is None or dtype == model.dtype:
            model.save_pretrained(partial)
        else:
            model.save_pretrained(partial, state_dict=_cast_state(model, dtype))
            # transformers writes the dtype of the model it was given; readers with dtype="auto" would widen again
            config = read_json(partial / "config.json") | {"dtype": str(dtype).removeprefix("torch.")}
            (partial / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if processor is not None:
            processor.save_pretrained(partial)
        tokenizer.save_pretrained(partial)


def save_adapter(model: torch.nn.Module, folder: Path) -> None:
    """Write the adapter of a PEFT model to ``folder`` so that plain peft loads it; atomic, safetensors only.

    Raises:
        WiringError: the model carries no adapter.
        StorageError: the folder cannot be written or the disk is full.
    """
    if not hasattr(model, "peft_config"):
        raise WiringError("Expected `model` to carry an adapter, but got a plain model. Use `save_model`.")
    with _replacing(folder) as partial:
        model.save_pretrained(str(partial), save_embedding_layers=False)  # type: ignore[operator]


def _weight_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("adapter_"))


def _check_shards(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    missing = sorted({name for name in read_json(index)["weight_map"].values() if not (folder / name).is_file()})
    if missing:
        raise ModelError(
            f"Expected `{folder}` to hold every weight file of its index, but got none of {', '.join(missing)}. "
            "Copy or download the folder again."
        )


def _has_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def _known_hashes(place: Path, paths: Sequence[Path]) -> dict[str, str]:
    stamps = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in paths}
    # Kept in the cache, not beside the weights: the user's model folder may be read-only and is not ours to change.
    sidecar = cache_root() / "hashes" / f"{fingerprint(str(place.resolve()))}.json"
    if sidecar.is_file():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            known = read_json(sidecar)
            if known["stamps"] == stamps:
                return {name: str(known["hashes"][name]) for name in stamps}
    hashes = {path.name: hash_file(path) for path in paths}
    with contextlib.suppress(StorageError):  # only spares time; whoever must write the cache reports it
        write_json(sidecar, {"folder": place.resolve(), "stamps": stamps, "hashes": hashes})
    return hashes


def _check_complete(folder: Path, info: dict[str, Any]) -> None:
    """Refuse what transformers only warns about: absent weights would be drawn at random."""
    missing = sorted(info.get("missing_keys", ()))
    mismatched = sorted(str(entry[0]) for entry in info.get("mismatched_keys", ()))
    if missing or mismatched:
        bad = [*missing, *mismatched]
        raise ModelError(
            f"Expected `{folder}` to hold every weight of its config, but got {len(bad)} missing or of another shape, "
            f"{bad[0]!r} among them. Copy or download the folder again."
        )


def _cast_state(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the state in ``dtype``; tensors that were one stay one, so that tied weights are written once."""
    cast: dict[tuple[Any, ...], torch.Tensor] = {}
    state = {}
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            place = (tensor.data_ptr(), tensor.shape, tensor.stride())
            if place not in cast:
                cast[place] = tensor.to(dtype)
            state[name] = cast[place]
        else:
            state[name] = tensor
    return state


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")


@contextlib.contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """Yield a work folder that takes the place of ``folder`` when the block ends without an error."""
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        yield partial
        if folder.exists():
            folder.rename(old)
        try:
            partial.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
    except SeawallError:
        raise
    except Exception as error:
        if not isinstance(error, OSError) and "No space left" not in str(error):
            raise  # safetensors reports a full disk as an error of its own
        raise StorageError(
            f"Expected `{folder}` to be writable, but got {_first_line(error)}. "
            "Free some space or choose another folder."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
