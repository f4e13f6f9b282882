from __future__ import annotations

import io

import pytorch_lightning as pl
import torch
from rich.console import Console

from experiments.progress import Steps, TrainingProgress


def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=120)


def shown(console: Console) -> str:
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_plain_lines_come_about_every_tenth_with_the_time_left() -> None:
    stream = io.StringIO()
    with Steps(Console(file=io.StringIO()), stream=stream) as steps:
        update = steps.task("align", 200)
        for done in range(201):
            update(done, 200, note="loss 1.0")
        update(200, 200)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 11
    assert lines[0] == "align: 0/200 (0 %), started, loss 1.0"
    assert lines[5].startswith("align: 100/200 (50 %), ")
    assert "left" in lines[5]
    assert "left" not in lines[-1]


def test_the_time_left_is_told_from_the_own_work_and_not_from_its_start_up(monkeypatch) -> None:
    now, stream = [0.0], io.StringIO()
    monkeypatch.setattr("experiments.progress.time.monotonic", lambda: now[0])
    with Steps(Console(file=io.StringIO()), stream=stream) as steps:
        update = steps.task("mine", 1000)
        for done in range(1, 1001):
            now[0] = 10.0 + done
            update(done)
    started, first, *_ = stream.getvalue().splitlines()
    assert started == "mine: 1/1000 (0 %), started"
    assert first.startswith("mine: 10/1000 (1 %), 33 min")


def test_what_was_done_before_a_run_went_on_does_not_shorten_the_time_left(monkeypatch) -> None:
    now, stream = [0.0], io.StringIO()
    monkeypatch.setattr("experiments.progress.time.monotonic", lambda: now[0])
    with Steps(Console(file=io.StringIO()), stream=stream) as steps:
        update = steps.task("train", 100)
        update(50)
        now[0] = 20.0
        update(60)
    assert stream.getvalue().splitlines() == ["train: 50/100 (50 %), started", "train: 60/100 (60 %), 1 min 20 s left"]


def test_plain_tasks_of_unknown_length_wait_for_it(capsys) -> None:
    with Steps(Console(file=io.StringIO())) as steps:
        update = steps.task("evaluate", None)
        update(0)
        update(5, 10)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("evaluate: 5/10 (50 %)")


def test_no_console_shows_nothing(capsys) -> None:
    with Steps(None) as steps:
        steps.task("x", 3)(3, 3)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_a_live_task_ends_as_one_line_and_idle_ones_vanish() -> None:
    console = terminal()
    with Steps(console) as steps:
        steps.task("from the cache", 10)
        update = steps.task("finetune", None)
        update(1, 4, note="loss 2.0")
        update(4, 4, note="loss 1.5")
        update(4, 4)
        with steps:
            cut_short = steps.task("evaluate [x]", 10)
            cut_short(3, 10)
    final = shown(console).rsplit("finetune: 4/4 (100 %)", 1)[1]
    assert "loss 1.5" in final
    assert "evaluate [x]" in final
    assert "3/10" in final
    assert "from the cache" not in final


class Linear(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = self.layer(batch).pow(2).mean()
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> torch.utils.data.DataLoader:
        rows = torch.arange(24.0).reshape(12, 2) / 24
        return torch.utils.data.DataLoader(rows, batch_size=1)  # type: ignore[arg-type]


def test_training_moves_the_task_once_a_step_with_the_loss(tmp_path) -> None:
    calls: list[tuple[int, int, str]] = []

    class Recording(Steps):
        def task(self, name: str, total: int | None):
            assert (name, total) == ("train finetune", 3)
            return lambda done, total, note="": calls.append((done, total, note))

    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=3,
        accumulate_grad_batches=2,
        callbacks=[TrainingProgress(Recording(None), "train finetune", every=0.0)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(Linear())
    assert calls[0] == (0, 3, "")
    steps = [done for done, _, _ in calls[1:]]
    assert steps == sorted(set(steps))
    assert steps[-1] == 3
    assert all(note.startswith("loss ") for _, _, note in calls[1:])


def test_a_sentence_is_a_line_or_stands_above_the_bars(capsys) -> None:
    stream, console = io.StringIO(), terminal()
    with Steps(Console(file=io.StringIO()), stream=stream) as steps:
        steps.say("stage align goes on")
    assert stream.getvalue() == "stage align goes on\n"
    with Steps(console) as steps:
        steps.say("stage [align] goes on")
    assert "stage [align] goes on" in shown(console)
    with Steps(None) as steps:
        steps.say("nobody hears it")
    assert capsys.readouterr() == ("", "")
