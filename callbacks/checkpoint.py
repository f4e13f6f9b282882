"""A checkpoint writer that never replaces a good checkpoint with a bad one."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelCheckpoint

from framework.errors import TrainingError
from framework.parameters import nonfinite_names

__all__ = ["FiniteCheckpoint"]


class FiniteCheckpoint(ModelCheckpoint):
    """Saves every ``n`` steps, but only weights that are finite and only between two optimizer steps."""

    _step_seen = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember the step training starts from; its checkpoint is the one being resumed."""
        super().on_train_start(trainer, pl_module)
        self._step_seen = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Leave out micro-batches that made no step: a checkpoint there would lose the gradient gathered so far."""
        if trainer.global_step != self._step_seen:
            self._step_seen = trainer.global_step
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        # Every way of saving (steps, time, epoch end, exception) ends here, before an older file is removed.
        bad = nonfinite_names(trainer.lightning_module)
        if bad:
            raise TrainingError(
                f"Expected every trained weight to be finite, but got {len(bad)} that are not after step "
                f"{trainer.global_step} (`{bad[0]}` first). The last good checkpoint was kept; lower the learning rate."
            )
        super()._save_checkpoint(trainer, filepath)
