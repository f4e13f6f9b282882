"""Interpolation towards the unaligned model: take alignment back without any training.

Formula: ``W = (1 - f) W_target + f W_unaligned`` for every tensor, for several factors ``f``; 0 is the target, 1 the
unaligned model, bit for bit. What is measured in between says how much of the way back refusals survive.

Reference: Wortsman et al., CVPR 2022, arXiv:2109.01903, section 3 eq. 1, turned round; the same arithmetic as the
method ``wise_ft`` (``framework/weight_space.py``).

Deviations: ours as an attack. Linear merging only.

Cost: no query, no training step; one pass over the weights of both models a factor.

Needs: the unaligned model of the same shapes and tokenizer (``base``).
"""

# ruff: noqa: RUF009 - `setting` is dataclasses.field with a rule, which ruff does not know.

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from experiments.attacks.interface import AttackedModel, ModelAttack, ModelTarget, register_attack
from experiments.attacks.model_folders import (
    Stopwatch,
    list_problems,
    missing_base,
    nothing_changed,
    passing_folder,
    write_edited,
)
from framework.errors import ConfigError, WiringError
from framework.fields import SHARE, check_instance, setting
from framework.weight_files import WeightFiles, check_same_tokenizer
from framework.weight_space import interpolate

__all__ = ["Interpolation", "InterpolationConfig"]


@dataclass(frozen=True)
class InterpolationConfig:
    """Settings of interpolation."""

    factors: list[float] = setting(factory=lambda: [0.25, 0.5, 0.75, 1.0], rule=SHARE)
    """How far to go towards the unaligned model, each from 0 to 1."""

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: lists every problem.
        """
        check_instance(self)
        if problems := list_problems(factors=self.factors):
            raise ConfigError(problems)


@register_attack("interpolation", config=InterpolationConfig)
class Interpolation(ModelAttack):
    """Weights between the target and its unaligned model."""

    kind = "weights"
    unit = "edits"
    config: InterpolationConfig

    @property
    def num_models(self) -> int:
        """One a factor."""
        return len(self.config.factors)

    def missing(self, target: ModelTarget) -> str | None:
        """Return the sentence for a target without its unaligned model."""
        return missing_base(target, attack=self.name, use="go towards it")

    def make(self, target: ModelTarget, folder: Path) -> Iterator[AttackedModel]:
        """Yield one model a factor.

        Raises:
            ConfigError: the target comes without its unaligned model.
            WiringError: the two models have other tokens or shapes, or the same weights.
        """
        if target.base is None:
            raise ConfigError(str(self.missing(target)))
        check_same_tokenizer(target.folder, target.base)
        theirs = WeightFiles(target.base)
        for factor in self.config.factors:
            setting_ = {"factor": factor}
            if factor == 0.0:
                yield AttackedModel(target.folder, 0, setting_, {"tensors_changed": 0})
                continue
            watch = Stopwatch()

            def change(name: str, value: torch.Tensor, share: float = factor) -> torch.Tensor:
                other = theirs.read(name).tensor
                if other.shape != value.shape:
                    raise WiringError(
                        f"Expected the target and its unaligned model to have equal shapes, but `{name}` is "
                        f"{tuple(value.shape)} and {tuple(other.shape)}. Name the model the target was made of."
                    )
                return interpolate(value, other, share=share)

            with passing_folder(folder / f"factor-{factor:g}") as place:
                changed = write_edited(target, place, change)
                if not changed:
                    raise nothing_changed(
                        f"{self.name} {factor:g}",
                        "every tensor of the target equals the unaligned model's or is too near to move",
                        "Check that `target.base` is the model before alignment, and raise the factor.",
                    )
                yield AttackedModel(place, 0, setting_, {"tensors_changed": changed}, {"seconds": watch.lap()})
