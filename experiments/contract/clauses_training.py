"""Clauses on training: strength, cuts of a step, resuming, numbers, order."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from experiments.contract.case import TOLERANCE
from experiments.contract.companion import Companion
from experiments.contract.fitting import BATCH, Fitted, PowerCut, fit
from experiments.contract.outcome import (
    Outcome,
    absent,
    at_most,
    clause,
    fails,
    identical,
    passes,
    relative_difference,
)
from experiments.contract.workbench import Workbench

__all__ = [
    "accumulation",
    "acting_differs",
    "bf16_finite",
    "commutes",
    "frozen_stays",
    "neutral_is_plain",
    "repeats",
    "resume",
    "state_round_trip",
    "two_processes",
]

EDIT_ONLY = "it acts on a finished model, without training"


@clause("neutral settings equal plain training bit for bit")
def neutral_is_plain(bench: Workbench) -> Outcome:
    """Strength 0, no rows, ratio 0: the same weights as without the method."""
    if bench.no_neutral:
        return absent(f"no neutral settings: {bench.no_neutral}")
    return identical(bench.final_state("neutral"), bench.final_state(None), "neutral and plain")


@clause("the settings of the case change the result")
def acting_differs(bench: Workbench) -> Outcome:
    """A method that is switched on is not plain training, beyond rounding."""
    acting, plain = bench.final_state("acting"), bench.final_state(None)
    measured = relative_difference(acting, plain)
    text = f"relative difference from plain training {measured:.1e}"
    if not measured > TOLERANCE:
        return fails(f"{text} <= {TOLERANCE:.0e}: it does nothing", measured=measured, bound=TOLERANCE)
    return passes(f"{text} > {TOLERANCE:.0e}", measured=measured, bound=TOLERANCE)


@clause("the same run twice gives the same bits")
def repeats(bench: Workbench) -> Outcome:
    """All randomness comes from the seed."""
    if bench.is_edit_only:
        again = Workbench(bench.subjects, bench.folder).final_state("acting")
        return identical(again, bench.final_state("acting"), "second and first edit")
    return identical(bench.fit(bench.create()).state, bench.acting().state, "second and first run")


@clause("accumulation 1 x 8 equals 8 x 1")
def accumulation(bench: Workbench) -> Outcome:
    """Replies of unequal length, one row a forward pass against eight."""
    if bench.is_edit_only:
        return absent(EDIT_ONLY)
    return _same_step(
        bench, bench.acting(micro_batch_size=1, steps=3), bench.acting(steps=3), f"1 x {BATCH} and {BATCH} x 1"
    )


@clause("two processes equal one", needs_processes=True)
def two_processes(bench: Workbench) -> Outcome:
    """Gloo on CPU; the gradient of the first step and the weights after the last."""
    if bench.is_edit_only:
        return absent(EDIT_ONLY)
    if "ddp" not in bench.supports:
        return absent("it does not support ddp")
    first, second = bench.on_two_processes()
    between = identical(second.trained, first.trained, "process 1 and process 0")
    if between.status == "fail":
        return between
    recorder = bench.acting().recorder
    return _worse(
        bench,
        relative_difference(first.gradient, recorder.gradient),
        relative_difference(first.trained, recorder.trained),
        "two processes and one",
    )


@clause("interrupted and resumed equals uninterrupted bit for bit")
def resume(bench: Workbench) -> Outcome:
    """Breaks off after step 3 and goes on from the checkpoint of step 2, everything built anew."""
    if bench.is_edit_only:
        return absent(EDIT_ONLY)
    with TemporaryDirectory() as folder:
        try:
            bench.fit(bench.create(), bench.spec(checkpoints=folder, interrupt_at=3))
        except PowerCut:
            pass
        else:
            return fails("the run did not break off")
        saved = sorted(Path(folder).glob("*.ckpt"))
        if len(saved) != 1:
            return fails(f"expected one checkpoint, but found {len(saved)}")
        resumed = bench.fit(bench.create(), bench.spec(checkpoints=folder, resume_from=str(saved[0])))
    done = [step for step, _ in resumed.recorder.served]
    if done != [2, 3]:
        return fails(f"expected the resumed run to take steps 2 and 3, but it took {done}")
    return identical(resumed.state, bench.acting().state, "resumed and uninterrupted")


@clause("tensors that are not trained stay bit-identical, with weight decay too")
def frozen_stays(bench: Workbench) -> Outcome:
    """What takes no gradient, what ``select_parameters`` drops and what the case calls frozen."""
    if bench.is_edit_only:
        return absent(EDIT_ONLY)
    recorder = bench.acting(weight_decay=0.1).recorder
    promised = _promised(bench, recorder.first)
    names = sorted(recorder.untrained | promised)
    if not names:
        return absent(f"every parameter is trained (adapter {bench.adapter})")
    if not recorder.trained:
        return fails("the run took no step")
    return identical(
        {n: recorder.trained[n] for n in names if n in recorder.trained},
        {n: recorder.first[n] for n in names},
        "before and after training",
    )


@clause("bfloat16 weights and autocast give finite numbers")
def bf16_finite(bench: Workbench) -> Outcome:
    """Frozen weights in bfloat16, trainer in bf16-mixed, as on a GPU."""
    if bench.is_edit_only:
        state = bench.final_state("acting", precision="bf16-mixed")
        bad = [name for name, value in state.items() if not bool(torch.isfinite(value).all())]
        return fails(f"not finite: {bad[:3]}") if bad else passes(f"{len(state)} tensors finite")
    fitted = bench.acting(precision="bf16-mixed")
    bad = [name for name, value in fitted.state.items() if not bool(torch.isfinite(value).all())]
    bad += [key for key, value in fitted.metrics.items() if not math.isfinite(value)]
    if bad:
        return fails(f"not finite: {bad[:3]}")
    return passes(f"{len(fitted.state)} tensors and {len(fitted.metrics)} logged values finite")


@clause("the order of commuting methods does not matter")
def commutes(bench: Workbench) -> Outcome:
    """With a companion that fills every commuting point: selection, data and a loss term."""
    if bench.is_edit_only:
        return absent(EDIT_ONLY)
    ahead = _with_companion(bench, is_first=True)
    behind = _with_companion(bench, is_first=False)
    return _same_step(bench, ahead, behind, "companion first and last")


@clause("a state that was saved and loaded is the same")
def state_round_trip(bench: Workbench) -> Outcome:
    """Through a file that loads without running code, into a fresh method."""
    if bench.is_edit_only:
        return absent(EDIT_ONLY)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "state.pt"
        fresh = bench.fit(bench.create(), bench.spec(steps=3)).methods  # a proximal term is zero in the first
        for done, other in zip(bench.acting().methods, fresh, strict=True):
            saved = done.state_dict()
            torch.save(saved, path)
            other.load_state_dict(torch.load(path, weights_only=True))
            lost = _differing(saved, other.state_dict())
            if lost:
                return fails(f"`{done.name}` does not get back {lost} of its state")
    return passes(f"{sum(len(m.state_dict()) for m in fresh)} entries come back")


# ---- private -----------------------------------------------------------------------------------------------------


def _same_step(bench: Workbench, ours: Fitted, theirs: Fitted, what: str) -> Outcome:
    return _worse(
        bench,
        relative_difference(ours.recorder.gradient, theirs.recorder.gradient),
        relative_difference(ours.recorder.trained, theirs.recorder.trained),
        what,
    )


def _worse(bench: Workbench, gradient: float, weights: float, what: str) -> Outcome:
    name, measured = max(("first gradient", gradient), ("weights", weights), key=lambda pair: _rank(pair[1]))
    return at_most(measured, bench.tolerance, f"{what}: relative difference of the {name}")


def _rank(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _promised(bench: Workbench, names: Mapping[str, Any]) -> set[str]:
    patterns = [pattern for subject in bench.subjects for pattern in subject.case.frozen]
    return {name for name in names if any(re.search(pattern, name) for pattern in patterns)}


def _with_companion(bench: Workbench, *, is_first: bool) -> Fitted:
    methods = bench.create()
    companion = Companion()
    arranged = [companion, *methods] if is_first else [*methods, companion]
    return fit(bench.spec(), arranged, bench.store, order=bench.order)


def _differing(saved: Any, loaded: Any, path: str = "state") -> str:
    """Return where two states differ, empty when nowhere."""
    if isinstance(saved, Mapping) and isinstance(loaded, Mapping):
        odd = set(saved) ^ set(loaded)
        if odd:
            return f"{path}[{sorted(map(str, odd))[0]}]"
        found = (_differing(saved[key], loaded[key], f"{path}[{key}]") for key in saved)
        return next((text for text in found if text), "")
    if isinstance(saved, torch.Tensor) or isinstance(loaded, torch.Tensor):
        same = isinstance(saved, torch.Tensor) and isinstance(loaded, torch.Tensor) and torch.equal(saved, loaded)
        return "" if same else path
    return "" if saved == loaded else path
