"""Hidden states after numbered layers of a model, computed no further than the last one asked for."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from framework.batch import Batch
from framework.errors import WiringError
from framework.text_tower import text_tower

__all__ = ["check_layers", "layer_states", "numbered_layers", "scaled_layer"]

_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.\d+$")


class _Reached(Exception):
    """The last layer asked for has answered."""


def numbered_layers(model: nn.Module, *, method: str) -> list[nn.Module]:
    """Return the modules that are one numbered layer each, in the order they stand.

    Args:
        model: wrapped or not; of one that looks at images, the layers that read and write text.
        method: who asks, for the message.

    Raises:
        WiringError: there are none, or the model looks at images and does not say which part is its decoder.
    """
    found: list[nn.Module] = []
    inside = ""
    for name, module in text_tower(model).named_modules():
        # A list of experts within a layer is numbered too.
        if _LAYER.search(name) and not (inside and name.startswith(inside)):
            found.append(module)
            inside = f"{name}."
    if not found:
        raise WiringError(
            f"Method `{method}` needs numbered layers, but no module of the model is one. Use another method."
        )
    return found


def scaled_layer(share: float, depth: int) -> int:
    """Return the layer, from 0, that lies as deep in a model of ``depth`` layers as the share says.

    Example:
        >>> scaled_layer(7 / 32, 32), scaled_layer(7 / 32, 30), scaled_layer(7 / 32, 2)
        (7, 7, 0)
    """
    return min(depth - 1, round(share * depth))


def check_layers(layers: Iterable[int], *, depth: int, name: str) -> None:
    """Refuse layers that are not there.

    Args:
        layers: numbers from 0.
        depth: layers there are.
        name: of the setting, for the message.

    Raises:
        WiringError: some number is out of range.
    """
    outside = [layer for layer in layers if not 0 <= layer < depth]
    if outside:
        raise WiringError(f"Expected `{name}` to be from 0 to {depth - 1}, but got {outside[0]}. Lower it.")


def layer_states(model: nn.Module, batch: Batch, layers: Sequence[int], *, method: str) -> list[torch.Tensor]:
    """Return the hidden states after some layers, with their graph.

    Args:
        model: the trained one, or the reference.
        batch: its rows are computed one by one, not as a tree.
        layers: numbers from 0.
        method: who asks, for the message.

    Returns:
        One ``(batch, seq, hidden)`` for each of ``layers``, in the model's compute dtype; padding holds anything.
    """
    modules = numbered_layers(model, method=method)
    # Leaving a checkpointed layer by an exception would leave its bookkeeping open.
    stops = not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    last = max(layers) if stops else -1
    seen: dict[int, torch.Tensor] = {}
    hooks = [modules[layer].register_forward_hook(_keeper(seen, layer, is_last=layer == last)) for layer in layers]
    try:
        model(**batch.model_inputs, use_cache=False, logits_to_keep=1)
    except _Reached:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return [seen[layer] for layer in layers]


def _keeper(seen: dict[int, torch.Tensor], layer: int, *, is_last: bool) -> Callable[..., None]:
    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        seen[layer] = output[0] if isinstance(output, tuple) else output
        if is_last:
            raise _Reached

    return keep
