"""Fits of the tiny model under a guard; as a script, one of two gloo processes that writes its results to a folder."""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.strategies import DDPStrategy

from callbacks.checkpoint import FiniteCheckpoint
from callbacks.guard import Guard
from callbacks.safety_probe import StartState
from framework.guard_settings import GuardSettings
from tests.conftest import make_model
from tests.tiny_runs import TinyData, TokenTerm, make_lora, run_fit

STEPS = 6
SHARED = {
    "stop": {"action": "stop"},
    "roll_back": {"action": "roll_back", "after_roll_back": "go_on", "rate_factor": 0.05},
    "raise_weight": {"action": "raise_weight", "method": "token_term", "weight_step": 5.0},
}
"""Guards that are tried out on two processes."""


def trained(model):
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


class DistanceProbe:
    """Takes the distance from the start for what is lost of a margin of 1: it falls as the model moves."""

    def start(self, model):
        return StartState(trained(model).clone(), torch.zeros(1, 1))

    def measure(self, model, start):
        moved = float((trained(model) - start.direction).norm())
        return {
            "refusal_margin": 1.0 - moved,
            "direction_cosine": 1.0,
            "direction_auroc": 1.0,
            "kl_to_start": moved,
        }


class Steps(pl.Callback):
    """Keeps the weights and the learning rate after every step; breaks off at one."""

    def __init__(self, break_at=None):
        self.break_at = break_at
        self.weights, self.rates = {}, {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.break_at:
            raise KeyError("cut")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.weights[trainer.global_step] = trained(pl_module.model)
        self.rates[trainer.global_step] = trainer.optimizers[0].param_groups[0]["lr"]


def fit(guard, *, methods=(), folder=None, resume=False, break_at=None, **options):
    steps = Steps(break_at)
    observers = [steps] if guard is None else [guard, steps]
    writers = [FiniteCheckpoint(dirpath=folder, every_n_train_steps=2, filename="{step}")] if folder else []
    path = sorted(folder.glob("*.ckpt"))[-1] if resume else None
    run = run_fit(
        make_lora(make_model()),
        methods,
        data=TinyData(steps=STEPS, rows=4),
        observers=observers,
        writers=writers,
        ckpt_path=path,
        total_steps=STEPS,
        **{"max_steps": STEPS, **options},
    )
    return run, steps


def methods_for(settings):
    return [TokenTerm()] if "method" in settings else []


def guard_at(bound, settings):
    return Guard(GuardSettings(**{"every_n_steps": 1, "min_refusal_margin": bound, **settings}), DistanceProbe())


def main(folder: Path, bound: float) -> None:
    torch.set_num_threads(1)
    results = {}
    for name, settings in SHARED.items():
        strategy = DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=60))
        guard = guard_at(bound, settings)
        options = {"strategy": strategy, "devices": 2, "plugins": [LightningEnvironment()]}
        run, _ = fit(guard, methods=methods_for(settings), **options)
        rank = run.trainer.global_rank
        if rank:
            # It follows: with nothing of its own to compare with it cannot have measured.
            assert guard._start is None
        results[name] = {"step": run.trainer.global_step, **guard.result()}
        torch.save(run.weights, folder / f"{name}-{rank}.pt")
    (folder / f"{rank}.json").write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
