from __future__ import annotations

import signal

import pytest
import pytorch_lightning as pl
import torch

from callbacks import checkpoint
from callbacks.checkpoint import FiniteCheckpoint, check_checkpoint, find_checkpoint, manifest_path
from framework.errors import ModelError, TrainingError
from framework.files import hash_file, read_json
from framework.interruption import Interrupted
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


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_last_two_steps_are_kept_with_their_checksums(tmp_path):
    run_fit(make_model(), writers=[writer(tmp_path)])
    assert names(tmp_path) == ["step=2.ckpt", "step=2.ckpt.json", "step=3.ckpt", "step=3.ckpt.json"]
    assert finite(tmp_path / "step=3.ckpt")
    manifest = read_json(tmp_path / "step=3.ckpt.json")
    assert manifest["sha256"] == {".": hash_file(tmp_path / "step=3.ckpt")}
    assert check_checkpoint(tmp_path / "step=3.ckpt") == manifest["step"] == 3


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_the_last_good_checkpoint_is_kept(tmp_path, value):
    message = r"every trained weight to be finite, but got 1 that are not after step 2 \(`model\..*` first\)\. The last"
    with pytest.raises(TrainingError, match=message):
        run_fit(make_model(), observers=[Break(2, value=value)], writers=[writer(tmp_path)])
    assert names(tmp_path) == ["step=1.ckpt", "step=1.ckpt.json"]
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
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["step=2.ckpt", "step=4.ckpt"]


def test_only_every_nth_step_is_saved(tmp_path):
    steps = Steps(tmp_path)
    run_fit(make_model(), data=TinyData(steps=5), observers=[steps], writers=[writer(tmp_path, every_n_train_steps=2)])
    assert steps.seen == [
        (0, []),
        (1, []),
        (2, ["step=2.ckpt"]),
        (3, ["step=2.ckpt"]),
        (4, ["step=2.ckpt", "step=4.ckpt"]),
    ]


# ---- damaged checkpoints -----------------------------------------------------------------------------------------

READ_ONLY_TWICE = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")


def flip_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-100])


def empty(path):
    path.write_bytes(b"")


@pytest.fixture
def two(tmp_path):
    """A folder with the checkpoints of steps 2 and 3."""
    run_fit(make_model(), writers=[writer(tmp_path)])
    return tmp_path


@pytest.mark.parametrize("damage", [flip_bit, cut_short, empty])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_is_found(two, damage):
    newest = two / "step=3.ckpt"
    damage(newest)
    with pytest.raises(ModelError, match=r"`.*step=3\.ckpt` to be as it was written, but its checksum differs"):
        check_checkpoint(newest)
    found = find_checkpoint(two)
    assert (found.path, found.step) == (two / "step=2.ckpt", 2)
    assert len(found.refused) == 1
    assert newest.exists()
    assert find_checkpoint(two, set_aside=True).step == 2
    assert names(two) == ["step=2.ckpt", "step=2.ckpt.json", "step=3.ckpt.damaged"]
    assert find_checkpoint(two).refused == []


def test_nothing_is_found_when_all_are_damaged_or_none_is_there(two, tmp_path):
    for path in two.glob("*.ckpt"):
        flip_bit(path)
    found = find_checkpoint(two)
    assert (found.path, found.step, len(found.refused)) == (None, 0, 2)
    assert find_checkpoint(tmp_path / "nowhere") == (None, 0, [])


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.unlink(),
        lambda path: path.write_text("{"),
        lambda path: path.write_text('{"step": 3}'),
        lambda path: path.write_text("[]"),
    ],
    ids=["missing", "no JSON", "no checksums", "no mapping"],
)
def test_a_checkpoint_without_readable_checksums_is_refused(two, change):
    change(manifest_path(two / "step=3.ckpt"))
    with pytest.raises(ModelError, match="to have a checksum beside it, but got none that can be read"):
        check_checkpoint(two / "step=3.ckpt")
    assert find_checkpoint(two).step == 2


def test_a_changed_step_in_the_checksum_file_is_noticed(two):
    path = manifest_path(two / "step=2.ckpt")
    path.write_text(path.read_text().replace('"step": 2', '"step": 9'))
    found = find_checkpoint(two)
    assert (found.step, len(found.refused)) == (3, 1)


def test_only_steps_below_a_limit_are_found(two):
    assert find_checkpoint(two, before=3).step == 2
    assert find_checkpoint(two, before=2) == (None, 0, [])


@READ_ONLY_TWICE
def test_a_later_checkpoint_does_not_push_out_the_one_before_the_newest(tmp_path):
    """A stage that died after its last step, before it was exported, is resumed from the checkpoint before that."""
    run_fit(make_model(), writers=[writer(tmp_path, every_n_train_steps=2)], data=TinyData(steps=4))
    assert names(tmp_path) == ["step=2.ckpt", "step=2.ckpt.json", "step=4.ckpt", "step=4.ckpt.json"]
    resumed = find_checkpoint(tmp_path, before=4)
    assert resumed.step == 2
    stopping = writer(tmp_path, every_n_train_steps=2, should_stop=lambda: signal.SIGTERM)
    with pytest.raises(Interrupted):
        run_fit(make_model(), writers=[stopping], data=TinyData(steps=4), ckpt_path=resumed.path, max_steps=4)
    assert names(tmp_path) == ["step=2.ckpt", "step=2.ckpt.json", "step=3.ckpt", "step=3.ckpt.json"]
    flip_bit(tmp_path / "step=3.ckpt")
    assert find_checkpoint(tmp_path, before=4).step == 2


def test_what_a_killed_writer_left_is_no_checkpoint_and_is_removed(two):
    half = two / ".step=4.ckpt.tmp"
    half.write_bytes(b"half")
    assert find_checkpoint(two, set_aside=True).step == 3
    assert not half.exists()


@READ_ONLY_TWICE
def test_resuming_from_a_damaged_checkpoint_is_refused(two):
    flip_bit(two / "step=3.ckpt")
    with pytest.raises(ModelError, match="its checksum differs"):
        run_fit(make_model(), data=TinyData(steps=5), writers=[writer(two)], ckpt_path=two / "step=3.ckpt")


@READ_ONLY_TWICE
def test_a_checkpoint_that_is_a_folder_is_checked_file_by_file(two):
    folder = two / "step=4.ckpt"
    (folder / "shards").mkdir(parents=True)
    (folder / "shards" / "0").write_bytes(b"abc")
    checkpoint._publish(folder, two / "step=5.ckpt", 5)
    assert find_checkpoint(two).step == 5
    (two / "step=5.ckpt" / "shards" / "0").write_bytes(b"abd")
    assert find_checkpoint(two).step == 3
    assert find_checkpoint(two, set_aside=True).step == 3
    assert (two / "step=5.ckpt.damaged").is_dir()


# ---- stopping ----------------------------------------------------------------------------------------------------


@READ_ONLY_TWICE
@pytest.mark.parametrize("cut", [1, 2])
def test_a_request_to_stop_writes_the_step_and_leaves(tmp_path, cut):
    data = {"steps": 4, "micro_batches": cut}
    answers = iter([None, signal.SIGTERM])
    options = {"every_n_train_steps": 10, "should_stop": lambda: next(answers)}
    with pytest.raises(Interrupted, match=r"stopped at step 2 of 4; run the same command again to go on") as caught:
        run_fit(make_model(), data=TinyData(**data), writers=[writer(tmp_path, **options)], max_steps=4)
    assert caught.value.exit_code == 143
    assert find_checkpoint(tmp_path).step == 2
    whole = run_fit(make_model(), data=TinyData(**data))
    again = writer(tmp_path, every_n_train_steps=10)
    resumed = run_fit(make_model(), data=TinyData(**data), writers=[again], ckpt_path=tmp_path / "step=2.ckpt")
    assert torch.equal(resumed.weights, whole.weights)


def test_a_request_in_the_last_step_lets_training_end(tmp_path):
    options = {"every_n_train_steps": 10, "should_stop": lambda: signal.SIGTERM if answers.pop() else None}
    answers = [True, False, False]
    run = run_fit(make_model(), writers=[writer(tmp_path, **options)], max_steps=3)
    assert run.trainer.global_step == 3
