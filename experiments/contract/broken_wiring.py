"""Methods that break a promise on wiring or on what they leave behind, each in a way seen in the field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import pytorch_lightning as pl
import torch
from torch import nn

from experiments.contract.sound import ToyDeltas, ToyEdit, ToyTerm, subject_of, toy_module
from experiments.contract.subject import Subject
from framework.composition import StepContext
from framework.method import Method

__all__ = ["BROKEN_WIRING"]

IN_TARGET = (r"layers\.0\.mlp\.down_proj",)
ALWAYS = "the vector is always trained"


class LeavesParameters(Method):
    """Adds a parameter and never folds it."""

    def prepare_model(self, model: nn.Module) -> None:
        """Register it."""
        toy_module(model).extra = nn.Parameter(torch.ones(1))

    def loss_term(self, ctx: StepContext) -> torch.Tensor:
        """Use it."""
        return cast(nn.Parameter, toy_module(ctx.model).extra).square().sum()


class EditsElsewhere(Method):
    """Says it edits one matrix and scales all of them."""

    def edit_weights(self, model: nn.Module) -> None:
        """Scale."""
        for parameter in model.parameters():
            parameter.mul_(0.99)


class FoldsTwice(ToyDeltas):
    """Adds its vector once too often."""

    def edit_weights(self, model: nn.Module) -> None:
        """Fold, and fold again."""
        module = toy_module(model)
        module.weight[:3] += cast(nn.Parameter, module.toy_delta)
        super().edit_weights(model)


class LeavesHooks(Method):
    """Registers a hook and keeps no handle."""

    def prepare_model(self, model: nn.Module) -> None:
        """Register it."""
        toy_module(model).register_forward_hook(lambda module, args, output: output * 0.9)
        self.count("modules_matched")


class HooksUntilTheEnd(LeavesHooks):
    """Takes its hook away at the end of training, which a run that breaks off does not reach."""

    def prepare_model(self, model: nn.Module) -> None:
        """Register it and keep the handle to itself."""
        self._handle = toy_module(model).register_forward_hook(lambda module, args, output: output * 0.9)
        self.count("modules_matched")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remove it."""
        self._handle.remove()


class ShrinksEachTime(Method):
    """Calls shrinking a projection."""

    def project_weights(self, params: Mapping[str, nn.Parameter]) -> None:
        """Shrink."""
        for parameter in params.values():
            parameter.mul_(0.9)


class EditsOnlyWhatItSaw(Method):
    """Edits by what it gathered in training; without training there is nothing."""

    def __init__(self, config: Any) -> None:
        """Start with nothing."""
        super().__init__(config)
        self._seen = 0

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, idx: int) -> None:
        """Count batches, which no point sees."""
        self._seen += 1

    def edit_weights(self, model: nn.Module) -> None:
        """Scale by the count."""
        toy_module(model).weight.mul_(0.9**self._seen)


class MatchesRawNames(Method):
    """Finds parameters by the names of a model that nobody wrapped; the rest of its term goes on without them."""

    def loss_term(self, ctx: StepContext) -> torch.Tensor:
        """Return the tokens' term and the matched parameters' norm."""
        found = [p for n, p in ctx.model.named_parameters() if n.startswith("model.layers.0") and p.requires_grad]
        return ctx.token_mean(ctx.outputs.nll) + sum((p.square().sum() for p in found), torch.zeros(()))


class SkipsSetup(ToyTerm):
    """Runs on one device only, and takes whatever it is given."""

    supports: ClassVar[frozenset[str]] = frozenset({"single"})

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Nothing to set up, it thinks."""


class ReportsNothing(ToyTerm):
    """Promises a number and never reports it."""


@dataclass(frozen=True)
class Doubled:
    """Settings that change while they are read."""

    weight: float = 1.0
    """Doubled."""

    def __post_init__(self) -> None:
        """Double it."""
        object.__setattr__(self, "weight", 2 * self.weight)


@dataclass
class Loose:
    """Settings that anyone may change."""

    weight: float = 1.0
    """Strength."""


class HooksWithoutReason(ToyTerm):
    """Overrides a Lightning hook and does not say why."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.report("started", 1.0)


class HooksWithoutBase(ToyTerm):
    """Overrides a hook that runs the points, and cuts them off."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ends quietly."""


class NeverComplains(ToyTerm):
    """Cuts off the check of what it did."""

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ends quietly."""


class FallsBack(ToyEdit):
    """Takes zeros where its preparation is missing."""

    def edit_weights(self, model: nn.Module) -> None:
        """Edit all the same."""
        if self._base is None:
            self._base = torch.zeros(())
        super().edit_weights(model)


class LooksForPairs(Method):
    """Penalises LoRA pairs, and on another model a constant."""

    def loss_term(self, ctx: StepContext) -> torch.Tensor:
        """Return the norm of the pairs."""
        pairs = [p.square().sum() for n, p in ctx.model.named_parameters() if "lora_" in n]
        return sum(pairs, ctx.token_mean(ctx.outputs.nll.detach()) + 0.0 * ctx.outputs.nll.sum())


def _alone(method_class: type[Method], name: str, **fields: Any) -> Subject:
    return subject_of(method_class, f"broken_{name}", **fields)


BROKEN_WIRING: dict[str, tuple[tuple[Subject, str], ...]] = {
    "plain_keys": ((_alone(LeavesParameters, "leftover"), r"1 names or shapes differ .*down_proj\.extra"),),
    "edits_in_scope": (
        (_alone(EditsElsewhere, "elsewhere", no_neutral="none", edits=IN_TARGET), "outside the scope: max"),
    ),
    "folding": ((_alone(FoldsTwice, "folds_twice", no_neutral=ALWAYS, edits=IN_TARGET), "folded and hooked .* > 1e"),),
    "hooks_removed": (
        (_alone(LeavesHooks, "hook", no_neutral="none"), "hooks are left on 1 modules"),
        (_alone(HooksUntilTheEnd, "late_hook", no_neutral="none"), "after a run that broke off hooks are left on 1"),
    ),
    "projects_once": ((_alone(ShrinksEachTime, "shrinks", no_neutral="none"), "second projection: .* > 1e-06"),),
    "edit_only_stage": (
        (_alone(EditsOnlyWhatItSaw, "saw", no_neutral="none", edits=IN_TARGET), "NoEffectError: Method `broken_saw`"),
    ),
    "renamed_modules": (
        (_alone(MatchesRawNames, "raw_names", adapters=("full",)), r"inside `module` and bare: max \|difference\|"),
    ),
    "refuses_strategy": ((_alone(SkipsSetup, "setup"), r"supports \['single'\], but took ddp"),),
    "logged_keys": ((_alone(ReportsNothing, "silent", logs=("norm",)), "not logged: train/broken_silent/norm"),),
    "config_round_trip": (
        (_alone(ToyTerm, "doubled", config=Doubled), "comes back with another weight"),
        (_alone(ToyTerm, "loose", config=Loose), "expected `Loose` to be a frozen dataclass"),
    ),
    "raw_hooks": (
        (_alone(HooksWithoutReason, "no_reason"), r"`HooksWithoutReason\.on_train_start` has no docstring"),
        (_alone(HooksWithoutBase, "no_base"), r"does not call `super\(\)\.on_train_end`"),
    ),
    "no_effect_raises": ((_alone(NeverComplains, "quiet"), "was silenced, and the run ended as if all were well"),),
    "unprepared_refused": ((_alone(FallsBack, "falls_back", edits=IN_TARGET), "it ran without its preparation"),),
    "adapter_kinds": (
        (_alone(LooksForPairs, "pairs"), "full: it runs and changes nothing"),
        (_alone(ToyTerm, "unlisted", adapters=("lora",)), "full: not listed in the case, but it runs"),
    ),
}
"""By clause: broken methods, and what the clause must say of each."""
