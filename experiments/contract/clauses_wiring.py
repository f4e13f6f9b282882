"""Clauses on wiring: names, strategies, settings, logged values, hooks, and methods that do nothing."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytorch_lightning as pl
import yaml

from experiments.contract.clauses_training import EDIT_ONLY
from experiments.contract.fitting import build_model
from experiments.contract.outcome import Outcome, absent, at_most, clause, fails, identical, passes
from experiments.contract.subject import replace_point
from experiments.contract.workbench import Workbench
from framework.errors import NoEffectError, SeawallError, WiringError
from framework.files import to_plain
from framework.method import Method
from framework.module import FineTuneModule
from framework.parameters import clean_name

__all__ = [
    "adapter_kinds",
    "config_round_trip",
    "logged_keys",
    "no_effect_raises",
    "raw_hooks",
    "refuses_strategy",
    "renamed_modules",
    "unprepared_refused",
]

STRATEGIES = {
    "single": "SingleDevice",
    "ddp": "DDP",
    "fsdp": "FSDP",
    "fsdp2": "ModelParallel",
    "deepspeed": "DeepSpeed",
}
OPEN_HOOKS = {"state_dict", "load_state_dict", "state_key"}
"""Public names of a callback that a method overrides without having to say why."""
SHARE_BOUND = 1e-5


@clause("renamed modules still match, or the run is refused")
def renamed_modules(bench: Workbench) -> Outcome:
    """Inside a wrapper whose name is known (``module``) and inside one nobody knows (``inner``)."""
    if bench.is_edit_only:
        return absent(EDIT_ONLY)
    expected = bench.acting().state
    texts = []
    for wrapper in ("module", "inner"):
        try:
            found = bench.acting(wrapper=wrapper).state
        except SeawallError as error:
            texts.append(f"`{wrapper}`: refused ({type(error).__name__})")
            continue
        outcome = identical(_unwrapped(found, wrapper), expected, f"inside `{wrapper}` and bare")
        if outcome.status == "fail":
            return outcome
        texts.append(f"`{wrapper}`: same bits")
    return passes("; ".join(texts))


@clause("a strategy it does not support is refused in setup")
def refuses_strategy(bench: Workbench) -> Outcome:
    """Every kind that is not in ``supports``, with a message that says what is."""
    refused = []
    for number, subject in enumerate(bench.subjects):
        for kind in sorted(set(STRATEGIES) - set(subject.method_class.supports)):
            method = bench.create()[number]
            module = FineTuneModule(build_model(bench.spec()), learning_rate=1e-3, total_steps=1)
            try:
                method.setup(_trainer_of(kind, method), module, "fit")
            except WiringError as error:
                if f"`{kind}`" not in str(error) or f"`{subject.name}`" not in str(error):
                    return fails(f"the refusal of {kind} does not name method and strategy: {error}")
                refused.append(kind)
            else:
                return fails(
                    f"`{subject.name}` says it supports {sorted(subject.method_class.supports)}, but took {kind}"
                )
    if not refused:
        return absent("it supports every strategy")
    return passes(f"refused: {', '.join(refused)}")


@clause("every value is logged under train/<method>/")
def logged_keys(bench: Workbench) -> Outcome:
    """Term, weight and share of a loss term (share = weight x term / loss), and what the case lists."""
    if bench.is_edit_only:
        return absent(EDIT_ONLY)
    metrics = bench.acting().metrics
    count, worst = 0, 0.0
    for subject in bench.subjects:
        head = f"train/{subject.name}/"
        has_term = "loss_term" in subject.points
        needed = [*subject.case.logs, *(("term", "weight", "share") if has_term else ())]
        missing = [head + name for name in needed if head + name not in metrics]
        if missing:
            return fails(f"not logged: {', '.join(missing)}")
        count += sum(key.startswith(head) for key in metrics)
        bad = [key for key, value in metrics.items() if key.startswith(head) and not math.isfinite(value)]
        if bad:
            return fails(f"not finite: {', '.join(bad)}")
        if has_term:
            share = metrics[head + "weight"] * metrics[head + "term"] / metrics["train/loss"]
            worst = max(worst, abs(share - metrics[head + "share"]))
    if not count:
        return absent("it has no loss term and its case lists nothing")
    outcome = at_most(worst, SHARE_BOUND, f"{count} keys; |share - weight x term / loss|")
    return outcome if "loss_term" in bench.points else passes(f"{count} keys, all finite")


@clause("settings survive being written and read")
def config_round_trip(bench: Workbench) -> Outcome:
    """A frozen dataclass, through YAML and back to an equal one."""
    count = 0
    for subject, method in zip(bench.subjects, bench.create(), strict=True):
        config_class = subject.config_class
        if not dataclasses.is_dataclass(config_class) or not config_class.__dataclass_params__.frozen:  # type: ignore[attr-defined]
            return fails(f"expected `{config_class.__name__}` to be a frozen dataclass")
        config = method.config
        plain = to_plain(config)
        again = config_class(**yaml.safe_load(yaml.safe_dump(plain)))
        odd = [key for key in plain if getattr(again, key) != getattr(config, key)]
        if odd:
            return fails(f"`{subject.name}` comes back with another {', '.join(odd)}")
        count += len(plain)
    return passes(f"{count} fields come back")


@clause("a raw Lightning hook says why in its docstring and calls the base class")
def raw_hooks(bench: Workbench) -> Outcome:
    """A method works through its points; what it overrides beside them needs a reason."""
    found = 0
    for subject in bench.subjects:
        for owner in subject.method_class.__mro__:
            if owner is Method:
                break
            for name, value in vars(owner).items():
                if name.startswith("_") or name in OPEN_HOOKS or not inspect.isfunction(value):
                    continue
                if not hasattr(pl.Callback, name):
                    continue
                found += 1
                if not (value.__doc__ or "").strip():
                    return fails(f"`{owner.__name__}.{name}` has no docstring that says why it is needed")
                if name in vars(Method) and "super" not in value.__code__.co_names:
                    return fails(f"`{owner.__name__}.{name}` does not call `super().{name}`, which runs the points")
    return passes(f"{found} hooks, each with a reason") if found else absent("it overrides no Lightning hook")


@clause("a run in which it did nothing ends with an error")
def no_effect_raises(bench: Workbench) -> Outcome:
    """With each of its points silenced in turn, and with its neutral settings."""
    texts = []
    for trial in _idle_trials(bench):
        try:
            trial.run()
        except NoEffectError:
            texts.append("NoEffectError")
        except Exception as error:
            # A point that builds on the silenced one may fail in any way: that is no silence either.
            texts.append(f"{trial.what}: {type(error).__name__}")
        else:
            return fails(f"{trial.what}, and the run ended as if all were well")
    if "NoEffectError" not in texts:
        return fails(f"it never raises NoEffectError: {'; '.join(texts) or 'no point to silence'}")
    return passes(f"{texts.count('NoEffectError')} of {len(texts)} raise NoEffectError, the others refuse")


@clause("a run that was not prepared is refused")
def unprepared_refused(bench: Workbench) -> Outcome:
    """Training without ``prepare`` says how to prepare; it never goes on without the artefact."""
    if "prepare" not in bench.points:
        return absent("it needs no preparation")
    methods = bench.create()
    try:
        if bench.is_edit_only:
            bench.edited(methods, is_prepared=False)
        else:
            bench.fit(methods, is_prepared=False)
    except WiringError as error:
        if "prepare" not in str(error).lower():
            return fails(f"the refusal does not say how to prepare: {error}")
        return passes("WiringError that says how to prepare")
    except Exception as error:
        return fails(f"expected WiringError, but got {type(error).__name__}: {error}")
    return fails("it ran without its preparation")


@clause("it acts with every adapter its case lists and refuses the others")
def adapter_kinds(bench: Workbench) -> Outcome:
    """Two steps with each kind of lora and full, besides the one the other clauses use."""
    texts = []
    for kind in ("lora", "full"):
        is_listed = all(kind in subject.case.adapters for subject in bench.subjects)
        if kind == bench.adapter:
            texts.append(f"{kind}: used by all clauses")
            continue
        try:
            acting, plain = (bench.final_state(v, adapter=kind, steps=3) for v in ("acting", None))
        except SeawallError as error:
            if is_listed:
                return fails(f"{kind} is listed, but: {type(error).__name__}: {error}")
            texts.append(f"{kind}: refused ({type(error).__name__})")
            continue
        if identical(acting, plain, kind).status == "pass":
            return fails(f"{kind}: it runs and changes nothing")
        if not is_listed:
            return fails(f"{kind}: not listed in the case, but it runs")
        texts.append(f"{kind}: acts")
    return passes("; ".join(texts))


# ---- private -----------------------------------------------------------------------------------------------------


class _Trial(NamedTuple):
    """A run in which a method can have no effect."""

    what: str
    run: Callable[[], object]


def _idle_trials(bench: Workbench) -> list[_Trial]:
    trials = []
    for number, subject in enumerate(bench.subjects):
        for point in subject.points:
            if point == "prepare":
                continue

            def silenced(number: int = number, point: str = point) -> object:
                methods = bench.create()
                replace_point(methods[number], point, _SILENT[point])
                return _run_stage(bench, methods)

            trials.append(_Trial(f"`{subject.name}.{point}` was silenced", silenced))
    if not bench.no_neutral:

        def neutral() -> object:
            methods = bench.create("neutral")
            for method in methods:
                method.allow_no_effect = False
            return _run_stage(bench, methods)

        trials.append(_Trial("the settings were neutral", neutral))
    return trials


_SILENT: dict[str, Callable[[Any], Any]] = {
    "prepare_model": lambda model: None,
    "select_parameters": lambda names: set(names),
    "configure_data": lambda datamodule: None,
    "loss_term": lambda ctx: None,
    "edit_gradients": lambda params: None,
    "project_weights": lambda params: None,
    "edit_weights": lambda model: None,
}


def _run_stage(bench: Workbench, methods: list[Method]) -> object:
    return bench.edited(methods) if bench.is_edit_only else bench.fit(methods, bench.spec(steps=3))


def _trainer_of(kind: str, method: Method) -> Any:
    strategy = type(f"{STRATEGIES[kind]}Strategy", (), {})()
    return SimpleNamespace(callbacks=[method], strategy=strategy, datamodule=None)


def _unwrapped(state: dict[str, Any], wrapper: str) -> dict[str, Any]:
    return {clean_name(name.removeprefix(f"{wrapper}.")): value for name, value in state.items()}
