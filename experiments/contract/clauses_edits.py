"""Clauses on what is left: key names, folding, projections, stages without training."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from experiments.contract.case import TOLERANCE
from experiments.contract.fitting import PowerCut, Recorder, build_data, build_model, plain_state
from experiments.contract.outcome import (
    Outcome,
    absent,
    at_most,
    clause,
    fails,
    identical,
    largest_difference,
    passes,
)
from experiments.contract.subject import replace_point
from experiments.contract.workbench import Workbench
from framework.batch import collate
from framework.errors import SeawallError, WiringError
from framework.method import Method

__all__ = ["edit_only_stage", "edits_in_scope", "folding", "hooks_removed", "plain_keys", "projects_once"]

LOGITS_BOUND = 1e-5
PROBE_ROWS = 4


@clause("the final model has the key names and shapes of a plain one")
def plain_keys(bench: Workbench) -> Outcome:
    """What a method added is folded or taken away at the end."""
    ours = {name: value.shape for name, value in bench.final_state("acting").items()}
    theirs = {name: value.shape for name, value in bench.final_state(None).items()}
    odd = sorted(set(ours.items()) ^ set(theirs.items()))
    if odd:
        return fails(f"{len(odd)} names or shapes differ from a plain model's ({odd[0][0]} first)")
    return passes(f"{len(ours)} keys equal")


@clause("edit_weights changes only the tensors its case names")
def edits_in_scope(bench: Workbench) -> Outcome:
    """Every other tensor is bit-identical before and after."""
    if "edit_weights" not in bench.points:
        return absent("it does not edit the final weights")
    seen = _watched(bench)
    patterns = [pattern for subject in bench.subjects for pattern in subject.case.edits]
    others = [name for name in seen.before if name in seen.after and not _matches(name, patterns)]
    changed = sum(not torch.equal(seen.before[n], seen.after[n]) for n in seen.before if n in seen.after)
    outcome = identical({n: seen.after[n] for n in others}, {n: seen.before[n] for n in others}, "outside the scope")
    if not others:
        return absent("its case says that it edits every tensor, so that nothing is outside the scope")
    if outcome.status == "fail":
        return outcome
    return passes(
        f"{changed} tensors changed, all in scope; {len(others)} others bit-identical", measured=0.0, bound=0.0
    )


@clause("folded logits equal hooked logits")
def folding(bench: Workbench) -> Outcome:
    """What ``prepare_model`` added computes the same as what ``edit_weights`` folds it into."""
    folders = [s for s in bench.subjects if {"prepare_model", "edit_weights"} <= set(s.points)]
    reasons = [s.case.not_folding for s in folders if s.case.not_folding]
    if not folders or reasons:
        return absent("; ".join(reasons) or "it does not both add to the model and edit it")
    if others := [s.name for s in bench.subjects if "edit_weights" in s.points and s not in folders]:
        return absent(f"{' and '.join(others)} edits the weights too, so the folded model computes something else")
    seen = _watched(bench)
    measured = float((seen.logits_after - seen.logits_before).abs().max() / seen.logits_before.abs().max())
    return at_most(measured, LOGITS_BOUND, "folded and hooked logits: relative max |difference|")


@clause("no forward hook is left behind")
def hooks_removed(bench: Workbench) -> Outcome:
    """After the run, and after a run that broke off, the model computes by itself."""
    model = bench.edited(bench.create()) if bench.is_edit_only else bench.acting().model
    if hooked := _hooked(model):
        return fails(f"hooks are left on {len(hooked)} modules ({hooked[0]})")
    if bench.is_edit_only:
        return passes("no hook left")
    recorder = Recorder(interrupt_at=1)
    with contextlib.suppress(PowerCut):
        bench.fit(bench.create(), recorder=recorder)
        return fails("the run did not break off where it was told to")
    if recorder.model is None or not recorder.steps:
        return fails("the run broke off before its first step")
    if hooked := _hooked(recorder.model):
        return fails(f"after a run that broke off hooks are left on {len(hooked)} modules ({hooked[0]})")
    return passes("no hook left, nor after a run that broke off")


@clause("projecting twice equals projecting once")
def projects_once(bench: Workbench) -> Outcome:
    """``project_weights`` puts the weights where a second call leaves them."""
    if "project_weights" not in bench.points:
        return absent("it does not project weights after a step")
    worst: list[float] = []
    methods = bench.create()
    for method in methods:
        if "project_weights" in method.points:
            replace_point(method, "project_weights", _projecting_twice(method.project_weights, worst))
    bench.fit(methods)
    if not worst:
        return fails("it was never asked to project")
    return at_most(max(worst), TOLERANCE, "second projection: max |difference|")


@clause("a stage without training acts, or is refused")
def edit_only_stage(bench: Workbench) -> Outcome:
    """``apply_edits`` changes the model, or says that the method acts in training."""
    if bench.acts_without_training:
        untouched = plain_state(build_model(bench.spec()))
        try:
            edited = plain_state(bench.edited(bench.create()))
        except SeawallError as error:
            return fails(f"{type(error).__name__}: {error}")
        measured = largest_difference(edited, untouched)
        text = f"max |change| {measured:.1e}"
        return passes(f"{text} > 0", measured=measured, bound=0.0) if measured > 0 else fails(f"{text}: it did nothing")
    try:
        bench.edited(bench.create())
    except WiringError as error:
        return passes(f"refused: {str(error).split(', but')[0]}")
    except SeawallError as error:
        return fails(f"expected WiringError, but got {type(error).__name__}: {error}")
    return fails("a method that acts in training went through a stage without training")


# ---- private -----------------------------------------------------------------------------------------------------


def _hooked(model: nn.Module) -> list[str]:
    """Return the names of modules with hooks; the outermost one has no name."""
    return [
        name or "the model"
        for name, module in model.named_modules()
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    ]


class _Edit(NamedTuple):
    """The model around the first and the last ``edit_weights``, and what it computes."""

    before: dict[str, torch.Tensor]
    after: dict[str, torch.Tensor]
    logits_before: torch.Tensor
    logits_after: torch.Tensor


def _watched(bench: Workbench) -> _Edit:
    return bench.once("watched edit", lambda: _watch(bench))


def _watch(bench: Workbench) -> _Edit:
    seen: dict[str, Any] = {}
    methods = bench.create()
    for method in methods:
        if "edit_weights" in method.points:
            replace_point(method, "edit_weights", _seeing(bench, method, seen))
    model = bench.edited(methods) if bench.is_edit_only else bench.fit(methods).model
    return _Edit(seen["before"], seen["after"], seen["logits"], _logits(bench, model))


def _seeing(bench: Workbench, method: Method, seen: dict[str, Any]) -> Callable[[nn.Module], None]:
    edit = method.edit_weights

    def edit_weights(model: nn.Module) -> None:
        if "before" not in seen:
            seen["before"], seen["logits"] = plain_state(model), _logits(bench, model)
        edit(model)
        seen["after"] = plain_state(model)

    return edit_weights


def _logits(bench: Workbench, model: nn.Module) -> torch.Tensor:
    rows = build_data(bench.spec()).encoded[:PROBE_ROWS]
    batch = collate(rows, example_ids=range(len(rows)), pad_id=0, step_reply_tokens=1)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        logits: torch.Tensor = model(**batch.model_inputs).logits[batch.attention_mask.bool()].double()
    model.train(was_training)
    return logits


def _projecting_twice(
    project: Callable[[Mapping[str, nn.Parameter]], None], worst: list[float]
) -> Callable[[Mapping[str, nn.Parameter]], None]:
    def project_weights(params: Mapping[str, nn.Parameter]) -> None:
        project(params)
        once = {name: value.detach().clone() for name, value in params.items()}
        project(params)
        worst.append(largest_difference({n: p.detach() for n, p in params.items()}, once))
        for name, value in params.items():
            value.copy_(once[name])

    return project_weights


def _matches(name: str, patterns: list[str]) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)
