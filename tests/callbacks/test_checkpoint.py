from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch

from callbacks.checkpoint import FiniteCheckpoint
from framework.errors import TrainingError
from tests.conftest import make_model
from tests.tiny_runs import TinyData, make_lora, run_fit


class Break(pl.Callback):
    """Puts a value into the first trainable, or the first frozen, weight after a step."""

    def __init__(self, after_step, *, frozen=False, value=torch.nan):
        self.after_step, self.frozen, self.value = after_step, frozen, value

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.after_step:
            next(p for p in pl_module.parameters() if p.requires_grad != self.frozen).data.flatten()[0] = self.value


class Steps(pl.Callback):
    """Writes down which files lie there after every micro-batch."""

    def __init__(self, folder):
        self.folder, self.seen = folder, []

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        self.seen.append((trainer.global_step, sorted(path.name for path in self.folder.glob("*.ckpt"))))


def writer(folder, **options):
    return FiniteCheckpoint(**{"dirpath": folder, "every_n_train_steps": 1, "filename": "{step}"} | options)


def finite(path):
    state = torch.load(path, weights_only=True)["state_dict"]
    return all(bool(torch.isfinite(value).all()) for value in state.values())


def test_the_newest_step_is_kept(tmp_path):
    run_fit(make_model(), writers=[writer(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["step=3.ckpt"]
    assert finite(tmp_path / "step=3.ckpt")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_the_last_good_checkpoint_is_kept(tmp_path, value):
    message = r"every trained weight to be finite, but got 1 that are not after step 2 \(`model\..*` first\)\. The last"
    with pytest.raises(TrainingError, match=message):
        run_fit(make_model(), observers=[Break(2, value=value)], writers=[writer(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["step=1.ckpt"]
    assert finite(tmp_path / "step=1.ckpt")


@pytest.mark.parametrize(
    "options",
    [{"every_n_train_steps": None, "every_n_epochs": 1, "save_on_train_epoch_end": True}, {"save_last": True}],
    ids=["epoch end", "last"],
)
def test_no_way_of_saving_writes_weights_that_are_not_finite(tmp_path, options):
    with pytest.raises(TrainingError, match="after step 3"):
        run_fit(make_model(), observers=[Break(3)], writers=[writer(tmp_path, **options)])
    assert all(finite(path) for path in tmp_path.glob("*.ckpt"))


def test_frozen_weights_are_not_looked_at(tmp_path):
    model = make_lora(make_model())
    model.unused = torch.nn.Parameter(torch.full((2,), torch.inf), requires_grad=False)
    run_fit(model, writers=[writer(tmp_path)])
    assert (tmp_path / "step=3.ckpt").exists()


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")  # it is resumed from
def test_a_resumed_run_does_not_save_between_two_micro_batches(tmp_path):
    data = {"steps": 4, "micro_batches": 4}
    run_fit(make_model(), data=TinyData(**data), writers=[writer(tmp_path, every_n_train_steps=2)], max_steps=2)
    stamp = (tmp_path / "step=2.ckpt").stat().st_mtime_ns
    run_fit(
        make_model(),
        data=TinyData(**data),
        writers=[writer(tmp_path, every_n_train_steps=2)],
        ckpt_path=tmp_path / "step=2.ckpt",
    )
    assert (tmp_path / "step=2.ckpt").stat().st_mtime_ns == stamp
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step=2.ckpt", "step=4.ckpt"]


def test_only_every_nth_step_is_saved(tmp_path):
    steps = Steps(tmp_path)
    run_fit(make_model(), data=TinyData(steps=5), observers=[steps], writers=[writer(tmp_path, every_n_train_steps=2)])
    assert steps.seen == [
        (0, []),
        (1, []),
        (2, ["step=2.ckpt"]),
        (3, ["step=2.ckpt"]),
        (4, ["step=4.ckpt"]),
    ]
