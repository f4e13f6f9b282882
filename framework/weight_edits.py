"""Editing the weights of a finished model: which parameters are plain, their exact numbers, and writing them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from framework.errors import WiringError
from framework.method import MethodStore
from framework.parameters import clean_name, lora_pairs
from framework.weight_files import WeightFiles

__all__ = [
    "aligned_folder",
    "digits_of",
    "edit_parameters",
    "exact_weight",
    "fold_pairs",
    "plain_parameters",
    "restore_digits",
    "scale_pairs",
]

ALIGNED = "aligned"
"""Role of the model that left ``align``, in a stage that trains or edits what came of it."""


def aligned_folder(store: MethodStore, given: str | None, *, method: str, datamodule: Any) -> Path:
    """Return the folder of the aligned model: the named one, the run's, or the model this stage starts from.

    Args:
        store: knows the models of the run.
        given: folder named in the settings.
        method: name of the method, for the message.
        datamodule: of the stage; None where it only edits, and starts from a model that was fine-tuned before.

    Raises:
        WiringError: the stage only edits and nobody says which model was the aligned one.
    """
    if given:
        return Path(given)
    if ALIGNED in store.models:
        return store.models[ALIGNED]
    if datamodule is None:
        raise WiringError(
            f"Method `{method}` needs the `aligned` model in a stage that does not train, but the run does not say "
            "which it was. Name its folder with `aligned`."
        )
    return store.model("start", method=method)


def plain_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return a model's parameters by the plain transformers name, those of LoRA pairs left out."""
    pairs = {id(p) for pair in lora_pairs(model).values() for p in (pair.A, pair.B)}
    return {clean_name(name): p for name, p in model.named_parameters() if id(p) not in pairs}


def exact_weight(
    parameter: torch.Tensor, name: str, files: WeightFiles, *, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Return a parameter in float32, with the digits its file has where it is nothing but that number rounded.

    A model that was loaded in 16 bits and not trained since has lost digits that differences depend on.

    Args:
        parameter: any shape.
        name: plain name.
        files: of the model it was loaded from.
        dtype: number format it was loaded in; None takes the parameter's.
    """
    wide = parameter.detach().float()
    if (dtype or parameter.dtype) == torch.float32 or name not in files:
        return wide
    stored = files.read(name).tensor.to(parameter.device)
    return stored if torch.equal(stored.to(dtype or parameter.dtype).float(), wide) else wide


def digits_of(value: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
    """Return ``stored`` where ``value`` is nothing but those numbers rounded to 16 bits, else ``value``.

    Other than for ``exact_weight`` nobody needs to know the number format: a model may have been widened since.

    Args:
        value: float32.
        stored: float32, on the same device.

    Example:
        >>> digits_of(torch.tensor([0.10009765625]), torch.tensor([0.1])).tolist() == torch.tensor([0.1]).tolist()
        True
    """
    is_rounded = any(torch.equal(stored.to(dtype).float(), value) for dtype in (torch.bfloat16, torch.float16))
    return stored if is_rounded else value


@torch.no_grad()
def restore_digits(model: nn.Module, files: WeightFiles) -> set[str]:
    """Make a model float32, give back digits that its files have and 16 bits lost, and return what differs from them.

    Args:
        model: plain or with LoRA pairs; what its files do not hold is only widened.
        files: of the model that entered the stage.

    Returns:
        Plain names of the tensors that are not those of the files, because something trained or edited them.
    """
    differing = set()
    model.float()
    # The state and not the parameters: buffers lose digits like them.
    for full_name, value in model.state_dict().items():
        name = clean_name(full_name)
        if not value.is_floating_point() or name not in files:
            continue
        stored = files.read(name).tensor.to(value.device)
        if torch.equal(value, stored):
            continue
        if digits_of(value, stored) is stored:
            value.copy_(stored)
        else:
            differing.add(name)
    return differing


@torch.no_grad()
def edit_parameters(
    model: nn.Module, change: Callable[[str, torch.Tensor], torch.Tensor | None], *, files: WeightFiles
) -> int:
    """Give every plain parameter the value that ``change`` returns, and return how many it changed.

    As soon as one changes, the whole model becomes float32, which is lossless for the others: in 16 bits most of a
    small change would be rounded away.

    Args:
        model: plain or with LoRA pairs.
        change: called with plain name and float32 value; None leaves the parameter as it is.
        files: of the model that entered the stage.
    """
    changed = 0
    parameters = plain_parameters(model)
    dtypes = {name: p.dtype for name, p in parameters.items()}
    for name, parameter in parameters.items():
        exact = exact_weight(parameter, name, files, dtype=dtypes[name])
        value = change(name, exact)
        if value is None or torch.equal(value, exact):
            continue
        if parameter.dtype != torch.float32:
            model.float()
        parameter.copy_(value)
        changed += 1
    return changed


@torch.no_grad()
def scale_pairs(model: nn.Module, factor: float) -> int:
    """Multiply every LoRA update by ``factor`` and return how many were not zero."""
    updates = [pair.B for pair in lora_pairs(model).values() if bool(pair.B.any())]
    for B in updates:
        B.mul_(factor)
    return len(updates)


@torch.no_grad()
def fold_pairs(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return every LoRA update in float32 by the plain name of its weight, oriented like it, and zero the pairs."""
    updates = {}
    for name, pair in lora_pairs(model).items():
        update = pair.scale * pair.B.float() @ pair.A.float()
        updates[f"{name}.weight"] = update.T if pair.is_transposed else update
        pair.B.zero_()
    return updates
