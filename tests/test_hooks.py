"""The order of Lightning's hooks, which everything here relies on: an upgrade that changes it fails here, readably."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

SEQUENCE = """
data.prepare_data data.setup A.setup B.setup module.setup module.configure_model
module.configure_optimizers
A.on_fit_start B.on_fit_start module.on_fit_start
data.train_dataloader
A.on_train_start B.on_train_start module.on_train_start
A.on_train_epoch_start B.on_train_epoch_start module.on_train_epoch_start

A.on_train_batch_start B.on_train_batch_start module.on_train_batch_start
module.training_step
A.on_before_zero_grad B.on_before_zero_grad module.on_before_zero_grad
A.on_before_backward B.on_before_backward module.on_before_backward
A.on_after_backward B.on_after_backward module.on_after_backward
A.on_train_batch_end B.on_train_batch_end module.on_train_batch_end

A.on_train_batch_start B.on_train_batch_start module.on_train_batch_start
module.training_step
A.on_before_backward B.on_before_backward module.on_before_backward
A.on_after_backward B.on_after_backward module.on_after_backward
A.on_before_optimizer_step B.on_before_optimizer_step module.on_before_optimizer_step
module.configure_gradient_clipping optimizer.step
A.on_train_batch_end B.on_train_batch_end module.on_train_batch_end

A.on_train_epoch_end B.on_train_epoch_end module.on_train_epoch_end
writer.save
A.on_train_end B.on_train_end module.on_train_end
A.on_fit_end B.on_fit_end module.on_fit_end
data.teardown A.teardown B.teardown module.teardown
""".split()  # noqa: SIM905

HOOKS = [
    "setup",
    "on_fit_start",
    "on_train_start",
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_train_epoch_end",
    "on_train_end",
    "on_fit_end",
    "teardown",
    "on_exception",
    "on_load_checkpoint",
    "load_state_dict",
]


def recording(base: type, hooks: list[str]) -> type:
    """A subclass of ``base`` that writes down every call of ``hooks`` as ``<label>.<hook>``."""

    def record(hook):
        def called(self, *args, **kwargs):
            self.calls.append(f"{self.label}.{hook}")
            return getattr(base, hook)(self, *args, **kwargs)

        return called

    return type(f"Recording{base.__name__}", (base,), {hook: record(hook) for hook in hooks})


class Observer(pl.Callback):
    def __init__(self, label, calls):
        self.label, self.calls = label, calls

    @property
    def state_key(self):
        return self.label

    def state_dict(self):
        return {"kept": 1}


class Line(pl.LightningModule):
    """A line through the origin."""

    label = "module"

    def __init__(self, calls, *, fail=False):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2))
        self.calls, self.fail = calls, fail

    def configure_optimizers(self):
        calls = self.calls

        class Sgd(torch.optim.SGD):
            def step(self, closure=None):
                loss = closure()
                calls.append("optimizer.step")
                super().step()
                return loss

        return Sgd(self.parameters(), lr=0.1)

    def training_step(self, batch, batch_idx):
        if self.fail:
            raise KeyError("stop")
        return (self.weight * batch).sum()


class Points(pl.LightningDataModule):
    label = "data"

    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.ones(2, 2), batch_size=1)


class Writer(ModelCheckpoint):
    calls: list[str]

    def _save_checkpoint(self, trainer, filepath):
        self.calls.append("writer.save")
        super()._save_checkpoint(trainer, filepath)


MODULE_HOOKS = [hook for hook in HOOKS if hook not in ("on_exception", "load_state_dict")]


def fit(tmp_path, *, fail=False, ckpt_path=None):
    calls: list[str] = []
    observer = recording(Observer, HOOKS)
    first, second = observer("A", calls), observer("B", calls)
    more = ["configure_model", "configure_optimizers", "training_step", "configure_gradient_clipping"]
    module = recording(Line, [*MODULE_HOOKS, *more])(calls, fail=fail)
    data = recording(Points, ["prepare_data", "setup", "train_dataloader", "teardown"])(calls)
    writer = Writer(tmp_path, filename="end", save_on_train_epoch_end=True, every_n_epochs=1)
    writer.calls = calls
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        max_epochs=2 if ckpt_path else 1,
        accumulate_grad_batches=2,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[writer, first, second],
    )
    try:
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    except KeyError:
        calls.append("raised")
    return calls, trainer


def test_the_sequence_of_a_step_of_two_micro_batches(tmp_path):
    calls, trainer = fit(tmp_path)
    # `zero_grad` and the backward pass of the step that ends lie inside `optimizer.step`, which calls them back.
    assert calls == SEQUENCE
    assert isinstance(trainer.callbacks[-1], Writer)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")  # it is resumed from
def test_on_resuming_weights_and_states_come_after_set_up_and_before_the_optimizer(tmp_path):
    fit(tmp_path)
    calls, _ = fit(tmp_path, ckpt_path=tmp_path / "end.ckpt")
    restored = calls.index("module.on_load_checkpoint")
    assert calls.index("module.configure_model") < restored < calls.index("module.configure_optimizers")
    between = calls[restored + 1 : calls.index("module.configure_optimizers")]
    assert between == ["A.on_load_checkpoint", "B.on_load_checkpoint", "A.load_state_dict", "B.load_state_dict"]


def test_after_an_exception_only_on_exception_is_called(tmp_path):
    calls, _ = fit(tmp_path, fail=True)
    assert calls[calls.index("module.training_step") + 1 :] == ["A.on_exception", "B.on_exception", "raised"]
