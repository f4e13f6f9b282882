"""Tampering with the adapter that carries the safety: dropped, scaled, swapped, joined or merged in 16 bits.

With ``W`` the model before the adapter and ``D`` the adapter's update, the attacked models are: ``dropped`` W;
``scaled`` W + f D for several factors f; ``swapped`` W + D' with another adapter's update D'; ``joined`` W + D + D';
``merged`` W + D rounded to bfloat16, which is how adapters are usually merged and may lose small updates.

Reference: none.

Deviations: ours; the operations are those that adapter hubs and serving stacks offer.

Cost: no query, no training step; one pass over the weights a model.

Needs: the adapter in peft's form (LoRA) and the model it was added to (``adapter``, ``before_adapter``); ``other`` for
swapped and joined.
"""

# ruff: noqa: RUF009 - `setting` is dataclasses.field with a rule, which ruff does not know.

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

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
from framework.errors import ConfigError, ModelError
from framework.fields import Rule, check_instance, setting
from framework.files import read_json
from framework.models import LoadedModel, merge_adapter
from framework.weight_edits import scale_pairs
from framework.weight_files import StoredWeight, WeightFiles

__all__ = ["AdapterTampering", "AdapterTamperingConfig"]

Operation = Literal["dropped", "scaled", "swapped", "joined", "merged"]
FACTOR = Rule("a number from -2 to 2", lambda value: -2 <= value <= 2)
WITH_OTHER = ("swapped", "joined")
FORMATS = (torch.bfloat16, torch.float16)
"""In which the model before may have been loaded, or the target written."""
LEAST_ALIKE = 0.999
"""Share of the numbers of a tensor that must be what model and adapter make together."""
FINEST = 1e-5
"""Relative spacing of float32 numbers that were computed in another order."""


@dataclass(frozen=True)
class AdapterTamperingConfig:
    """Settings of tampering with the adapter."""

    operations: list[Operation] = setting(factory=lambda: ["dropped", "scaled", "merged"])
    """What is done to the adapter."""
    factors: list[float] = setting(factory=lambda: [0.25, 0.5, 2.0, -1.0], rule=FACTOR)
    """Factors of ``scaled``, each from -2 to 2; 0 is dropped, 1 changes nothing."""
    other: str | None = None
    """Folder of another adapter for the same model; needed for swapped and joined."""

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: lists every problem.
        """
        check_instance(self)
        problems = list_problems(operations=self.operations)
        problems += list_problems(factors=self.factors) if "scaled" in self.operations else []
        wanting = [one for one in WITH_OTHER if one in self.operations]
        if wanting and not self.other:
            problems.append(
                f"Expected `other` to name another adapter for {' and '.join(wanting)}, but got {self.other!r}. Give "
                "its folder."
            )
        if problems:
            raise ConfigError(problems)


@register_attack("adapter", config=AdapterTamperingConfig)
class AdapterTampering(ModelAttack):
    """The model with its adapter dropped, scaled, swapped, joined by another, or merged in 16 bits."""

    kind = "weights"
    unit = "edits"
    config: AdapterTamperingConfig

    @property
    def num_models(self) -> int:
        """One an operation, and one a factor."""
        return len(self._plans(Path()))

    def missing(self, target: ModelTarget) -> str | None:
        """Return the sentence for a target whose adapter is not apart."""
        named = {"adapter": target.adapter, "before_adapter": target.before_adapter}
        absent = [name for name, folder in named.items() if folder is None]
        if not absent:
            return None
        return (
            f"Expected the target of `{self.name}` to come with its adapter apart, but got no "
            f"{' and no '.join(f'`target.{name}`' for name in absent)}. Name the folder of the adapter and that of "
            "the model it was added to, or leave the attack out."
        )

    def make(self, target: ModelTarget, folder: Path) -> Iterator[AttackedModel]:
        """Yield one model an operation, and for scaled one a factor.

        Raises:
            ConfigError: the adapter is not apart.
            ModelError: a folder holds no LoRA adapter that fits the model, or model and adapter do not make the target.
            WiringError: the target has the weights of the model before its adapter.
        """
        if target.adapter is None or target.before_adapter is None:
            raise ConfigError(str(self.missing(target)))
        plans = self._plans(target.adapter)
        for adapter in {path for _, parts, _ in plans for path, _ in parts}:
            check_adapter(adapter)
        check_target(target, target.before_adapter, target.adapter)
        for number, (setting_, parts, dtype) in enumerate(plans):
            if not parts:
                yield AttackedModel(target.before_adapter, 0, setting_)
                continue
            watch = Stopwatch()
            with passing_folder(folder / f"adapter-{number}") as place:
                loaded = with_adapters(load_exact(target.before_adapter), parts)
                if dtype is not None:
                    plain: Any = loaded.model
                    plain.to(dtype).float()
                save_exact(loaded, place)
                yield AttackedModel(place, 0, setting_, cost={"seconds": watch.lap()})

    def _plans(self, own: Path) -> list[tuple[dict[str, Any], list[tuple[Path, float]], torch.dtype | None]]:
        """Return setting, adapters with factors, and rounding of every model."""
        other = Path(self.config.other or "")
        plans: list[tuple[dict[str, Any], list[tuple[Path, float]], torch.dtype | None]] = []
        for operation in self.config.operations:
            named = {"operation": operation}
            if operation == "scaled":
                plans += [({**named, "factor": factor}, [(own, factor)], None) for factor in self.config.factors]
            else:
                parts = {
                    "dropped": [],
                    "swapped": [(other, 1.0)],
                    "joined": [(own, 1.0), (other, 1.0)],
                    "merged": [(own, 1.0)],
                }[operation]
                plans.append((named, parts, torch.bfloat16 if operation == "merged" else None))
        return plans


def check_adapter(folder: Path) -> None:
    """Refuse a folder that holds no LoRA adapter.

    Raises:
        ModelError: says what it holds.
    """
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise ModelError(f"Expected `{folder}` to hold adapter_config.json, but got none. Name a folder of an adapter.")
    kind = read_json(path).get("peft_type")
    if kind != "LORA":
        raise ModelError(f"Expected `{folder}` to hold a LoRA adapter, but got {kind!r}. Name a LoRA adapter.")


@torch.no_grad()
def check_target(target: ModelTarget, before: Path, adapter: Path) -> None:
    """Refuse a model and an adapter that do not make the target: what is attacked would be another model.

    Args:
        target: to be made.
        before: folder of the model without the adapter.
        adapter: folder of the LoRA adapter.

    Raises:
        ModelError: names the first tensor that is not their sum, as far as the numbers are stored.
        WiringError: the target has the weights of the model before, so that the adapter is not in it.
    """
    whole: Any = with_adapters(load_exact(before), [(adapter, 1.0)]).model
    ours, theirs = WeightFiles(target.folder), WeightFiles(before)
    is_moved = False
    for name, parameter in whole.named_parameters():
        stored, plain = ours.read(name), theirs.read(name).tensor
        is_alike = stored.tensor.shape == parameter.shape and is_sum(stored, plain, parameter.detach() - plain)
        if not is_alike:
            raise ModelError(
                f"Expected `target.before_adapter` with `target.adapter` to make the target, but got other numbers in "
                f"`{name}`. Name the adapter and the model that `{target.folder}` was merged of."
            )
        is_moved = is_moved or not torch.equal(stored.tensor, plain)
    if not is_moved:
        raise nothing_changed(
            "adapter",
            "the target has the weights of `target.before_adapter`",
            "Name the model that holds the adapter, written in a format that keeps its update.",
        )


def is_sum(stored: StoredWeight, plain: torch.Tensor, update: torch.Tensor) -> bool:
    """Return whether a weight is the plain one and an update, within the rounding of what was stored and loaded.

    Args:
        stored: of the target.
        plain: before the update, float32, the same shape.
        update: float32, the same shape.
    """
    whole = stored.tensor
    coarser = [torch.finfo(dtype).eps for dtype in FORMATS if torch.equal(whole.to(dtype).float(), whole)]
    spacing = max([stored.spacing, FINEST, *coarser])
    least = torch.finfo(torch.bfloat16).eps * float(update.square().mean().sqrt())
    for dtype in (torch.float32, *FORMATS):
        rounded = plain.to(dtype).float()
        room = spacing * (whole.abs() + rounded.abs()) + least
        if float(((whole - rounded - update).abs() <= room).double().mean()) >= LEAST_ALIKE:
            return True
    return False


def with_adapters(loaded: LoadedModel, parts: Sequence[tuple[Path, float]]) -> LoadedModel:
    """Return a model with the updates of adapters added, each times its factor, in float32.

    Args:
        loaded: plain, in float32; is used up.
        parts: folders of LoRA adapters and factors.

    Raises:
        ModelError: an adapter is damaged, does not fit the model, or changes nothing.
    """
    from peft import PeftModel  # takes seconds to import
    from safetensors import SafetensorError

    model: Any = loaded.model
    for folder, factor in parts:
        try:
            wrapped = PeftModel.from_pretrained(model, str(folder))
        except (SafetensorError, ValueError, RuntimeError, OSError) as error:
            raise ModelError(
                f"Expected `{folder}` to hold a complete adapter for this model, but got: {error}. Name another."
            ) from error
        if not scale_pairs(wrapped, factor):
            raise ModelError(f"Expected the adapter `{folder}` to change the model, but its update is zero.")
        model = merge_adapter(wrapped)
    return replace(loaded, model=model)
