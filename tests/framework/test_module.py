from __future__ import annotations

import math

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
from framework.batch import IGNORE
from framework.errors import TrainingError, WiringError
from framework.method import Method
from framework.module import FineTuneModule, forward_reply_tokens, learning_rate_factor
from tests.conftest import make_model
from tests.tiny_runs import (
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
    plain = expect_full_forward(model, make_batch(5))
    adapted = expect_full_forward(make_lora(model), make_batch(5, seed=1))
    assert plain.labels.numel() > 5  # no comparison of nothing with nothing
    assert adapted.labels.numel() > 5


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
        outputs = forward_reply_tokens(model, batch, share_prefixes=True)
        loss = outputs.nll.sum() * (1 / batch.step_reply_tokens)
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
    with torch.no_grad():
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
