"""Layer freezing: train only some of the transformer layers.

Formula: none; the parameters of the chosen layers, adapters on them included, take no part in training.

Points: ``select_parameters``.

Reference: none; a control for methods that say which part of a model holds its safety.

Deviations: none.

Cost: less than plain training.

Does not compose with: a second method whose selection leaves nothing to train.

Defaults: ``freeze: bottom``; the count has no default, because it depends on the model.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from framework.errors import ConfigError, WiringError, describe_unknown
from framework.method import Method
from framework.registry import register_method

__all__ = ["LayerFreezing", "LayerFreezingConfig", "chosen_layers", "layer_of"]

Freeze = Literal["bottom", "top", "listed"]
_SIGHT = re.compile(r"(?:^|\.)(?:(?:vision|visual|image|audio|speech)\w*|qformer|\w*resampler)\.")
"""An image-text model numbers the layers that see apart from those that read and write."""
_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d+)\.")


@dataclass(frozen=True)
class LayerFreezingConfig:
    """Settings of layer freezing."""

    freeze: Freeze = "bottom"
    """bottom: the first layers; top: the last ones; listed: those in ``layers``."""
    count: int | None = None
    """How many layers, >= 0; needed with bottom and top."""
    layers: tuple[int, ...] | None = None
    """Numbers of layers from 0; needed with listed."""
    others: Literal["train", "freeze"] = "train"
    """What happens to trained parameters outside the layers (embeddings, head, norms)."""

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: lists every problem.
        """
        if isinstance(self.layers, list):
            object.__setattr__(self, "layers", tuple(self.layers))
        problems = []
        if self.freeze not in get_args(Freeze):
            problems.append(describe_unknown("freeze", str(self.freeze), get_args(Freeze)))
        if self.others not in ("train", "freeze"):
            problems.append(describe_unknown("others", str(self.others), ("train", "freeze")))
        if self.count is not None and not _is_number(self.count):
            problems.append(f"Expected `count` to be a whole number >= 0, but got {self.count!r}.")
        if self.layers is not None and not (
            isinstance(self.layers, tuple) and all(_is_number(layer) for layer in self.layers)
        ):
            problems.append(f"Expected `layers` to be a list of whole numbers >= 0, but got {self.layers!r}.")
        needed, other = ("layers", "count") if self.freeze == "listed" else ("count", "layers")
        if getattr(self, needed) is None or getattr(self, other) is not None:
            problems.append(
                f"Expected `{needed}` and not `{other}` with `freeze: {self.freeze}`, but got "
                f"{needed} {getattr(self, needed)!r} and {other} {getattr(self, other)!r}."
            )
        if problems:
            raise ConfigError(problems)


def layer_of(name: str) -> int | None:
    """Return the number of the text layer a parameter belongs to, None outside those layers.

    Example:
        >>> layer_of("model.layers.11.mlp.up_proj.weight"), layer_of("lm_head.weight")
        (11, None)
        >>> layer_of("model.vision_model.encoder.layers.3.mlp.fc1.weight")
    """
    found = _LAYER.search(name)
    if found is None or _SIGHT.search(name[: found.start() + 1]):
        return None
    return int(found[1])


def chosen_layers(present: set[int], config: LayerFreezingConfig) -> set[int]:
    """Return the layers to freeze.

    Args:
        present: numbers of the layers that have something to train.
        config: which.

    Raises:
        WiringError: there are no layers, fewer than are asked for, or none would be left.
    """
    if not present:
        raise WiringError(
            "Method `layer_freezing` needs parameters in numbered layers, but none of the trained ones has a number in "
            "its name. Use another method for this model."
        )
    ordered = sorted(present)
    if config.freeze == "listed":
        chosen = set(config.layers or ())
    else:
        count = int(config.count or 0)
        if config.freeze == "top":
            ordered.reverse()
        chosen = set(ordered[:count])
        if count > len(ordered):
            raise WiringError(
                f"Expected `count` to be at most the {len(ordered)} trained layers, but got {count}. Lower it."
            )
    unknown = sorted(chosen - present)
    if unknown:
        raise WiringError(
            f"Expected `layers` to name trained layers, but got {unknown}; they are {min(present)} to {max(present)}."
        )
    return chosen


@register_method("layer_freezing", config=LayerFreezingConfig)
class LayerFreezing(Method):
    """Freeze the first, the last or the listed layers."""

    config: LayerFreezingConfig

    def select_parameters(self, names: frozenset[str]) -> set[str]:
        """Keep what lies outside the chosen layers."""
        layers = {name: layer_of(name) for name in names}
        frozen = chosen_layers({layer for layer in layers.values() if layer is not None}, self.config)
        keeps_others = self.config.others == "train"
        return {name for name, layer in layers.items() if (keeps_others if layer is None else layer not in frozen)}


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
