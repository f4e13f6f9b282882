"""Names through wrappers, freezing, counts, and the low-rank update of a LoRA pair."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import NamedTuple, cast

import torch
from torch import nn

__all__ = [
    "LoraPair",
    "checksum",
    "clean_name",
    "count_parameters",
    "freeze",
    "lora_pairs",
    "nonfinite_names",
    "trainable_names",
    "whole_tensor",
]

_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:module|_forward_module|_fsdp_wrapped_module|_orig_mod|base_model\.model|base_layer)\."
)


class LoraPair(NamedTuple):
    """One LoRA update ``scale * B @ A`` of a linear weight ``(out, in)``."""

    A: nn.Parameter
    """``(rank, in)``"""
    B: nn.Parameter
    """``(out, rank)``"""
    scale: float
    """alpha / rank"""
    weight: torch.Tensor
    """The frozen weight the update is added to, ``(out, in)``."""
    is_transposed: bool = False
    """Whether the model stores the weight as ``(in, out)``; ``weight`` is then a view of it."""


def clean_name(name: str) -> str:
    """Return a parameter or module name as the plain transformers model spells it.

    Wrappers of DDP, FSDP, ``torch.compile`` and peft are taken off.

    Example:
        >>> clean_name("module.base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight")
        'model.layers.0.self_attn.q_proj.weight'
    """
    return _WRAPPERS.sub("", name)


def trainable_names(model: nn.Module) -> set[str]:
    """Return the full names of the parameters that require a gradient, spelt as in a state dict."""
    return {
        name.replace("_fsdp_wrapped_module.", "")  # state dicts leave it out
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def freeze(model: nn.Module, names: Iterable[str]) -> int:
    """Stop the named parameters from training and return how many were trainable before."""
    wanted = set(names)
    frozen = 0
    for name, parameter in model.named_parameters():
        if name in wanted and parameter.requires_grad:
            parameter.requires_grad_(False)
            frozen += 1
    return frozen


def nonfinite_names(model: nn.Module) -> list[str]:
    """Return the names of the trainable parameters that hold a NaN or an infinity."""
    trained = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    return [name for name, p in trained if not bool(whole_tensor(torch.isfinite(p.detach()).all()))]


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return (trainable, total) numbers of scalar parameters; shared tensors count once."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


def lora_pairs(model: nn.Module, *, adapter: str = "default") -> dict[str, LoraPair]:
    """Return every LoRA pair by the clean name of the module it updates; empty without LoRA.

    Args:
        model: a model wrapped by peft, at any depth of further wrapping.
        adapter: name of the adapter in peft.
    """
    pairs: dict[str, LoraPair] = {}
    for name, module in model.named_modules():
        # Not `getattr`: asked of a thousand modules at every step, the attribute errors alone take milliseconds.
        lora_A = module._modules.get("lora_A")
        if not isinstance(lora_A, nn.ModuleDict) or adapter not in lora_A:
            continue
        weight = module.get_base_layer().weight
        is_transposed = bool(getattr(module, "fan_in_fan_out", False))
        pairs[clean_name(name + ".").rstrip(".")] = LoraPair(
            cast(nn.Parameter, lora_A[adapter].weight),
            cast(nn.Parameter, module.lora_B[adapter].weight),
            float(module.scaling[adapter]),
            weight.T if is_transposed else weight,
            is_transposed,
        )
    return pairs


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return all of a tensor of which each process holds a part, with its gradient; another tensor as it is."""
    full = getattr(tensor, "full_tensor", None)
    return full() if callable(full) else tensor


@torch.no_grad()
def checksum(tensors: Iterable[torch.Tensor]) -> tuple[tuple[float, float], ...]:
    """Return (sum, sum of squares) in float64 of every tensor: equal before and after means nothing was edited.

    NaN equals NaN here: a tensor that held one before is not edited because it holds one afterwards.
    """
    sums = [torch.stack((wide.sum(), wide.square().sum())) for wide in (t.detach().double() for t in tensors)]
    if len({pair.device for pair in sums}) == 1:  # one wait for the device instead of one per tensor
        sums = list(torch.stack(sums).cpu())
    # One object for every NaN: tuples and sets look at identity before they look at values.
    return tuple(tuple(math.nan if math.isnan(x) else x for x in pair.tolist()) for pair in sums)  # type: ignore[misc]
