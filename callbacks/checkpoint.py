"""Checkpoints that can be trusted: finite, whole on disk, with a checksum beside each, and the last two of them.

A checkpoint is written under a temporary name, flushed, and renamed; ``<name>.json`` beside it holds its step and the
sha256 of its files. What was cut short or changed afterwards is noticed when it is looked for, and the one before it is
used. The files are what Lightning writes (plain types and tensors, loadable with ``weights_only=True``).
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelCheckpoint

from framework.errors import ModelError, TrainingError
from framework.files import hash_file, read_json, write_json
from framework.interruption import Interrupted, claim_signals
from framework.parameters import nonfinite_names

__all__ = ["FiniteCheckpoint", "FoundCheckpoint", "check_checkpoint", "find_checkpoint", "manifest_path"]

KEEP = 2
"""Newest checkpoints that stay: the one before is the way out when the last one is damaged."""
DAMAGED = ".damaged"


class FoundCheckpoint(NamedTuple):
    """Where a run can go on."""

    path: Path | None
    """The newest intact checkpoint; None when there is none."""
    step: int
    """Optimizer steps it holds; 0 without one."""
    refused: list[str]
    """One sentence for every newer checkpoint that was refused."""


def manifest_path(path: Path) -> Path:
    """Return the file beside a checkpoint that holds its step and checksums."""
    return path.with_name(f"{path.name}.json")


def check_checkpoint(path: Path) -> int:
    """Return the step of a checkpoint after comparing every byte with its checksum.

    Raises:
        ModelError: it or its checksum is missing, or it was cut short or changed.
    """
    try:
        manifest = read_json(manifest_path(path))
        step, expected = int(manifest["step"]), dict(manifest["sha256"])
        is_sealed = manifest["seal"] == _seal(step, expected)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"Expected `{path}` to have a checksum beside it, but got none that can be read "
            f"({type(error).__name__}). Delete the checkpoint."
        ) from error
    found = _checksums(path)
    if found != expected or not is_sealed:
        size = sum(file.stat().st_size for file in _files(path))
        raise ModelError(
            f"Expected `{path}` to be as it was written, but its checksum differs (sha256 {_short(found)} instead of "
            f"{_short(expected)}, {size} bytes): it was cut short or changed. Delete the checkpoint."
        )
    return step


def find_checkpoint(folder: Path, *, before: int | None = None, set_aside: bool = False) -> FoundCheckpoint:
    """Return the newest intact checkpoint of a folder.

    Args:
        folder: need not exist.
        before: only steps below this one.
        set_aside: rename what is refused to ``<name>.damaged``, and remove what a killed process left half-written.
    """
    refused = []
    if set_aside:
        for path in folder.glob(".*.tmp"):
            _remove(path)
    for path in sorted(folder.glob("*.ckpt"), key=_claimed_step, reverse=True):
        try:
            step = check_checkpoint(path)
        except ModelError as error:
            refused.append(str(error))
            if set_aside:
                _remove(path.with_name(path.name + DAMAGED))
                path.rename(path.with_name(path.name + DAMAGED))
                manifest_path(path).unlink(missing_ok=True)
            continue
        if before is None or step < before:
            return FoundCheckpoint(path, step, refused)
    return FoundCheckpoint(None, 0, refused)


class FiniteCheckpoint(ModelCheckpoint):
    """Saves every ``n`` steps, but only weights that are finite and only between two optimizer steps."""

    def __init__(self, *, should_stop: Callable[[], int | None] | None = None, **options: Any) -> None:
        """Take the options of Lightning's ``ModelCheckpoint``.

        Args:
            should_stop: asked after every step; a signal's number makes a checkpoint and raises ``Interrupted``.
            options: handed on; without ``monitor`` and with ``save_top_k=1`` the last two checkpoints are kept.
        """
        super().__init__(**options)
        self._should_stop = should_stop
        self._step_seen = 0

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Refuse to resume from a damaged checkpoint; one that another writer made has no checksum and is let through.

        Raises:
            ModelError: its checksum differs.
        """
        resumed = trainer.ckpt_path  # known only now: torch reads a changed tensor without a word
        if resumed is not None and manifest_path(Path(resumed)).is_file():
            check_checkpoint(Path(resumed))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember the step training starts from; its checkpoint is the one being resumed."""
        super().on_train_start(trainer, pl_module)
        self._step_seen = trainer.global_step
        if self._should_stop is not None:
            claim_signals()  # Lightning has put its own handler in front, which stops between two micro-batches

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Leave out micro-batches that made no step: a checkpoint there would lose the gradient gathered so far.

        Raises:
            Interrupted: a signal asked to stop; the checkpoint of this step has been written.
        """
        if trainer.global_step == self._step_seen:
            return
        self._step_seen = trainer.global_step
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._should_stop is not None:
            self._stop_if_asked(trainer, self._should_stop() or 0)

    def _stop_if_asked(self, trainer: pl.Trainer, signum: int) -> None:
        if trainer.world_size > 1:  # the signal may have reached one process only; all leave after the same step
            signum = int(trainer.strategy.reduce(_as_tensor(trainer, signum), reduce_op="max"))
        if not signum or trainer.global_step == trainer.max_steps:
            return
        if self._last_global_step_saved != trainer.global_step:
            self._save_checkpoint(trainer, self.format_checkpoint_name(self._monitor_candidates(trainer)))
        raise Interrupted(signum, f"step {trainer.global_step} of {trainer.max_steps}")

    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        # Every way of saving (steps, time, epoch end, exception) ends here, before an older file is removed.
        bad = nonfinite_names(trainer.lightning_module)
        if bad:
            raise TrainingError(
                f"Expected every trained weight to be finite, but got {len(bad)} that are not after step "
                f"{trainer.global_step} (`{bad[0]}` first). The last good checkpoint was kept; lower the learning rate."
            )
        path = Path(filepath)
        temporary = path.with_name(f".{path.name}.tmp")
        super()._save_checkpoint(trainer, str(temporary))  # by every process: a sharded strategy has to gather first
        self._last_checkpoint_saved = filepath
        if trainer.is_global_zero:
            _publish(temporary, path, trainer.global_step)
            if self._keeps_newest:
                _prune(path.parent, path)
        trainer.strategy.barrier("checkpoint")

    @property
    def _keeps_newest(self) -> bool:
        return self.monitor is None and self.save_top_k == 1

    def _remove_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        if self._keeps_newest:
            return  # done while saving
        super()._remove_checkpoint(trainer, filepath)
        if trainer.is_global_zero:
            manifest_path(Path(filepath)).unlink(missing_ok=True)


def _publish(temporary: Path, path: Path, step: int) -> None:
    """Flush a checkpoint to disk, write its checksums, and give it its name."""
    for file in _files(temporary):
        _flush(file)
    sums = _checksums(temporary)
    # First the checksums: a checkpoint under its final name always has some, whenever the process dies.
    write_json(manifest_path(path), {"step": step, "sha256": sums, "seal": _seal(step, sums)})
    if path.is_dir():
        shutil.rmtree(path)
    temporary.replace(path)
    _flush(path.parent)


def _prune(folder: Path, newest: Path) -> None:
    """Remove all but the newest checkpoint and those right before it, and checksums without a checkpoint.

    A later step than the newest can lie there too: a stage that died after its last step is resumed from the one before
    it. It is written again when training gets there, and must not push out what the run has just come from.
    """
    step = _claimed_step(newest)[0]
    others = sorted((p for p in folder.glob("*.ckpt") if p != newest), key=_claimed_step, reverse=True)
    before = [path for path in others if _claimed_step(path)[0] <= step]
    for path in set(others) - set(before[: KEEP - 1]):
        if manifest_path(path).is_file():  # without checksums it is not ours
            _remove(path)
            manifest_path(path).unlink(missing_ok=True)
    for path in folder.glob("*.ckpt.json"):
        if not path.with_suffix("").exists():
            path.unlink()


def _claimed_step(path: Path) -> tuple[int, str]:
    """Return what a checkpoint is sorted by: the step in its checksum file, else the one in its name."""
    try:
        return int(read_json(manifest_path(path))["step"]), path.name
    except (OSError, ValueError, KeyError, TypeError):
        numbers = re.findall(r"\d+", path.name)
        return int(numbers[-1]) if numbers else -1, path.name


def _files(path: Path) -> list[Path]:
    """Return the files of a checkpoint; sharded strategies write folders."""
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def _checksums(path: Path) -> dict[str, str]:
    return {str(file.relative_to(path)) if path.is_dir() else ".": hash_file(file) for file in _files(path)}


def _seal(step: int, sums: dict[str, str]) -> str:
    """Return a checksum of the checksum file itself, so that a wrong step in it is noticed too."""
    return hashlib.sha256(f"{step} {sorted(sums.items())}".encode()).hexdigest()[:16]


def _short(sums: dict[str, str]) -> str:
    return sums["."][:8] if set(sums) == {"."} else hashlib.sha256(str(sorted(sums.items())).encode()).hexdigest()[:8]


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _as_tensor(trainer: pl.Trainer, value: int) -> Any:
    import torch

    return torch.tensor(value, device=trainer.strategy.root_device)
