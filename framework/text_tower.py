"""The part of an image-text model that reads and writes text; of a language model, all of it."""

from __future__ import annotations

from typing import Any

from torch import nn

from framework.errors import WiringError
from framework.parameters import clean_name

__all__ = ["is_image_text", "names_outside_text", "text_prefix", "text_tower"]


def is_image_text(model: nn.Module) -> bool:
    """Return whether a model also looks at images, as its config says."""
    config: Any = getattr(model, "config", None)
    return getattr(config, "vision_config", None) is not None


def text_tower(model: nn.Module) -> nn.Module:
    """Return the decoder of an image-text model, output head left out; any other model as it is.

    Args:
        model: plain or with adapters.

    Raises:
        WiringError: the model looks at images and does not say which part is its decoder.
    """
    if not is_image_text(model):
        return model
    get: Any = getattr(model, "get_decoder", None)
    tower: Any = get() if callable(get) else None
    vision = [module for name, module in model.named_modules() if name.rpartition(".")[2].startswith("vision")]
    inside = () if tower is None else {id(module) for module in tower.modules()}
    if tower is None or tower is model or any(id(module) in inside for module in vision):
        raise WiringError(
            f"Expected the image-text model {type(model).__name__} to have a decoder apart from its vision tower, but "
            "got none from `get_decoder()`. Use an architecture of transformers that has one, e.g. SmolVLM or LLaVA."
        )
    return tower


def text_prefix(model: nn.Module) -> str:
    """Return what the plain names of the text tower's parameters begin with: nothing where it is the whole model.

    Args:
        model: plain or with adapters.

    Raises:
        WiringError: the model looks at images and does not say which part is its decoder.
    """
    tower = text_tower(model)
    return "" if tower is model else next(clean_name(f"{n}.") for n, module in model.named_modules() if module is tower)


def names_outside_text(model: nn.Module) -> list[str]:
    """Return the names of an image-text model's modules without children that are no part of its text tower."""
    if not is_image_text(model):
        return []
    inside = {id(module) for module in text_tower(model).modules()}
    leaves = [(name, module) for name, module in model.named_modules() if not any(True for _ in module.children())]
    return [name for name, module in leaves if id(module) not in inside]
