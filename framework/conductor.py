"""Setting up all methods of a run, once, in an order that does not depend on luck.

Lightning calls ``A.setup`` completely before ``B.setup``, which would let A freeze what B has not yet added. So the
*first* method in ``trainer.callbacks`` conducts for all: checks, every ``prepare_model``, every ``configure_data``,
then one intersection of the selections. ``setup`` is the only callback hook that runs before the strategy wraps the
model and the optimizer is made; freezing later crashes DistributedDataParallel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint
from torch import nn

from framework.errors import WiringError
from framework.method import NON_COMMUTING, Method, _model_of
from framework.parameters import clean_name, trainable_names

__all__ = ["check_order", "conduct_setup", "joins_seam", "strategy_kind"]


def strategy_kind(trainer: pl.Trainer) -> str:
    """Return ``single``, ``ddp``, ``fsdp``, ``fsdp2``, ``deepspeed`` or the strategy's class name."""
    name = type(trainer.strategy).__name__.lower()
    for kind in ("deepspeed", "fsdp", "ddp", "single"):
        if kind in name:
            return kind
    return "fsdp2" if "modelparallel" in name else name


def joins_seam(module: pl.LightningModule) -> bool:
    """Return whether the module's ``training_step`` asks the methods for their loss terms."""
    if getattr(module, "collects_loss_terms", False):
        return True
    code = getattr(type(module).training_step, "__code__", None)
    return code is not None and "collect_loss_terms" in code.co_names


def conduct_setup(trainer: pl.Trainer, module: pl.LightningModule, caller: Method) -> None:
    """Set up every method of ``trainer``; every caller but the first returns at once.

    Raises:
        WiringError: no parameters yet, an unsupported strategy, a wrong order, a loss method on a module that never
            asks for it, a data method without a data module, an unknown parameter name, nothing left to train.
    """
    methods = [callback for callback in trainer.callbacks if isinstance(callback, Method)]  # type: ignore[attr-defined]
    if methods[0] is not caller:
        return
    model = _model_of(module)
    if next(model.parameters(), None) is None:
        raise WiringError(
            "Expected the model to exist before `fit`, but `setup` found no parameters: a method would silently select "
            "nothing. Build the model in `__init__`, not in `configure_model`."
        )
    check_order(trainer.callbacks)  # type: ignore[attr-defined]
    _check_support(trainer, module, methods)
    base = {clean_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    for method in methods:
        _prepare_model(method, model)
    # By name: rows are mixed in the order their sources come, and the order of methods must not decide that.
    for method in sorted(methods, key=lambda method: method.name):
        _configure_data(method, getattr(trainer, "datamodule", None))
    _select(methods, model, base)


def check_order(callbacks: Sequence[pl.Callback]) -> None:
    """Check names, planned order, writers last, a declared order where it matters, and one factor of the task loss.

    Raises:
        WiringError: says which callbacks are concerned and how to put it right.
    """
    methods = [callback for callback in callbacks if isinstance(callback, Method)]
    names = [method.name for method in methods]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise WiringError(f"Expected every method once, but got {doubled} more than once. Remove the second one.")
    planned = next((m.planned_order for m in methods if m.planned_order is not None), None)
    if planned is not None and tuple(names) != planned:
        raise WiringError(f"Expected the callbacks in the order {list(planned)}, but the trainer has {names}.")
    writers = [i for i, callback in enumerate(callbacks) if isinstance(callback, Checkpoint)]
    last = max((i for i, callback in enumerate(callbacks) if isinstance(callback, Method)), default=-1)
    if writers and writers[0] < last:
        raise WiringError("Expected every method before the checkpoint writers, but a writer comes first.")
    for point in NON_COMMUTING:
        sharing = [method.name for method in methods if point in method.points]
        declared = next((m.declared_order for m in methods if m.declared_order), ())
        if len(sharing) > 1 and not set(sharing) <= set(declared):
            raise WiringError(
                f"Methods {sharing} both fill `{point}`, where the order changes the result. Say which comes first: "
                f"`order: [{', '.join(sharing)}]`."
            )
    _check_edit_places([method for method in methods if "edit_weights" in method.points])
    _check_task_loss(methods)


def _check_task_loss(methods: Sequence[Method]) -> None:
    """Refuse two methods that change the factor of the task loss: each takes from the one that is there without it."""
    settings = {method.name: method.task_loss_setting for method in methods}
    found = {name: setting for name, setting in settings.items() if setting is not None}
    if len(found) > 1:
        remedies = ", ".join(f"`{setting}` for `{name}`" for name, setting in found.items())
        raise WiringError(
            "Expected at most one method of a stage to change the factor of the loss of the stage's own rows, but got "
            f"{' and '.join(f'`{name}`' for name in found)}: each takes its share from the whole loss, and together "
            f"they could train against these rows. Leave it as it is with all but one of them: {remedies}."
        )


def _check_edit_places(editors: Sequence[Method]) -> None:
    for place, should in enumerate(editors):
        wanted = {"first": 0, "last": len(editors) - 1}.get(should.edit_place or "", place)
        if wanted != place:
            others = [method.name for method in editors if method is not should]
            right = [should.name, *others] if should.edit_place == "first" else [*others, should.name]
            raise WiringError(
                f"Expected `{should.name}` to come {should.edit_place} among the methods that edit the finished weights"
                f", but got {[method.name for method in editors]}. Write `order: [{', '.join(right)}]`."
            )


def _check_support(trainer: pl.Trainer, module: pl.LightningModule, methods: Sequence[Method]) -> None:
    kind = strategy_kind(trainer)
    for method in methods:
        if kind not in method.supports:
            raise WiringError(
                f"Method `{method.name}` supports {sorted(method.supports)}, but the trainer's strategy is `{kind}`. "
                "Choose one of those with `trainer.strategy=`."
            )
        if "loss_term" in method.points and not joins_seam(module):
            raise WiringError(
                f"Method `{method.name}` adds a loss term, but `{type(module).__name__}.training_step` never asks for "
                "it. Call `collect_loss_terms(StepContext(self, batch, outputs))` there and add the terms, or wrap the "
                "module with `attach_loss_terms(module)`."
            )


def _prepare_model(method: Method, model: nn.Module) -> None:
    before = {id(p): p for p in model.parameters()}
    method.prepare_model(model)
    added = [p for p in model.parameters() if id(p) not in before]
    if added:
        method.count("parameters_added", sum(p.numel() for p in added))


def _configure_data(method: Method, datamodule: Any) -> None:
    if "configure_data" not in method.points:
        return
    if not hasattr(datamodule, "add_source") or not hasattr(datamodule, "num_contributions"):
        raise WiringError(
            f"Method `{method.name}` adds data, but the trainer's data module is {type(datamodule).__name__}, which "
            "has no `add_source` or no `num_contributions`. Use `datamodules.finetune.FineTuneDataModule`, or give "
            "yours both."
        )
    before = datamodule.num_contributions
    method.configure_data(datamodule)
    method.count("sources_added", datamodule.num_contributions - before)


def _select(methods: Sequence[Method], model: nn.Module, base: Mapping[str, nn.Parameter]) -> None:
    keep = set(base)
    for method in methods:
        if "select_parameters" not in method.points:
            continue
        wanted = set(method.select_parameters(frozenset(base)))
        unknown = sorted(wanted - set(base))
        if unknown:
            raise WiringError(
                f"Method `{method.name}` keeps {unknown[:3]}, but they are not among the {len(base)} trainable "
                "base parameters: a method may freeze, never unfreeze."
            )
        method.count("parameters_frozen", len(base) - len(wanted))
        keep &= wanted
    # The tensors, not their names: a method that wrapped the model has renamed them.
    for name in set(base) - keep:
        base[name].requires_grad_(False)
    if not trainable_names(model):
        raise WiringError(
            f"Expected at least one trainable parameter, but {[m.name for m in methods]} together froze all of them."
        )
