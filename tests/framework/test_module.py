from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from callbacks.checkpoint import FiniteCheckpoint
from datamodules.finetune import FineTuneDataModule
from framework.batch import IGNORE
from framework.chat import ChatEncoder
from framework.errors import TrainingError, WiringError
from framework.examples import Example, Turn
from framework.method import Method
from framework.module import FineTuneModule, forward_reply_tokens, learning_rate_factor
from tests.conftest import make_model, make_tokenizer
from tests.tiny_runs import (
    OneLayer,
    Steps,
    TinyData,
    TokenTerm,
    WeightTerm,
    flat,
    make_batch,
    make_lora,
    make_trainer,
    relative,
    run_fit,
)

SIZES = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}
LAYERS = ["sliding_attention", "full_attention"]


def build(family: str):
    torch.manual_seed(0)
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**SIZES))
    if family == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**SIZES))
    if family == "gemma2":  # scores and logits soft-capped low enough to matter
        caps = {"final_logit_softcapping": 0.05, "attn_logit_softcapping": 1.0}
        config = Gemma2Config(**SIZES, head_dim=8, sliding_window=8, layer_types=LAYERS, **caps)
        config._attn_implementation = "eager"
        return Gemma2ForCausalLM(config)
    return Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=8, layer_types=LAYERS))


def expect_full_forward(model, batch):
    """The reply tokens' logits must be those of a plain forward pass over every position."""
    outputs = forward_reply_tokens(model, batch)
    full = model(**batch.model_inputs).logits[:, :-1]
    targets = batch.labels[:, 1:]
    keep = targets != IGNORE
    torch.testing.assert_close(outputs.logits, full[keep], rtol=1e-5, atol=1e-6)
    assert torch.equal(outputs.labels, targets[keep])
    assert torch.equal(outputs.rows, keep.nonzero()[:, 0])
    nll = F.cross_entropy(full.reshape(-1, full.shape[-1]), targets.reshape(-1), ignore_index=IGNORE)
    torch.testing.assert_close(outputs.nll.mean(), nll)
    return outputs


# ---- logits at reply positions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gemma3"])
def test_logits_at_reply_positions_equal_the_full_forward(family):
    model = build(family).eval()
    expect_full_forward(model, make_batch(5))
    expect_full_forward(make_lora(model), make_batch(5, seed=1))


def test_soft_capping_is_on_in_the_model_that_tests_it():
    with torch.no_grad():
        logits = build("gemma2").eval()(input_ids=torch.arange(4, 20)[None]).logits
    assert 0.02 < float(logits.abs().max()) <= 0.05


def test_positions_count_within_each_reply():
    batch = make_batch(3)
    outputs = forward_reply_tokens(make_model(), batch)
    lengths = (batch.labels != IGNORE).sum(dim=1).tolist()
    assert outputs.positions.tolist() == [i for length in lengths for i in range(length)]
    assert outputs.loss is None


def test_the_output_layer_sees_the_whole_sequence_again_afterwards():
    model, batch = make_model(), make_batch(2)
    forward_reply_tokens(model, batch)
    assert model(**batch.model_inputs).logits.shape[:2] == batch.input_ids.shape
    assert not model.lm_head._forward_pre_hooks
    broken = make_batch(2)
    broken.input_ids[0, 0] = 10_000
    with pytest.raises(IndexError):
        forward_reply_tokens(model, broken)
    assert not model.lm_head._forward_pre_hooks


def test_the_vocabulary_is_paid_at_reply_positions_alone():
    model, batch, seen = make_model(), make_batch(3), []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    forward_reply_tokens(model, batch)
    assert seen == [(1, batch.step_reply_tokens, 260)]


def test_a_row_without_reply_adds_nothing():
    model, batch = make_model(), make_batch(2)
    batch.labels[:] = IGNORE
    outputs = forward_reply_tokens(model, batch)
    assert outputs.logits.shape == (0, 260)
    assert outputs.nll.sum().requires_grad


# ---- the schedule ------------------------------------------------------------------------------------------------


def test_the_schedule_warms_up_and_ends_at_zero():
    factors = [learning_rate_factor(step, total_steps=10, warmup_steps=3) for step in range(11)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[10] == pytest.approx(0.0)
    assert factors[3:] == sorted(factors[3:], reverse=True)
    assert learning_rate_factor(5, total_steps=5, warmup_steps=5) == 1.0
    assert learning_rate_factor(20, total_steps=10, warmup_steps=3) == pytest.approx(0.0)


# ---- training ----------------------------------------------------------------------------------------------------


def train_by_hand(model, data, *, learning_rate=1e-2, total_steps=6):
    """The loop a person would write: whole-step cross-entropy, AdamW, warm-up and cosine."""
    warmup = math.ceil(0.03 * total_steps)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    for step, batch in enumerate(data.batches()):
        share = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total_steps - warmup)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * ((step + 1) / (warmup + 1) if step < warmup else share)
        loss = forward_reply_tokens(model, batch).nll.sum() * (1 / batch.step_reply_tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return flat(model)


@pytest.mark.parametrize("wrap", [lambda model: model, make_lora], ids=["full", "lora"])
def test_a_run_without_methods_is_the_hand_written_loop_bit_for_bit(wrap):
    run = run_fit(wrap(make_model()))
    assert torch.equal(run.weights, train_by_hand(wrap(make_model()).train(), TinyData()))
    assert not torch.equal(run.weights, flat(wrap(make_model())))


class Silent(Method):
    """Fills no point."""

    name = "silent"

    def __init__(self):
        super().__init__(None)


def test_a_method_that_contributes_nothing_changes_no_bit():
    assert torch.equal(run_fit(make_model(), [Silent()]).weights, run_fit(make_model()).weights)


@pytest.mark.parametrize("method", [TokenTerm, WeightTerm])
def test_strength_zero_changes_no_bit_and_strength_above_zero_does(method):
    plain = run_fit(make_model()).weights
    off = method(0.0)
    off.allow_no_effect = True
    assert torch.equal(run_fit(make_model(), [off]).weights, plain)
    assert not torch.equal(run_fit(make_model(), [method(0.1)]).weights, plain)


@pytest.mark.parametrize("methods", [[], [TokenTerm], [WeightTerm]], ids=["task", "token mean", "weights"])
def test_accumulating_eight_micro_batches_equals_one(methods):
    def train(cut):
        return run_fit(make_model(), [method() for method in methods], data=TinyData(micro_batches=cut))

    whole, parts = train(1), train(8)
    assert whole.trainer.global_step == parts.trainer.global_step == 3
    assert relative(parts.gradients[0], whole.gradients[0]) < 2e-7
    assert relative(parts.weights, whole.weights) < 2e-7


def test_a_mean_per_micro_batch_would_not_pass_that_test():
    """The guard of the guard: with the mean taken per micro-batch, 1x8 is far from 8x1."""

    class MeanPerMicroBatch(TokenTerm):
        def loss_term(self, ctx):
            return ctx.outputs.nll.square().mean()

    whole = run_fit(make_model(), [MeanPerMicroBatch()])
    parts = run_fit(make_model(), [MeanPerMicroBatch()], data=TinyData(micro_batches=8))
    assert relative(parts.gradients[0], whole.gradients[0]) > 1e-3


def test_tokens_are_counted_once():
    data = TinyData(micro_batches=2)
    module = run_fit(make_model(), data=data).module
    rows = [row for step in data.steps for row in step]
    assert module.tokens_seen == sum(len(row.input_ids) for row in rows)
    assert module.reply_tokens_seen == sum(row.num_reply_tokens for row in rows)


def test_the_logged_loss_is_the_task_loss_plus_the_terms():
    run = run_fit(make_model(), [WeightTerm(0.5)])
    logged = {key: float(value) for key, value in run.trainer.logged_metrics.items()}
    total = logged["train/task_loss"] + 0.5 * logged["train/weight_term/term"]
    assert logged["train/loss"] == pytest.approx(total, rel=1e-6)
    assert logged["train/weight_term/share"] == pytest.approx(1 - logged["train/task_loss"] / total, rel=1e-5)
    assert logged["train/weight_term/weight"] == 0.5


def test_gradient_checkpointing_gives_the_same_run():
    plain = run_fit(make_lora(make_model()))
    model = make_lora(make_model())
    module = FineTuneModule(model, learning_rate=1e-2, total_steps=6, gradient_checkpointing=True)
    assert relative(run_fit(model, module=module).weights, plain.weights) < 1e-6
    assert all(layer.gradient_checkpointing for layer in model.get_base_model().model.layers)


def test_validation_is_the_mean_over_reply_tokens():
    batches = [make_batch(3, seed=1), make_batch(2, seed=2)]
    module = FineTuneModule(make_model(), learning_rate=1e-2, total_steps=3)
    result = make_trainer(limit_val_batches=1.0).validate(module, dataloaders=Steps(batches, skip=0), verbose=False)
    nll = torch.cat([forward_reply_tokens(module.model, batch).nll for batch in batches])
    assert result[0]["eval/nll"] == pytest.approx(float(nll.mean()), rel=1e-6)


def test_a_step_cut_otherwise_than_the_trainer_accumulates_is_refused():
    with pytest.raises(WiringError, match=r"step to have 2 micro-batches, .* but got 4\. Set `accumulate_grad_batche"):
        run_fit(make_model(), data=TinyData(micro_batches=4), accumulate_grad_batches=2)


# ---- not a number ------------------------------------------------------------------------------------------------


class Poison(Method):
    """Makes a weight NaN before the given step's forward pass or after the last update."""

    name = "poison"

    def __init__(self, *, at_step=None, after_step=None):
        super().__init__(None)
        self.at_step, self.after_step = at_step, after_step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        """Raw hook: the fault comes from outside."""
        if trainer.global_step == self.at_step:
            self._break(pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        """Raw hook: the fault comes from outside."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.global_step == self.after_step:
            self._break(pl_module)

    def _break(self, pl_module):
        next(p for p in pl_module.parameters() if p.requires_grad).data.flatten()[0] = torch.nan


def test_a_loss_that_is_not_a_number_stops_and_names_the_step(tmp_path):
    writer = FiniteCheckpoint(dirpath=tmp_path, every_n_train_steps=1, filename="{step}")
    with pytest.raises(TrainingError, match=r"Expected the loss to be finite, but got nan at step 2\. The last good"):
        run_fit(make_model(), [Poison(at_step=2)], writers=[writer])
    saved = torch.load(tmp_path / "step=2.ckpt", weights_only=True)
    assert all(bool(torch.isfinite(value).all()) for value in saved["state_dict"].values())


def test_a_weight_broken_by_the_last_update_is_refused():
    with pytest.raises(
        TrainingError, match=r"Expected every trained weight to be finite, but got 1 .* end of training"
    ):
        run_fit(make_model(), [Poison(after_step=3)])


# ---- checkpoints and resuming ------------------------------------------------------------------------------------


class Interrupt(Method):
    """Fails at a step, as a machine does."""

    name = "interrupt"

    def __init__(self, at_step=None):
        super().__init__(None)
        self.at_step = at_step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        """Raw hook: the fault comes from outside."""
        if trainer.global_step == self.at_step:
            raise KeyError("power cut")


def interrupt_and_resume(build, data, folder, *, at_step=5, methods=list, every=2):
    """Train until ``at_step`` fails, then go on from the last checkpoint with everything built anew."""

    def writer():
        return FiniteCheckpoint(dirpath=folder, every_n_train_steps=every, filename="{step}")

    with pytest.raises(KeyError):
        run_fit(build(), [*methods(), Interrupt(at_step)], data=data(), writers=[writer()])
    saved = sorted(folder.glob("*.ckpt"))
    assert len(saved) == 1
    return run_fit(build(), [*methods(), Interrupt()], data=data(), writers=[writer()], ckpt_path=saved[0])


resumes = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")
"""Resuming writes into the folder it resumes from."""


@resumes
@pytest.mark.parametrize("cut", [1, 4])
def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path, cut):
    def data():
        return TinyData(steps=6, micro_batches=cut)

    def methods():
        return [TokenTerm(0.3), WeightTerm(0.1)]

    whole = run_fit(make_model(), methods(), data=data())
    resumed = interrupt_and_resume(make_model, data, tmp_path, methods=methods)
    assert len(resumed.gradients) == 2
    assert torch.equal(resumed.weights, whole.weights)
    assert resumed.module.tokens_seen == whole.module.tokens_seen
    ours, theirs = resumed.trainer.callbacks[0], whole.trainer.callbacks[0]
    assert ours.effects == theirs.effects
    assert ours.largest_term == theirs.largest_term


@resumes
def test_dropout_draws_after_resuming_what_it_would_have_drawn(tmp_path):
    def build():
        return make_lora(make_model(), dropout=0.3)

    def data():
        return TinyData(steps=6)

    torch.manual_seed(1)
    whole = run_fit(build(), data=data())
    resumed = interrupt_and_resume(build, data, tmp_path)
    assert torch.equal(resumed.weights, whole.weights)


@resumes
def test_the_projects_data_module_goes_on_where_the_run_stopped(tmp_path):
    rows = [Example(str(i), (Turn("user", f"word {i}"),), "yes " * (i % 7 + 1)) for i in range(20)]

    def data():
        module = FineTuneDataModule(
            ChatEncoder(make_tokenizer()), batch_size=4, micro_batch_size=2, total_steps=6, max_length=128
        )
        module.add_source("task", rows)
        module.micro_batches = 2
        return module

    whole = run_fit(make_model(), data=data())
    resumed = interrupt_and_resume(make_model, data, tmp_path)
    assert len(resumed.gradients) == 2
    assert torch.equal(resumed.weights, whole.weights)


@resumes
def test_a_checkpoint_holds_the_trained_weights_alone(tmp_path):
    writer = FiniteCheckpoint(dirpath=tmp_path, every_n_train_steps=3, filename="{step}")
    run_fit(make_lora(make_model()), writers=[writer])
    saved = torch.load(tmp_path / "step=3.ckpt", weights_only=True)["state_dict"]
    assert len(saved) == 8
    assert all("lora_" in name for name in saved)
    with pytest.raises(
        WiringError, match=r"Expected the checkpoint to hold the 20 trainable .*, but got 8; they diffe"
    ):
        run_fit(make_model(), ckpt_path=tmp_path / "step=3.ckpt")


@pytest.mark.parametrize(
    ("written_with", "resumed_with", "message"),
    [
        ([], [WeightTerm(0.1)], r"`weight_term`: absent in the checkpoint, \{'weight': 0.1\} now"),
        ([WeightTerm(0.1)], [], r"`weight_term`: \{'weight': 0.1\} in the checkpoint, absent now"),
        ([WeightTerm(0.1)], [WeightTerm(0.2)], r"\{'weight': 0.1\} in the checkpoint, \{'weight': 0.2\} now"),
        ([WeightTerm(), TokenTerm()], [TokenTerm(), WeightTerm()], r"order \['weight_term', 'token_term'\] in the ch"),
    ],
    ids=["method added", "method dropped", "other settings", "other order"],
)
# Lightning says so too, after the refusal has been decided.
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create:UserWarning")
@resumes
def test_resuming_with_other_methods_is_refused(tmp_path, written_with, resumed_with, message):
    writer = FiniteCheckpoint(dirpath=tmp_path, every_n_train_steps=3, filename="{step}")
    run_fit(make_model(), written_with, writers=[writer])
    with pytest.raises(WiringError, match=message):
        run_fit(make_model(), resumed_with, ckpt_path=tmp_path / "step=3.ckpt")


@resumes
def test_resuming_on_another_base_model_is_refused(tmp_path):
    def fit(base, **options):
        model = make_model()
        module = FineTuneModule(model, learning_rate=1e-2, total_steps=6, base_fingerprint=base)
        return run_fit(model, module=module, **options)

    fit("aaaa", writers=[FiniteCheckpoint(dirpath=tmp_path, every_n_train_steps=3, filename="{step}")])
    with pytest.raises(WiringError, match="base model 'aaaa' in the checkpoint, 'bbbb' now"):
        fit("bbbb", ckpt_path=tmp_path / "step=3.ckpt")


# ---- two processes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_two_processes_equal_one(two_processes, micro_batches):
    expected = run_fit(make_model(), [TokenTerm(0.3), WeightTerm(0.1)], data=TinyData(micro_batches=micro_batches))
    found = two_processes[f"micro-batches {micro_batches}"]
    assert relative(found["gradient"], expected.gradients[0]) < 1e-6
    assert relative(found["weights"], expected.weights) < 1e-6


def test_two_processes_equal_one_with_frozen_parameters(two_processes):
    lora = run_fit(make_lora(make_model()), [TokenTerm(0.3)])
    assert relative(two_processes["lora"]["weights"], lora.weights) < 1e-6
    selection = run_fit(make_model(), [OneLayer()])
    assert relative(two_processes["selection"]["weights"], selection.weights) < 1e-6


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """Results of ``two_processes.py``, run once for all tests of this file."""
    folder = tmp_path_factory.mktemp("ddp")
    script = Path(__file__).with_name("two_processes.py")
    root = script.parents[2]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        **os.environ,
        "PYTHONPATH": str(root),
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "NODE_RANK": "0",
    }
    processes = []
    try:
        for rank in range(2):
            with (folder / f"{rank}.log").open("w") as log:
                command = [sys.executable, str(script), str(folder / "results.pt")]
                environment = shared | {"LOCAL_RANK": str(rank)}
                processes.append(
                    subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
                )
        codes = [process.wait(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    logs = "\n".join((folder / f"{rank}.log").read_text()[-3000:] for rank in range(2))
    assert codes == [0, 0], logs
    return torch.load(folder / "results.pt", weights_only=True)
