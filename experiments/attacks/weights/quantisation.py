"""Weight-only quantisation to int8 and 4 bits: does the safety survive what deployment does to every model?

Every linear weight but the output head is rounded and widened again, so that any tool reads the result; a kernel that
keeps the packed numbers computes the same product up to the rounding of activations.

- ``int8``: ``s = max|w| / 127`` an output row, ``w <- s round(w / s)``; ``|error| <= s / 2``.
- ``int4``: groups of ``group`` inputs, ``s = (max - min) / 15``, ``w <- min + s round((w - min) / s)``.
- ``nf4``: groups of ``group`` inputs, ``s = max|w|``, ``w <- s`` times the nearest of the 16 NormalFloat values.

Reference: LLM.int8() arXiv:2208.07339 (row-wise absmax), QLoRA arXiv:2305.14314 appendix E (the 16 values); as an
attack on safety: Egashira et al., arXiv:2405.18137, whose adversarial training beforehand is not done here.

Deviations: simulated by round-to-nearest, no calibration data, no outlier columns kept in 16 bits, no double
quantisation of the scales; the embedding and the head stay as they are.

Cost: no query, no training step; one pass over the weights a format.

Needs: nothing but the weights.
"""

# ruff: noqa: RUF009 - `setting` is dataclasses.field with a rule, which ruff does not know.

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from experiments.attacks.interface import AttackedModel, ModelAttack, ModelTarget, register_attack
from experiments.attacks.model_folders import (
    Stopwatch,
    list_problems,
    load_exact,
    nothing_changed,
    passing_folder,
    save_exact,
)
from framework.errors import ConfigError, WiringError
from framework.fields import Rule, check_instance, setting
from framework.weight_files import linear_weights

__all__ = ["NF4", "Quantisation", "QuantisationConfig", "quantised"]

NOISE = 1e-6
"""Relative change up to which nothing was rounded but float32 itself."""
Format = Literal["int8", "int4", "nf4"]
GROUP = Rule("a whole number ≥ 2", lambda value: value >= 2)
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""Quantiles of a normal distribution, scaled to [-1, 1], with an exact 0."""


@dataclass(frozen=True)
class QuantisationConfig:
    """Settings of quantisation."""

    formats: list[Format] = setting(factory=lambda: ["int8", "int4", "nf4"])
    """Number formats, one model each."""
    group: int = setting(64, rule=GROUP)
    """Inputs that share a scale in 4 bits; the last group of a row may be shorter."""

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: lists every problem.
        """
        check_instance(self)
        if problems := list_problems(formats=self.formats):
            raise ConfigError(problems)


def quantised(weight: torch.Tensor, kind: Format, *, group: int = 64) -> torch.Tensor:
    """Return a weight rounded to a number format and widened again.

    Args:
        weight: ``(out, in)``, finite.
        kind: the format.
        group: inputs that share a scale in 4 bits.

    Returns:
        float32 ``(out, in)``.

    Example:
        >>> quantised(torch.tensor([[127.0, 1.4, -126.6]]), "int8").tolist()
        [[127.0, 1.0, -127.0]]
    """
    wide = weight.detach().float()
    width = wide.shape[1]
    size = width if kind == "int8" else min(group, width)
    tail = -width % size
    # The last group is filled up with numbers that are in it, which move neither its largest nor its smallest.
    filled = torch.cat([wide, wide[:, -1:].expand(-1, tail)], dim=1) if tail else wide
    groups = filled.reshape(wide.shape[0], -1, size)
    return _rounded(groups, kind).reshape(wide.shape[0], -1)[:, :width].contiguous()


def _rounded(groups: torch.Tensor, kind: Format) -> torch.Tensor:
    """Return ``(rows, groups, inputs)`` on the grid of every group."""
    if kind == "int4":
        low = groups.amin(dim=-1, keepdim=True)
        step = (groups.amax(dim=-1, keepdim=True) - low) / 15.0
        return low + step * torch.round((groups - low) / _not_zero(step))
    largest = groups.abs().amax(dim=-1, keepdim=True)
    if kind == "int8":
        step = largest / 127.0
        return step * torch.round(groups / _not_zero(step))
    values = torch.tensor(NF4, device=groups.device)
    borders = (values[1:] + values[:-1]) / 2.0
    return largest * values[torch.bucketize(groups / _not_zero(largest), borders)]


def _not_zero(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale == 0, torch.ones_like(scale), scale)


@register_attack("quantisation", config=QuantisationConfig)
class Quantisation(ModelAttack):
    """The target in fewer bits."""

    kind = "weights"
    unit = "edits"
    config: QuantisationConfig

    @property
    def num_models(self) -> int:
        """One a format."""
        return len(self.config.formats)

    def make(self, target: ModelTarget, folder: Path) -> Iterator[AttackedModel]:
        """Yield one model a format.

        Raises:
            WiringError: the model has no linear weights, or rounding moves none of them.
        """
        for kind in self.config.formats:
            watch = Stopwatch()
            with passing_folder(folder / kind) as place:
                loaded = load_exact(target.folder)
                facts = quantise_model(loaded.model, kind, group=self.config.group)
                if facts["relative_error"] < NOISE:
                    raise nothing_changed(
                        f"{self.name} {kind}",
                        "every weight lies on the grid of that format already",
                        "Check whether the target was quantised before, and name the model it was made of.",
                    )
                save_exact(loaded, place)
                yield AttackedModel(place, 0, {"format": kind}, facts, {"seconds": watch.lap()})


@torch.no_grad()
def quantise_model(model: torch.nn.Module, kind: Format, *, group: int) -> dict[str, float]:
    """Round every linear weight but the output head in place, and say what that did.

    Args:
        model: plain, in float32.
        kind: the format.
        group: inputs that share a scale in 4 bits.

    Returns:
        How many matrices, and the norm of the change relative to that of the weights.

    Raises:
        WiringError: there are no linear weights.
    """
    weights = linear_weights(model)
    if not weights:
        raise WiringError("Expected `model` to hold linear modules to quantise, but got none. Leave the attack out.")
    error = size = 0.0
    for weight in weights.values():
        rounded = quantised(weight.oriented, kind, group=group)
        error += float((rounded - weight.oriented).double().square().sum())
        size += float(weight.oriented.double().square().sum())
        weight.oriented.copy_(rounded)
    return {"matrices": len(weights), "relative_error": (error / size) ** 0.5 if size else 0.0}
