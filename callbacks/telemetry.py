"""Watchers of training: they record curves and never change a result."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.seed import isolate_rng
from torch import nn

from framework.conductor import strategy_kind
from framework.errors import ConfigError
from framework.files import write_atomic
from framework.parameters import whole_tensor
from framework.processes import gather

__all__ = ["LossHistory", "RefusalMarginProbe"]

PREFIX = "train/"
KEPT_ON_DEVICE = 50
"""Steps whose values stay on the device before they are fetched together; every fetch waits for the device."""


class LossHistory(pl.Callback):
    """Keeps every logged training quantity, the learning rate and the gradient norm of every optimizer step.

    Quantities are means over the step's micro-batches and processes. The gradient norm is taken after the methods'
    edits and before clipping, over all trainable parameters.
    """

    def __init__(self, path: Path | None = None) -> None:
        """Record in memory, and to a CSV file when a path is given.

        Args:
            path: written when training ends, whether it succeeded or not.
        """
        self.path = path
        self._rows: list[dict[str, float]] = []
        self._waiting: list[dict[str, Any]] = []
        self._sums: dict[str, Any] = {}
        self._counts: dict[str, int] = {}
        self._optimizer: dict[str, Any] = {}
        self._last_step = 0
        self._has_partial_norms = False
        self._shown: dict[str, Any] = {}
        self._restored: dict[str, Any] = {}

    def curves(self) -> dict[str, list[float | None]]:
        """Return one list per quantity, ``step`` first, all of one length; None where a step has no finite value."""
        self._fetch(shared=False)
        names = ["step", *sorted({name for row in self._rows for name in row} - {"step"})]
        return {name: [_finite(row.get(name)) for row in self._rows] for name in names}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember where a resumed run stands."""
        self._last_step = trainer.global_step
        # There each process holds its part of the gradient; elsewhere all of them hold the same.
        self._has_partial_norms = strategy_kind(trainer) == "fsdp"
        self._rows = [row for row in self._rows if row["step"] <= trainer.global_step]

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Log once, after resuming, what was on show before.

        A quantity that is not logged in every step stays on show until it is logged again; a resumed run has to begin
        with the values of the interrupted one, or its curves differ.
        """
        for name, value in self._restored.items():
            pl_module.log(name, value, batch_size=1)
        self._restored = {}

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Note the learning rate of this step and the norm of its gradient."""
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self._optimizer = {"learning_rate": float(optimizer.param_groups[0]["lr"])}
        if gradients:
            self._optimizer["gradient_norm"] = whole_tensor(torch.nn.utils.get_total_norm(gradients).detach())

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add a micro-batch; close the row when the optimizer moved."""
        self._shown = {
            name: value.detach()
            for name, value in trainer.callback_metrics.items()
            if name.startswith(PREFIX) and not name.endswith(("_epoch", "_step"))
        }
        for name, value in trainer.callback_metrics.items():
            if name.startswith(PREFIX) and not name.endswith("_epoch"):
                self._sums[name] = self._sums.get(name, 0) + value.detach()
                self._counts[name] = self._counts.get(name, 0) + 1
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        means = {name: total / self._counts[name] for name, total in self._sums.items()}
        self._waiting.append({"step": trainer.global_step, **means, **self._optimizer})
        self._sums, self._counts = {}, {}
        if len(self._waiting) >= KEPT_ON_DEVICE:
            self._fetch()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the file."""
        self._fetch()
        self._write(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Write what there is: the curve up to a failure says most about it."""
        self._write(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return the rows so far, so that a resumed run has the whole curve."""
        self._fetch()
        return {"rows": self._rows, "shown": {name: value.cpu() for name, value in self._shown.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the rows of the run that is resumed."""
        self._rows = list(state_dict["rows"])
        self._restored = dict(state_dict.get("shown", {}))

    def _fetch(self, *, shared: bool = True) -> None:
        """Take over the waiting rows; ``shared`` means them over processes and needs all of these to call."""
        waiting = [{name: float(value) for name, value in row.items()} for row in self._waiting]
        self._waiting = []
        if shared:
            waiting = [self._mean(rows) for rows in zip(*gather(waiting), strict=True)]
        self._rows += waiting

    def _mean(self, rows: Sequence[dict[str, float]]) -> dict[str, float]:
        """Return the means of one step's quantities over the processes that have them."""
        if len(rows) == 1:
            return rows[0]
        mean = {}
        for name in dict.fromkeys(name for row in rows for name in row):
            values = [row[name] for row in rows if name in row]
            mean[name] = sum(values) / len(values)
            if name == "gradient_norm" and self._has_partial_norms:
                mean[name] = math.hypot(*values)
        return mean

    def _write(self, trainer: pl.Trainer) -> None:
        if self.path is None or not trainer.is_global_zero:
            return
        curves = self.curves()
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(curves)
        for values in zip(*curves.values(), strict=True):
            writer.writerow(["" if value is None else f"{value:.8g}" for value in values])
        write_atomic(self.path, text.getvalue())


class RefusalMarginProbe(pl.Callback):
    """Measures the model every ``every`` optimizer steps and logs ``probe/refusal_margin``.

    Training is not touched: the random state and every module's mode are put back, and no gradient is recorded. With
    several processes each of them measures, because all have the same weights; the first one logs.
    """

    def __init__(
        self, probe: Callable[[nn.Module], float | Mapping[str, float]], *, every: int, name: str = "refusal_margin"
    ) -> None:
        """Watch one quantity of the model, or several that one look gives.

        Args:
            probe: takes the language model in evaluation mode, returns the quantity (nats for the margin), or several
                by name, ``name`` among them.
            every: optimizer steps between two measurements, at least 1; the first comes before training.
            name: logged as ``probe/<name>``.

        Raises:
            ConfigError: ``every`` is below 1.
        """
        if every < 1:
            raise ConfigError(f"Expected `every` to be a whole number ≥ 1, but got {every!r}.")
        self._probe = probe
        self._every = every
        self._name = f"probe/{name}"
        self._last_step = -1
        self._key = name
        self.histories: dict[str, list[tuple[int, float]]] = {name: []}
        """(optimizer step, value) of every quantity"""

    @property
    def history(self) -> list[tuple[int, float]]:
        """(optimizer step, value) of the quantity the probe is named after."""
        return self.histories[self._key]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure the model that enters training; a resumed run goes on with its own rhythm."""
        if trainer.global_step % self._every == 0:
            self._measure(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure in every ``every``-th step."""
        if trainer.global_step % self._every == 0:
            self._measure(trainer, pl_module)

    @property
    def state_key(self) -> str:
        """Key of this probe's state in a checkpoint; two probes never share one."""
        return f"probe/{self._name}"

    def state_dict(self) -> dict[str, Any]:
        """Return what was measured so far."""
        histories = {name: [list(entry) for entry in history] for name, history in self.histories.items()}
        return {"histories": histories, "last_step": self._last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the measurements of the run that is resumed."""
        given = state_dict.get("histories") or {self._key: state_dict["history"]}
        self.histories = {name: [(int(s), float(v)) for s, v in history] for name, history in given.items()}
        self._last_step = int(state_dict["last_step"])

    def _measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        model = getattr(pl_module, "model", pl_module)
        with untouched(model):
            found = self._probe(model)
        values = found if isinstance(found, Mapping) else {self._key: found}
        for name, value in values.items():
            self.histories.setdefault(name, []).append((trainer.global_step, float(value)))
        for logger in trainer.loggers:
            logged = {f"probe/{name}": float(value) for name, value in values.items()}
            logger.log_metrics(logged, step=trainer.global_step)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Put the model in evaluation mode without gradients, and restore modes and random states afterwards."""
    modes = {module: module.training for module in model.modules()}
    with isolate_rng(), torch.no_grad():
        try:
            model.eval()
            yield
        finally:
            # Not `model.train()`: parts of a model may be kept in evaluation mode on purpose.
            for module, mode in modes.items():
                module.training = mode


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value
