"""The guard: measures the safety of the model every N steps, and acts when a threshold is crossed.

By the rule of this project what changes the weights is a method, and everything else a callback. The guard stands
between: it contributes nothing to a step (no loss, gradient, row or edit), but with an action it decides how long
training goes on, from which state, and how strong a method is. It is a callback because it acts *on* training, as the
checkpoint writer and an interruption do, and not within a step; because it changes a result it is not silent about it:
its settings are part of the stage's key and of the checkpoint (another guard refuses to resume it), and every
measurement and decision goes into the stage's record under ``guard``. With ``action: watch`` it changes nothing.

Measuring lies in ``callbacks/safety_probe.py``, deciding in ``callbacks/guard_decisions.py``; what a roll back goes
back to is kept by ``callbacks/kept_state.py``. The first process measures and decides, and the others follow.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytorch_lightning as pl

from callbacks.guard_decisions import Decision, decide
from callbacks.kept_state import KeptState
from callbacks.safety_probe import SafetyProbe, StartState
from framework.composition import methods_of
from framework.conductor import strategy_kind
from framework.errors import ConfigError, TrainingError, WiringError
from framework.files import to_plain
from framework.guard_settings import GuardSettings
from framework.method import Method, _model_of
from framework.processes import is_main, on_main

__all__ = ["Guard"]


class Guard(pl.Callback):
    """Watches thresholds while training and acts on them."""

    def __init__(
        self,
        settings: GuardSettings,
        probe: SafetyProbe,
        *,
        kept: KeptState | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Measure nothing yet.

        Args:
            settings: thresholds and action.
            probe: measures the model.
            kept: keeps what a roll back goes back to; None keeps it in memory.
            say: tells the user a sentence; called in the first process.
        """
        self.settings = settings
        self.history: dict[str, list[tuple[int, float]]] = {}
        """(optimizer step, value) of every metric."""
        self.decisions: list[dict[str, Any]] = []
        """What was done, in order; steps at which nothing was done are left out."""
        self.stopped: str | None = None
        """Why the stage was ended early; None while it was not."""
        self._probe = probe
        self._kept = kept or KeptState()
        self._say = say
        self._start: StartState | None = None
        self._last_step = -1
        self._seen_step = -1
        self._roll_backs = 0
        self._weight: float | None = None
        self._low: float | None = None
        self._is_off = False

    # ---- hooks ---------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what the guard could not measure or act on.

        Raises:
            WiringError: a strategy that cuts the weights; the guarded method is absent, has no loss term or no weight,
                or does not take ``max_weight``.
        """
        if stage != "fit":
            return
        kind = strategy_kind(trainer)
        if kind not in ("single", "ddp"):
            raise WiringError(
                f"Expected the guard to have the whole model in one process, but the strategy is `{kind}`. Choose "
                "`trainer.strategy=ddp`, or leave `trainer.guard` out."
            )
        if self.settings.action == "raise_weight":
            method = self._method(trainer)
            _check_largest(method, self.settings.max_weight)
            if method.weight >= self.settings.max_weight:
                raise WiringError(
                    f"Expected the guard's `max_weight` to be above the weight that `{method.name}` begins with "
                    f"({method.weight:g}), but got {self.settings.max_weight:g}, so that it could never be raised. "
                    "Raise `max_weight`."
                )
            self._weight = method.weight
            self._low = self.settings.min_weight if self.settings.min_weight is not None else method.weight

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure the model that enters the stage; a resumed run goes on with what it knew.

        A guard that only watches is no part of what is resumed: without measurements of the model that entered the
        stage it has nothing to compare with, says so, and measures nothing.

        Raises:
            TrainingError: a threshold is crossed before training, so that there is nothing to go back to.
            WiringError: a guard that acts, and a checkpoint that was written without one.
        """
        self._seen_step = trainer.global_step
        if self._weight is not None:
            self._method(trainer).override_weight(self._weight)
        if self.stopped is not None:
            self._end(trainer)
        elif self._last_step < 0 and trainer.global_step > 0:
            self._miss_start(trainer.global_step)
        elif self._last_step < 0:
            self._check(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure after every ``every_n_steps``-th optimizer step and after the last one."""
        step = trainer.global_step
        if step == self._seen_step or self._is_off:
            return
        self._seen_step = step
        if step % self.settings.every_n_steps == 0 or step == trainer.max_steps:
            self._check(trainer, pl_module)

    @property
    def state_key(self) -> str:
        """Key of the guard's state in a checkpoint."""
        return "guard"

    def state_dict(self) -> dict[str, Any]:
        """Return everything a resumed run needs to end as the uninterrupted one."""
        return {
            "settings": to_plain(self.settings),
            "history": {name: [list(entry) for entry in entries] for name, entries in self.history.items()},
            "decisions": [dict(decision) for decision in self.decisions],
            "stopped": self.stopped,
            "start": None if self._start is None else tuple(self._start),
            "last_step": self._last_step,
            "roll_backs": self._roll_backs,
            "weight": self._weight,
            "kept": self._kept.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of the run that is resumed; one that only watches drops that of another guard.

        Raises:
            WiringError: it had another guard, and this one acts.
        """
        theirs, ours = state_dict["settings"], to_plain(self.settings)
        if theirs != ours:
            odd = sorted(name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name))
            if not self.settings.acts:
                self._tell(f"what was measured before is dropped, because the settings {odd} were others")
                return
            raise WiringError(
                f"Expected a checkpoint of the same guard, but got another: {odd} differ. Resume with the settings it "
                "was written with, or delete it to start anew."
            )
        self.history = {name: [(int(s), float(v)) for s, v in rows] for name, rows in state_dict["history"].items()}
        self.decisions = [dict(decision) for decision in state_dict["decisions"]]
        self.stopped = state_dict["stopped"]
        self._start = None if state_dict["start"] is None else StartState(*state_dict["start"])
        self._last_step = int(state_dict["last_step"])
        self._roll_backs = int(state_dict["roll_backs"])
        self._weight = state_dict["weight"]
        self._kept.load_state_dict(state_dict["kept"])

    def result(self) -> dict[str, Any]:
        """Return what goes into the record of the stage: settings, measurements, decisions, and why it stopped.

        A measurement that is not finite is None there: JSON has no other word for it.
        """
        return {
            "settings": to_plain(self.settings),
            "acts": self.settings.acts,
            "history": {
                name: [[step, value if math.isfinite(value) else None] for step, value in entries]
                for name, entries in self.history.items()
            },
            "decisions": self.decisions,
            "stopped": self.stopped,
            "weight": self._weight,
        }

    # ---- private -------------------------------------------------------------------------------------------------

    def _check(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        step = trainer.global_step
        if step == self._last_step:
            return
        values, decision = on_main(lambda: self._measure(pl_module))
        self._last_step = step
        for name, value in values.items():
            self.history.setdefault(name, []).append((step, value))
        if step == 0 and decision.kind in ("stop", "roll_back"):
            raise TrainingError(
                f"Expected the model that enters the stage to be on the right side of the guard's thresholds, but "
                f"{decision.reason}. Set thresholds that it meets, or align it first."
            )
        self._act(trainer, pl_module, decision)
        logged = {f"guard/{name}": value for name, value in values.items()}
        if self._weight is not None:
            logged["guard/weight"] = self._weight
        for logger in trainer.loggers:
            logger.log_metrics(logged, step=step)

    def _measure(self, pl_module: pl.LightningModule) -> tuple[dict[str, float], Decision]:
        """Return values and decision; in the first process, which alone keeps what values are compared with."""
        model = _model_of(pl_module)
        if self._start is None:
            self._start = self._probe.start(model)
        values = self._probe.measure(model, self._start)
        found = decide(self.settings, values, roll_backs=self._roll_backs, weight=self._weight, low=self._low)
        return values, found

    def _act(self, trainer: pl.Trainer, pl_module: pl.LightningModule, decision: Decision) -> None:
        step = trainer.global_step
        if decision.kind == "hold":
            if self.settings.action == "roll_back":
                self._kept.keep(trainer, pl_module)
            return
        entry: dict[str, Any] = {"step": step, "decision": decision.kind, "reason": decision.reason}
        if decision.kind == "set_weight":
            entry |= {"from": self._weight, "to": decision.weight}
            self._weight = decision.weight
            self._method(trainer).override_weight(float(decision.weight or 0.0))
            self._tell(f"step {step}: weight of `{self.settings.method}` {entry['from']:.4g} -> {entry['to']:.4g}")
        elif decision.kind == "at_max_weight":
            if self.decisions and self.decisions[-1]["decision"] == decision.kind:
                return  # said once, until the weight has moved
            entry["weight"] = self._weight
            self._tell(
                f"step {step}: {decision.reason}, and the weight of `{self.settings.method}` can rise no further"
            )
        elif decision.kind == "roll_back":
            entry["to_step"] = self._kept.step
            goes_on = self.settings.after_roll_back == "go_on"
            self._roll_backs += 1
            entry["learning_rate_factor"] = self.settings.rate_factor if goes_on else None
            self._restore(trainer, pl_module, rate_factor=self.settings.rate_factor if goes_on else 1.0)
            self._tell(f"step {step}: rolled back to step {self._kept.step}, because {decision.reason}")
            if not goes_on:
                self._stop(trainer, f"{decision.reason}; rolled back to step {self._kept.step}")
        elif self.settings.action == "roll_back":
            # No roll back is left to go on from, but what the stage gives is safe all the same.
            entry["to_step"] = self._kept.step
            self._restore(trainer, pl_module)
            self._stop(trainer, f"{decision.reason}; rolled back to step {self._kept.step}")
        else:
            self._stop(trainer, decision.reason)
        self.decisions.append(entry)

    def _stop(self, trainer: pl.Trainer, reason: str) -> None:
        self.stopped = reason
        self._end(trainer)
        self._tell(f"step {trainer.global_step} of {trainer.max_steps}: stopped, because {reason}")

    def _end(self, trainer: pl.Trainer) -> None:
        trainer.should_stop = True
        for method in methods_of(trainer):
            method.cut_short = True

    def _restore(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *, rate_factor: float = 1.0) -> None:
        """Go back to the kept state; the record goes on with what was measured of it, for it is what there is now."""
        self._kept.restore(trainer, pl_module, rate_factor=rate_factor)
        for entries in self.history.values():
            values = [value for step, value in entries if step == self._kept.step]
            entries += [(trainer.global_step, value) for value in values[-1:]]
        for method in methods_of(trainer):
            method.weights_restored(_model_of(pl_module))

    def _miss_start(self, step: int) -> None:
        """Measure nothing in a run that goes on from a step whose guard left nothing."""
        if self.settings.acts:
            raise WiringError(
                f"Expected a checkpoint that was written under this guard, but got one of step {step} without its "
                "measurements. Delete it to start anew, or set `action: watch`."
            )
        self._is_off = True
        self._tell(
            f"step {step}: nothing is measured, because the run goes on from a checkpoint without measurements of the "
            "model that entered the stage"
        )

    def _tell(self, text: str) -> None:
        if is_main():
            self._say(f"guard, {text}")

    def _method(self, trainer: pl.Trainer) -> Method:
        """Return the method whose weight is raised."""
        found = {method.name: method for method in methods_of(trainer)}.get(str(self.settings.method))
        if found is None or "loss_term" not in found.points or found.weight <= 0:
            raise WiringError(
                f"Expected the guard's `method` to be a method of this stage with a loss term and a weight above 0, "
                f"but got {self.settings.method!r}. A term of weight 0 is never set up; give it a small one."
            )
        return found


def _check_largest(method: Method, largest: float) -> None:
    """Refuse a weight that the method's own config would refuse: many weights are shares of 1."""
    config: Any = method.config
    if not is_dataclass(config) or isinstance(config, type) or "weight" not in {field.name for field in fields(config)}:
        return
    try:
        replace(config, weight=largest)
    except ConfigError as error:
        raise WiringError(
            f"Expected the guard's `max_weight` to be a weight that `{method.name}` takes, but got {largest:g}: "
            f"{error.problems[0]} Lower `max_weight`."
        ) from error
