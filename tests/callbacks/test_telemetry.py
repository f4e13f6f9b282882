from __future__ import annotations

import csv
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from callbacks.telemetry import LossHistory, RefusalMarginProbe
from framework.errors import ConfigError


class Net(pl.LightningModule):
    """Draws dropout masks, so that a watcher that touches the random state changes the weights."""

    def __init__(self, fail_at: int = -1) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 1))
        self.fail_at = fail_at

    def on_train_start(self) -> None:
        self.model[2].eval()

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        if batch_idx == self.fail_at:
            raise RuntimeError("stop here")
        loss = self.model(batch).pow(2).mean()
        self.log("train/loss", loss)
        self.log("train/asft/value", 2 * loss)
        self.log("other", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def train_dataloader(self) -> torch.utils.data.DataLoader:
        torch.manual_seed(2)
        return torch.utils.data.DataLoader(torch.randn(24, 4), batch_size=2)  # type: ignore[arg-type]


def fit(callbacks: list[pl.Callback], folder: Path, *, module: Net | None = None, **options: Any) -> Net:
    module = module or Net()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        accumulate_grad_batches=2,
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **{"logger": False, **options},
    )
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    trainer.fit(module)
    return module


def noisy_probe(model: nn.Module) -> float:
    """Uses up random numbers of every generator and leaves the model in the wrong mode."""
    assert not model.training
    assert not torch.is_grad_enabled()
    torch.rand(7)
    random.random()
    np.random.rand(3)
    value = float(model(torch.ones(2, 4)).mean())
    model.train()
    return value


def test_watchers_change_nothing(tmp_path: Path) -> None:
    plain = fit([], tmp_path)
    after_plain = (torch.rand(1), random.random(), np.random.rand())
    watched = fit([LossHistory(tmp_path / "history.csv"), RefusalMarginProbe(noisy_probe, every=1)], tmp_path)
    after_watched = (torch.rand(1), random.random(), np.random.rand())
    for name, weight in plain.state_dict().items():
        assert torch.equal(weight, watched.state_dict()[name]), name
    assert after_plain == after_watched


def test_a_probe_that_leaks_would_be_seen(tmp_path: Path) -> None:
    class Leaking(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
            torch.rand(7)

    plain, leaking = fit([], tmp_path), fit([Leaking()], tmp_path)
    assert not torch.equal(plain.model[0].weight, leaking.model[0].weight)


def test_the_probe_measures_before_training_and_every_n_steps(tmp_path: Path) -> None:
    logged: list[tuple[dict[str, float], int]] = []

    class Memory(pl.loggers.logger.DummyLogger):
        def log_metrics(self, metrics: dict[str, float], step: int) -> None:
            if any(name.startswith("probe/") for name in metrics):
                logged.append((metrics, step))

    probe = RefusalMarginProbe(noisy_probe, every=3)
    fit([probe], tmp_path, logger=Memory())
    assert [step for step, _ in probe.history] == [0, 3, 6]
    assert [(m["probe/refusal_margin"], s) for m, s in logged] == [(value, step) for step, value in probe.history]
    assert len({value for _, value in probe.history}) == 3


def test_modes_are_put_back_part_by_part(tmp_path: Path) -> None:
    module = fit([RefusalMarginProbe(noisy_probe, every=1)], tmp_path)
    assert module.model[1].training
    assert not module.model[2].training


def test_an_interval_below_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="Expected `every` to be a whole number ≥ 1, but got 0"):
        RefusalMarginProbe(noisy_probe, every=0)


def test_history_has_a_row_a_step_with_means_over_micro_batches(tmp_path: Path) -> None:
    history = LossHistory(tmp_path / "history.csv")
    seen: list[float] = []

    class Spy(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
            seen.append(float(trainer.callback_metrics["train/loss"]))

    fit([history, Spy()], tmp_path)
    curves = history.curves()
    assert list(curves) == ["step", "gradient_norm", "learning_rate", "train/asft/value", "train/loss"]
    assert curves["step"] == [1, 2, 3, 4, 5, 6]
    expected = [(first + second) / 2 for first, second in zip(seen[::2], seen[1::2], strict=True)]
    assert curves["train/loss"] == pytest.approx(expected)
    assert curves["train/asft/value"] == pytest.approx([2 * value for value in expected])
    assert curves["learning_rate"] == pytest.approx([0.1 / (step + 1) for step in range(6)])
    assert all(norm is not None and norm > 0 for norm in curves["gradient_norm"])
    with (tmp_path / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["train/loss"]) for row in rows] == pytest.approx(expected)


def test_history_is_written_up_to_a_failure(tmp_path: Path) -> None:
    history = LossHistory(tmp_path / "history.csv")
    with pytest.raises(RuntimeError, match="stop here"):
        fit([history], tmp_path, module=Net(fail_at=5))
    assert history.curves()["step"] == [1, 2]
    assert len((tmp_path / "history.csv").read_text().splitlines()) == 3


def test_history_survives_in_a_checkpoint_and_drops_what_is_repeated(tmp_path: Path) -> None:
    first = LossHistory()
    fit([first], tmp_path)
    second = LossHistory()
    second.load_state_dict(first.state_dict())
    assert second.curves() == first.curves()
    fit([second], tmp_path)
    assert second.curves()["step"] == [1, 2, 3, 4, 5, 6]


def test_values_that_are_not_finite_become_none() -> None:
    history = LossHistory()
    history.load_state_dict({"rows": [{"step": 1.0, "train/loss": float("nan")}, {"step": 2.0}]})
    assert history.curves() == {"step": [1.0, 2.0], "train/loss": [None, None]}
