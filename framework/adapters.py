"""Trainable parameters of a run: LoRA pairs, full fine-tuning or none, and merging the pairs back in float32."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from framework.errors import ConfigError, TrainingError, WiringError
from framework.text_tower import names_outside_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["AdapterSpec", "add_adapter", "linear_module_names", "merge_adapter"]

ALL_LINEAR = "all-linear"
_KINDS = ("lora", "full", "none")


@dataclass(frozen=True)
class AdapterSpec:
    """What is trained."""

    kind: Literal["lora", "full", "none"] = "lora"
    """lora: low-rank pairs on a frozen model; full: every parameter; none: nothing (a method brings its own)."""
    rank: int = 8
    """Columns of a LoRA pair, at least 1."""
    alpha: float = 16.0
    """LoRA scale: the update is ``alpha / rank * B A``; above 0."""
    dropout: float = 0.0
    """Share of a LoRA pair's inputs dropped in training, in [0, 1)."""
    targets: tuple[str, ...] | str = ("q_proj", "v_proj")
    """Last parts of the names of the linear modules that get a pair, or ``"all-linear"`` (all but the output head)."""

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: with all problems at once.
        """
        listed = (self.targets,) if isinstance(self.targets, str) else tuple(self.targets)
        object.__setattr__(self, "targets", ALL_LINEAR if listed == (ALL_LINEAR,) else listed)
        problems = []
        if self.kind not in _KINDS:
            problems.append(f"Expected `adapter.kind` to be one of {', '.join(_KINDS)}, but got {self.kind!r}.")
        if self.rank < 1:
            problems.append(f"Expected `adapter.rank` to be a whole number >= 1, but got {self.rank!r}.")
        if not self.alpha > 0:
            problems.append(f"Expected `adapter.alpha` to be a number > 0, but got {self.alpha!r}.")
        if not 0 <= self.dropout < 1:
            problems.append(f"Expected `adapter.dropout` to be a share in [0, 1), but got {self.dropout!r}.")
        if not self.targets or not all(self.targets):
            problems.append(
                f"Expected `adapter.targets` to name at least one module, but got {self.targets!r}. "
                f"Name them as in [q_proj, v_proj], or write {ALL_LINEAR}."
            )
        if problems:
            raise ConfigError(problems)


def linear_module_names(model: torch.nn.Module) -> list[str]:
    """Return the last name parts of the linear modules a LoRA pair can sit on, output head left out, sorted."""
    get_head: Callable[[], object] | None = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    found = (name for name, module in model.named_modules() if _takes_pair(module) and module is not head)
    return sorted({name.rpartition(".")[2] for name in found})


def add_adapter(model: PreTrainedModel, spec: AdapterSpec) -> torch.nn.Module:
    """Return the model with exactly the parameters of ``spec`` trainable.

    The given model is changed in place and may be wrapped, so go on with the returned one. LoRA pairs are float32 also
    on a bfloat16 model: their updates are too small for its 8 bits. Full fine-tuning makes every parameter float32.

    Args:
        model: a plain causal language model.
        spec: what to train.

    Raises:
        WiringError: the model already carries an adapter, or a target names no linear module.
    """
    if hasattr(model, "peft_config"):
        raise WiringError(
            "Expected `model` to be a plain model, but got one that carries an adapter. "
            "Merge it first: `merge_adapter`."
        )
    if spec.kind == "lora":
        return _add_lora(model, spec)
    trains = spec.kind == "full"
    if trains:
        model.float()
        model.config.dtype = torch.float32
    model.requires_grad_(trains)
    return model


def merge_adapter(model: torch.nn.Module) -> PreTrainedModel:
    """Return the plain model with the adapter's update added, in float32 and under the original parameter names.

    The base weights are widened to float32 before the update is added: adding first would round most of it away, and a
    low-rank difference would no longer be low-rank. Works in place to spare the memory of a second model: **the given
    PEFT model is used up**, only the returned one is to be used afterwards. A model without an adapter is widened and
    returned. All parameters of the result are trainable, as after loading.

    Raises:
        TrainingError: the merged weights are not finite.
    """
    plain: Any = model.float()
    merge: Callable[..., object] | None = getattr(model, "merge_and_unload", None)
    if merge is not None:
        try:
            plain = merge(safe_merge=True)
        except ValueError as error:
            raise TrainingError(
                f"Expected the merged weights to be finite, but got: {error} Lower the learning rate and train again."
            ) from error
    plain.config.dtype = torch.float32
    plain.requires_grad_(True)
    return plain


def _add_lora(model: PreTrainedModel, spec: AdapterSpec) -> torch.nn.Module:
    from peft import LoraConfig, get_peft_model  # peft takes seconds to import

    _check_targets(model, spec.targets)
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,  # type: ignore[arg-type]  # peft divides it, fractions included
        lora_dropout=spec.dropout,
        target_modules=spec.targets if isinstance(spec.targets, str) else list(spec.targets),
        task_type="CAUSAL_LM",
        # Of an image-text model the text tower alone is adapted: no row of ours has an image.
        exclude_modules=names_outside_text(model) or None,
    )
    with warnings.catch_warnings():
        # peft asks transformers for an attribute by a name that transformers has since replaced.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        wrapped = get_peft_model(model, config)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return wrapped


def _check_targets(model: torch.nn.Module, targets: tuple[str, ...] | str) -> None:
    names = [name for name, module in model.named_modules() if _takes_pair(module)]
    if not names:
        raise WiringError("Expected `model` to hold linear modules for LoRA, but got none. Use `adapter.kind=full`.")
    if isinstance(targets, str):
        return
    missing = [t for t in targets if not any(name == t or name.endswith(f".{t}") for name in names)]
    if missing:
        raise WiringError(
            f"Expected every entry of `adapter.targets` to match a linear module, but got {missing!r}, which match "
            f"none. This model has: {', '.join(linear_module_names(model))}."
        )


def _takes_pair(module: torch.nn.Module) -> bool:
    # Conv1D is GPT-2's linear layer with the axes swapped; peft handles it.
    return isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"
