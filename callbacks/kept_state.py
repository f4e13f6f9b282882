"""The last good state of a run, to go back to: trained weights and optimizer, in memory or in a file.

What methods keep for themselves (anchors, counters, the order of rows) goes on as it is: steps that were taken back
were taken.
"""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from framework.errors import TrainingError
from framework.files import write_atomic
from framework.parameters import clean_name
from framework.processes import on_main

__all__ = ["KeptState"]

REFERENCED = 2
"""Checkpoints that may be resumed from: the file each of them goes back to stays."""


class KeptState:
    """Keeps one state: in memory, and then also in checkpoints, or in a file that checkpoints name.

    An adapter is small, and so are its checkpoints; a whole model and its optimizer are three times the model, which
    has no place in memory beside training or in every checkpoint.
    """

    def __init__(self, folder: Path | None = None) -> None:
        """Keep nothing yet.

        Args:
            folder: for files; None keeps in memory.
        """
        self.folder = folder
        self.step = -1
        """Optimizer step of the state; -1 without one."""
        self._state: dict[str, Any] = {}
        self._referenced: list[int] = []

    def keep(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep what is trained now; every process calls it."""
        self.step = trainer.global_step
        if self.folder is None:
            self._state = copy.deepcopy(_current(trainer, pl_module))
            return
        on_main(lambda: self._write(_current(trainer, pl_module)))

    def restore(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *, rate_factor: float = 1.0) -> None:
        """Put the state back into the model and its optimizer; every process calls it.

        The step count, the rows to come and the schedule stay where they are.

        Args:
            trainer: in training.
            pl_module: whose model it is.
            rate_factor: what the learning rate of all further steps is multiplied by.

        Raises:
            TrainingError: nothing was kept.
        """
        if self.step < 0:
            raise TrainingError("Expected a state to roll back to, but none was kept. Measure before training.")
        # The optimizer takes the tensors it is given as its own, and would train the kept ones.
        # A file is read to the CPU: on the device that wrote it there is no place beside what is trained.
        state = (
            copy.deepcopy(self._state)
            if self.folder is None
            else torch.load(self._path, map_location="cpu", weights_only=True)
        )
        with torch.no_grad():
            for name, parameter in _trained(pl_module).items():
                parameter.copy_(state["weights"][name])
        for optimizer, saved in zip(trainer.optimizers, state["optimizers"], strict=True):
            rates = [(group["lr"], group.get("initial_lr")) for group in optimizer.param_groups]
            optimizer.load_state_dict(saved)
            for group, (rate, initial) in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * rate_factor
                if initial is not None:
                    group["initial_lr"] = initial * rate_factor
        for config in trainer.lr_scheduler_configs:
            config.scheduler.base_lrs = [rate * rate_factor for rate in config.scheduler.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """Return the state, or where it lies; what a checkpoint names is not removed while that can be resumed."""
        self._referenced = [*[s for s in self._referenced if s != self.step], self.step][-REFERENCED:]
        return {"step": self.step, "state": self._state, "referenced": list(self._referenced)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of the run that is resumed."""
        self.step = int(state_dict["step"])
        self._state = dict(state_dict["state"])
        self._referenced = [int(step) for step in state_dict["referenced"]]

    @property
    def _path(self) -> Path:
        return self._file(self.step)

    def _file(self, step: int) -> Path:
        return Path(str(self.folder)) / f"step-{step}.pt"

    def _write(self, state: dict[str, Any]) -> None:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self._path, buffer.getvalue())
        stays = {self._file(step) for step in (*self._referenced, self.step)}
        for path in self._path.parent.glob("step-*.pt"):
            if path not in stays:
                path.unlink()


def _trained(pl_module: pl.LightningModule) -> dict[str, torch.nn.Parameter]:
    return {clean_name(name): p for name, p in pl_module.named_parameters() if p.requires_grad}


def _current(trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
    weights = {name: p.detach() for name, p in _trained(pl_module).items()}
    return {"weights": weights, "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers]}
