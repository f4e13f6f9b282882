"""The neurons of a model: rows of the projections into its MLPs, found by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from framework.errors import WiringError
from framework.parameters import clean_name
from framework.text_tower import text_tower
from methods.layer_freezing import layer_of

__all__ = ["Kind", "Projection", "Site", "find_projections", "find_sites"]

Kind = Literal["gate", "up"]
SPLIT: dict[str, Kind] = {"gate_proj": "gate", "up_proj": "up", "w1": "gate", "w3": "up"}
"""SwiGLU with two matrices: llama, mistral, qwen, gemma, smollm."""
FUSED = ("gate_up_proj",)
"""SwiGLU with one matrix, the gate's rows first: phi3, glm."""
PLAIN = ("c_fc", "dense_h_to_4h", "fc1", "fc_in")
"""MLPs without a gate: gpt2, neox, falcon, bloom, opt, gpt-j."""
EXPERTS = ".experts."


@dataclass(frozen=True)
class Projection:
    """A linear module into an MLP."""

    name: str
    """Clean."""
    module: nn.Module
    """What is called in a forward pass: the linear module, or the adapter layer around it."""
    weight: nn.Parameter
    """As the model stores it."""
    is_transposed: bool
    """Whether that is ``(in, out)``, as in GPT-2."""

    @property
    def num_rows(self) -> int:
        """Neurons of the module."""
        return int(self.weight.shape[1 if self.is_transposed else 0])

    @property
    def width(self) -> int:
        """Inputs of a neuron."""
        return int(self.weight.shape[0 if self.is_transposed else 1])


@dataclass(frozen=True)
class Site:
    """The neurons that are scored together: all rows of a projection, or one half of a fused one."""

    module: str
    """Clean name of the projection."""
    kind: Kind
    layer: int
    start: int
    """First row."""
    stop: int
    """One past the last row."""

    @property
    def key(self) -> str:
        """Unique in the model."""
        return f"{self.module}:{self.kind}"


def find_projections(model: nn.Module, targets: Sequence[str] = ()) -> dict[str, Projection]:
    """Return the projections into the MLPs by clean name, experts that see part of the tokens left out.

    Of an image-text model those of the text tower.

    Args:
        model: plain or with adapters.
        targets: more last parts of names to take.

    Raises:
        WiringError: there are none, or one has no weight of plain numbers.
    """
    known = {*SPLIT, *FUSED, *PLAIN, *targets}
    found: dict[str, Projection] = {}
    packed = []
    inside = {id(module) for module in text_tower(model).modules()}
    for name, module in model.named_modules():
        if id(module) not in inside:
            continue
        plain = clean_name(f"{name}.").rstrip(".")
        is_candidate = plain.rpartition(".")[2] in known and layer_of(f"{plain}.") is not None
        if not is_candidate or EXPERTS in f"{plain}." or plain in found:
            continue
        linear: Any = module.get_base_layer() if hasattr(module, "get_base_layer") else module
        weight: Any = getattr(linear, "weight", None)
        if not _is_plain(weight):
            packed.append(plain)
            continue
        found[plain] = Projection(plain, module, weight, type(linear).__name__ == "Conv1D")
    if packed:
        raise WiringError(
            f"Method `nest` adds to rows of weights, but {len(packed)} projections (`{packed[0]}` first) hold packed "
            "numbers, whose rows nothing can be folded into. Load the model unquantised."
        )
    if not found:
        names = sorted({clean_name(n).rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise WiringError(
            f"Method `nest` needs MLP projections in numbered layers, named like one of {', '.join(sorted(known))}, "
            f"but the model has none. Its linear modules are {', '.join(names) or 'none'}; name theirs with `targets`."
        )
    return found


def find_sites(projections: dict[str, Projection], *, kinds: Sequence[Kind] = ("gate", "up")) -> list[Site]:
    """Return the neurons to score, in the order of the model.

    Args:
        projections: by clean name.
        kinds: which of gate and up.

    Raises:
        WiringError: the model has none of the wanted kind.
    """
    sites = [site for projection in projections.values() for site in _sites_of(projection)]
    wanted = [site for site in sites if site.kind in kinds]
    if not wanted:
        raise WiringError(
            f"Expected `projections` to be a kind the model has, but got {' and '.join(kinds)}: its MLPs have no gate. "
            "Use `projections: up`."
        )
    return wanted


def _sites_of(projection: Projection) -> list[Site]:
    last, rows = projection.name.rpartition(".")[2], projection.num_rows
    layer = layer_of(f"{projection.name}.") or 0
    if last in FUSED:
        half = rows // 2
        return [
            Site(projection.name, "gate", layer, 0, half),
            Site(projection.name, "up", layer, half, rows),
        ]
    return [Site(projection.name, SPLIT.get(last, "up"), layer, 0, rows)]


def _is_plain(weight: Any) -> bool:
    return (
        isinstance(weight, torch.Tensor)
        and weight.ndim == 2
        and weight.is_floating_point()
        and weight.element_size() > 1
        and getattr(weight, "quant_state", None) is None
    )
