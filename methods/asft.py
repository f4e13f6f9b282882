"""AsFT: penalise the part of a LoRA update that leaves the alignment direction.

Formula: for every module with a LoRA pair, ``V = W_aligned - W_base`` and ``C = V V^T / ||V||_F``; the term is
``sum over modules of || (I - C) dW ||_F^2`` with ``dW = scale * B A``, added to the task loss with ``weight``.

Points: ``prepare`` (V per module, stored once), ``prepare_model`` (pair V with the LoRA modules by name),
``loss_term``.

Reference: Anchoring Safety in Fine-Tuning, arXiv:2506.08473, section 3; code PKU-YuanGroup/AsFT@07b606e (read only,
re-derived). This is the form of the reference code; the formula printed in the paper, ``V (V^T V)^-1 V^T``, is the
identity for square matrices of full rank, so its penalty would be zero.

Deviations: the update includes the LoRA scale (``include_scale: false`` gives the reference's behaviour); the term is
one per optimizer step (the reference adds it to every micro-batch undivided, so its strength grows with the
accumulation count); modules are paired by name, not by position.

Cost: no extra forward pass; two products of ``(out, in) x (in, rank)`` size per module and micro-batch; V is kept in
float32 outside the module tree (4 bytes x out x in per module).

Does not compose with: full fine-tuning (it needs LoRA pairs).

Defaults: ``weight`` 1.0 as in the paper, which calls 0.1 to 10 insensitive.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from framework.composition import StepContext
from framework.errors import ConfigError, WiringError
from framework.method import Method, MethodStore
from framework.model_files import model_fingerprint
from framework.parameters import LoraPair, lora_pairs
from framework.registry import register_method

__all__ = ["AsFT", "AsFTConfig", "asft_penalty", "isotropic_penalty"]


@dataclass(frozen=True)
class AsFTConfig:
    """Settings of AsFT."""

    weight: float = 1.0
    """Strength of the penalty, >= 0."""
    base: str | None = None
    """Folder of the unaligned model; null takes the model that entered ``align``."""
    include_scale: bool = True
    """Whether the update includes LoRA's alpha / rank; the reference code leaves it out."""

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: lists every problem.
        """
        problems = []
        if (
            isinstance(self.weight, bool)
            or not isinstance(self.weight, (int, float))
            or not 0 <= self.weight < math.inf
        ):
            problems.append(f"Expected `weight` to be a number >= 0, but got {self.weight!r}.")
        if self.base is not None and not isinstance(self.base, str):
            problems.append(f"Expected `base` to be a folder or null, but got {self.base!r}.")
        if not isinstance(self.include_scale, bool):
            problems.append(f"Expected `include_scale` to be true or false, but got {self.include_scale!r}.")
        if problems:
            raise ConfigError(problems)


def asft_penalty(A: torch.Tensor, B: torch.Tensor, V: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
    """Return ``|| (I - V V^T / ||V||_F) scale B A ||_F^2`` without forming an ``(out, out)`` matrix.

    Args:
        A: ``(rank, in)``.
        B: ``(out, rank)``.
        V: alignment direction ``(out, in)``, not all zero.
        scale: factor of the update.

    Returns:
        Scalar, in the dtype of the inputs.

    Ref: arXiv:2506.08473 section 3; code PKU-YuanGroup/AsFT@07b606e (read only, re-derived).

    Example:
        >>> V = torch.eye(2)  # C = I / sqrt(2)
        >>> round(float(asft_penalty(torch.eye(2), torch.eye(2), V)), 4)  # 2 * (1 - 1/sqrt(2))^2
        0.1716
    """
    off = B - V @ (V.T @ B) / torch.linalg.matrix_norm(V)
    return scale**2 * ((off.T @ off) * (A @ A.T)).sum()


def isotropic_penalty(A: torch.Tensor, B: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
    """Return ``|| scale B A ||_F^2``: what the penalty would be without any projector.

    Args:
        A: ``(rank, in)``.
        B: ``(out, rank)``.
        scale: factor of the update.
    """
    return scale**2 * ((B.T @ B) * (A @ A.T)).sum()


@register_method("asft", config=AsFTConfig)
class AsFT(Method):
    """AsFT in the form of its reference code."""

    config: AsFTConfig

    def __init__(self, config: AsFTConfig) -> None:
        """Keep the settings; directions come with ``prepare``."""
        super().__init__(config)
        # Kept outside the module tree: frozen and large, it must not enter checkpoints.
        self._directions: dict[str, torch.Tensor] = {}
        self._folder: Path | None = None

    def prepare(self, model: nn.Module, datamodule: Any, store: MethodStore) -> None:
        """Compute V for every module with a LoRA pair and store it under a fingerprint of the two models."""
        aligned = store.model("start", method=self.name)
        base = Path(self.config.base) if self.config.base else store.model("base", method=self.name)
        names = sorted(lora_pairs(model))
        if not names:
            raise WiringError("Method `asft` needs LoRA pairs, but the model has none. Set `adapter.kind: lora`.")
        key = {"aligned": model_fingerprint(aligned), "base": model_fingerprint(base), "modules": names}
        self._folder = store.artifacts.find("alignment_direction", key)
        if self._folder is None:
            with store.artifacts.writing("alignment_direction", key) as folder:
                save_file(weight_difference(aligned, base, names), folder / "directions.safetensors")
            self._folder = store.artifacts.path("alignment_direction", key)

    def prepare_model(self, model: nn.Module) -> None:
        """Pair every LoRA module with its direction, by name."""
        if self._folder is None:
            raise WiringError(
                "Method `asft` has no alignment direction yet. Call "
                "`prepare_methods(methods, model, datamodule, store)` before `fit`."
            )
        with safe_open(self._folder / "directions.safetensors", "pt") as file:
            stored = set(file.keys())
            pairs = lora_pairs(model)
            missing = sorted(set(pairs) - stored)
            if missing or not pairs:
                raise WiringError(
                    f"Expected an alignment direction for each of the {len(pairs)} LoRA modules, but got none for "
                    f"{missing[:3]}. Prepare the method again for this adapter."
                )
            self._directions = {
                name: V.T if pair.is_transposed else V for name, pair in pairs.items() for V in [file.get_tensor(name)]
            }
        self.count("modules_matched", len(self._directions))
        self.count("stored_numbers", sum(V.numel() for V in self._directions.values()))

    def loss_term(self, ctx: StepContext) -> torch.Tensor | None:
        """Return the penalty summed over modules, in float32."""
        pairs = lora_pairs(ctx.model)
        device = next(iter(pairs.values())).A.device
        with torch.autocast(device.type, enabled=False):
            penalties, plain = [], []
            for name, pair in pairs.items():
                V = self._direction(name, device)
                A, B, scale = pair.A.float(), pair.B.float(), self._scale(pair)
                penalties.append(asft_penalty(A, B, V, scale=scale))
                plain.append(isotropic_penalty(A.detach(), B.detach(), scale=scale))
            penalty, isotropic = torch.stack(penalties).sum(), torch.stack(plain).sum()
        if ctx.step % 10 == 0 and (total := float(isotropic)) > 0:
            self.report("anisotropy", float(penalty.detach()) / total)
        return penalty

    def _scale(self, pair: LoraPair) -> float:
        return pair.scale if self.config.include_scale else 1.0

    def _direction(self, name: str, device: torch.device) -> torch.Tensor:
        V = self._directions[name]
        if V.device != device:
            V = self._directions[name] = V.to(device)
        return V


def weight_difference(aligned: Path, base: Path, modules: list[str]) -> dict[str, torch.Tensor]:
    """Return ``W_aligned - W_base`` in float32 for each named module ``(out, in)``.

    Args:
        aligned: folder with safetensors weights.
        base: folder with safetensors weights of the same architecture.
        modules: clean module names, without ``.weight``.

    Raises:
        WiringError: a module is missing or shaped differently, or the two models are equal there.
    """
    ours, theirs = _tensors(aligned, modules), _tensors(base, modules)
    differing = [name for name in modules if ours[name].shape != theirs[name].shape]
    if differing:
        raise WiringError(
            f"Expected aligned and base model to have equal shapes, but `{differing[0]}` is "
            f"{tuple(ours[differing[0]].shape)} and {tuple(theirs[differing[0]].shape)}. Name the right `base`."
        )
    directions = {name: ours[name] - theirs[name] for name in modules}
    zero = [name for name, V in directions.items() if not V.any()]
    if zero:
        raise WiringError(
            f"Expected aligned and base model to differ, but {len(zero)} of {len(modules)} modules are equal "
            f"(`{zero[0]}` first): there is no alignment direction. Align those modules too, or name another `base`."
        )
    return directions


def _tensors(folder: Path, modules: list[str]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            keys = set(file.keys())
            for name in modules:
                if f"{name}.weight" in keys:
                    found[name] = file.get_tensor(f"{name}.weight").float()
    missing = [name for name in modules if name not in found]
    if missing:
        raise WiringError(
            f"Expected `{folder}` to hold the weights of {len(modules)} modules, but `{missing[0]}` is not there. "
            "Name a folder of a plain model of the same architecture."
        )
    return found
