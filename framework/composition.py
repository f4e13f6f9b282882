"""Composing methods: the callback list, the loss terms, the manifest, preparation and edits without training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint
from torch import nn

from framework.conductor import check_order, joins_seam
from framework.errors import ConfigError, TrainingError, WiringError
from framework.files import to_plain
from framework.method import Method, MethodStore, _model_of

__all__ = [
    "StepContext",
    "apply_edits",
    "attach_loss_terms",
    "check_edit_only",
    "check_manifest",
    "collect_loss_terms",
    "compose",
    "manifest",
    "methods_of",
    "prepare_methods",
]

MANIFEST_KEY = "seawall_manifest"


@dataclass(frozen=True)
class StepContext:
    """What a loss term may look at: the module, the micro-batch and what the forward pass gave."""

    module: pl.LightningModule
    batch: Any
    outputs: Any

    @property
    def model(self) -> nn.Module:
        """The model being trained."""
        return _model_of(self.module)

    @property
    def step(self) -> int:
        """Optimizer steps done so far."""
        return int(self.module.trainer.global_step)

    def token_mean(self, values: torch.Tensor) -> torch.Tensor:
        """Return the mean of per-token ``values`` over the reply tokens of the whole optimizer step.

        The sum over this micro-batch is divided by the reply tokens of all micro-batches and processes, and scaled back
        for Lightning's division by the accumulation count and the averaging over processes.

        Args:
            values: ``(tokens,)``, one value per reply token of this micro-batch.
        """
        return values.float().sum() * token_mean_scale(self.module.trainer, self.batch)


def token_mean_scale(trainer: pl.Trainer, batch: Any) -> float:
    """Return what a sum over this micro-batch's reply tokens is multiplied by to give its share of the step's mean.

    Raises:
        WiringError: the batch does not say how many reply tokens the step has, or its step has another number of
            micro-batches than the trainer accumulates.
    """
    tokens = getattr(batch, "step_reply_tokens", 0)
    accumulated = trainer.accumulate_grad_batches
    parts = accumulated * trainer.world_size
    if not tokens:
        raise WiringError(
            "Expected the batch to carry `step_reply_tokens`, but got none: a mean over tokens would depend on how the "
            "step is cut into micro-batches. Use `datamodules.finetune.FineTuneDataModule`."
        )
    given = getattr(batch, "step_micro_batches", accumulated)
    if given != accumulated:
        raise WiringError(
            f"Expected the data's step to have {accumulated} micro-batches, as the trainer accumulates, but got "
            f"{given}. Set `accumulate_grad_batches={given}`, or another `micro_batch_size`."
        )
    return parts / tokens


def methods_of(trainer: pl.Trainer) -> list[Method]:
    """Return the trainer's methods in callback order."""
    return [callback for callback in trainer.callbacks if isinstance(callback, Method)]  # type: ignore[attr-defined]


def compose(
    methods: Sequence[Method],
    *,
    observers: Sequence[pl.Callback] = (),
    writers: Sequence[pl.Callback] = (),
    order: Sequence[str] = (),
) -> list[pl.Callback]:
    """Return the callback list: methods, then observers, then writers.

    Args:
        methods: in config order.
        observers: callbacks that watch.
        writers: ``Checkpoint`` subclasses, which Lightning moves to the end anyway.
        order: names of methods whose order matters; they take these places among themselves.

    Raises:
        ConfigError: ``order`` names a method that is not there, or one twice.
        WiringError: two methods fill the same non-commuting point and ``order`` does not name both.
    """
    by_name = {method.name: method for method in methods}
    unknown = [name for name in order if name not in by_name]
    if unknown:
        raise ConfigError(
            f"Expected `order` to name methods of this stage, but got {unknown}; they are {list(by_name)}."
        )
    if len(set(order)) < len(order):
        raise ConfigError(f"Expected `order` to name every method once, but got {list(order)}.")
    ranked = iter([by_name[name] for name in order])
    arranged = [next(ranked) if method.name in order else method for method in methods]
    for method in arranged:
        method.planned_order = tuple(m.name for m in arranged)
        method.declared_order = tuple(order)
    callbacks = [*arranged, *observers, *writers]
    if arranged:
        check_order([c for c in callbacks if not isinstance(c, Checkpoint)])
    return callbacks


def collect_loss_terms(ctx: StepContext) -> dict[str, torch.Tensor]:
    """Return every method's weighted loss term by name, in callback order.

    Each value, its weight and its share are reported by the method. A term whose weight is 0 is not computed.

    Raises:
        WiringError: a term that is no float32 scalar or is not connected to the graph.
        TrainingError: a term that is not finite.
    """
    trainer = ctx.module.trainer
    terms: dict[str, torch.Tensor] = {}
    for method in methods_of(trainer):
        if "loss_term" not in method.points or method.weight == 0.0:
            continue
        term = method.loss_term(ctx)
        if term is None:
            continue
        _check_term(method, term)
        weighted = method.weight * term
        method.count("loss_calls")
        method.note_term(weighted)
        if is_check_step(trainer, weighted.device):
            value = float(weighted.detach())
            if value != value or abs(value) == float("inf"):
                raise TrainingError(
                    f"Expected the loss term of `{method.name}` to be finite, but got {value} at step {ctx.step}."
                )
            method.report("term", value / method.weight)
            method.report("weight", method.weight)
        terms[method.name] = weighted
    return terms


def is_check_step(trainer: pl.Trainer, device: torch.device) -> bool:
    """Return whether values are looked at in this step: always on CPU, every ``log_every_n_steps`` elsewhere.

    Reading a value waits for the device, so it is not done on every step of a GPU.
    """
    every = max(1, trainer.log_every_n_steps)  # type: ignore[attr-defined]
    return device.type == "cpu" or trainer.global_step % every == 0


def _check_term(method: Method, term: Any) -> None:
    if not isinstance(term, torch.Tensor) or term.ndim != 0 or term.dtype not in (torch.float32, torch.float64):
        shown = f"{tuple(term.shape)} {term.dtype}" if isinstance(term, torch.Tensor) else repr(term)
        raise WiringError(f"Expected `{method.name}.loss_term` to return a float32 scalar, but got {shown}.")
    if torch.is_grad_enabled() and not term.requires_grad:
        raise WiringError(
            f"Expected `{method.name}.loss_term` to be connected to the graph, but its value has no gradient: it would "
            "be logged and change nothing. Do not detach it; return None when there is nothing to add."
        )


def attach_loss_terms(module: pl.LightningModule) -> pl.LightningModule:
    """Make any LightningModule ask the methods for their loss terms, by wrapping ``training_step`` on the instance.

    Args:
        module: its ``training_step`` returns a loss tensor or a dict with ``loss``.

    Returns:
        The same module. Terms see the step's return value as ``ctx.outputs``.

    Raises:
        WiringError: the module asks already; every term would count twice.
    """
    if joins_seam(module):
        raise WiringError(
            f"Expected a module that does not ask for loss terms, but `{type(module).__name__}` does already: every "
            "term would count twice. Leave `attach_loss_terms` out."
        )
    original = module.training_step

    def training_step(batch: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = original(batch, *args, **kwargs)
        terms = collect_loss_terms(StepContext(module, batch, outputs))
        if not terms or outputs is None:
            return outputs
        if isinstance(outputs, Mapping):
            return {**outputs, "loss": outputs["loss"] + sum(terms.values())}
        return outputs + sum(terms.values())

    module.training_step = training_step  # type: ignore[method-assign]
    module.collects_loss_terms = True  # type: ignore[assignment]
    return module


def manifest(methods: Iterable[Method], *, base: str = "") -> dict[str, Any]:
    """Return what decides how the methods act, as plain values: names and settings in order, and the base model."""
    return {"methods": [{"name": m.name, "config": to_plain(m.config)} for m in methods], "base": base}


def check_manifest(found: Mapping[str, Any] | None, expected: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that was written by other methods or settings.

    Raises:
        WiringError: names the first difference.
    """
    if found == expected:
        return
    if found is None:
        raise WiringError(
            "Expected the checkpoint to carry a manifest of methods, but it has none. Start the run anew."
        )
    theirs = {m["name"]: m["config"] for m in found.get("methods", [])}
    ours = {m["name"]: m["config"] for m in expected.get("methods", [])}
    differences = [
        f"`{name}`: {before} in the checkpoint, {now} now"
        for name in dict.fromkeys([*theirs, *ours])
        for before, now in [_differing(theirs.get(name, "absent"), ours.get(name, "absent"))]
        if before != now
    ]
    if not differences and list(theirs) != list(ours):
        differences = [f"order {list(theirs)} in the checkpoint, {list(ours)} now"]
    if found.get("base") != expected.get("base"):
        differences.append(f"base model {found.get('base')!r} in the checkpoint, {expected.get('base')!r} now")
    raise WiringError(
        "Expected a checkpoint of the same methods, but got another: " + "; ".join(differences) + ". Resume with the "
        "settings it was written with, or delete it to start anew."
    )


def _differing(before: Any, now: Any) -> tuple[Any, Any]:
    """Return two configs reduced to the settings that differ."""
    if not isinstance(before, Mapping) or not isinstance(now, Mapping):
        return before, now
    keys = [key for key in {**before, **now} if before.get(key, "absent") != now.get(key, "absent")]
    return {key: before.get(key, "absent") for key in keys}, {key: now.get(key, "absent") for key in keys}


def prepare_methods(methods: Sequence[Method], model: nn.Module, datamodule: Any, store: MethodStore) -> None:
    """Run every method's offline ``prepare``, in order; call it before ``fit`` when you bring your own trainer."""
    for method in methods:
        method.prepare(model, datamodule, store)


def check_edit_only(methods: Sequence[Method]) -> None:
    """Refuse methods that a stage without steps gives nothing to do; before ``prepare``, which may take long.

    Args:
        methods: of the stage.

    Raises:
        WiringError: a method that can only act in training.
    """
    for method in methods:
        training_only = [point for point in method.points if point not in ("prepare", "edit_weights")]
        if "edit_weights" not in method.points or training_only:
            raise WiringError(
                f"Method `{method.name}` acts in training (`{', '.join(training_only) or 'no point'}`), but this stage "
                "has no steps. Give it `max_steps`, or remove the method."
            )


def apply_edits(model: nn.Module, methods: Sequence[Method], *, order: Sequence[str] = ()) -> None:
    """Run ``edit_weights`` of every method on a model that is not trained.

    ``fit(max_steps=0)`` would return before ``on_train_end`` and silently do nothing.

    Args:
        model: edited in place.
        methods: in config order.
        order: as in ``compose``.

    Raises:
        ConfigError: ``order`` names a method that is not there, or one twice.
        WiringError: a method that can only act in training, or several methods without a declared order.
        NoEffectError: a method that changed nothing.
    """
    check_edit_only(methods)
    for method in [callback for callback in compose(methods, order=order) if isinstance(callback, Method)]:
        method._edit(model)
        method.require_effect()
