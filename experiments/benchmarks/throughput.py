"""Training throughput of plain LoRA here against the transformers Trainer with peft, alternating in one process.

Run: ``python -m experiments.benchmarks.throughput [--steps 12] [--rounds 3] [--data triage|safety]``. Both sides train
the same adapter on the same rows with the same batch size in the same dtype; tokens are prompt and reply tokens without
padding.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytorch_lightning as pl
import torch

from datamodules.catalog import benign_examples, safety_examples
from datamodules.finetune import FineTuneDataModule
from datamodules.tasks import create_task
from experiments.run import environment, set_threads
from framework.chat import ChatEncoder, EncodedExample
from framework.examples import Example
from framework.files import write_json
from framework.models import AdapterSpec, ModelSpec, add_adapter, load_model
from framework.module import FineTuneModule

SPEC = AdapterSpec(rank=8, alpha=16.0, targets=("q_proj", "v_proj"))
BATCH = 8
LEARNING_RATE = 5e-4


class _StepClock(pl.Callback):
    """Remembers when each optimizer step ended; the first steps of a process are warm-up and left out."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())


def measure_ours(rows: Sequence[Example], *, steps: int) -> tuple[float, int]:
    """Return (seconds, tokens) of ``steps`` steps of ``FineTuneModule``."""
    loaded = load_model(ModelSpec())
    encoder = ChatEncoder(loaded.tokenizer, system="")
    data = FineTuneDataModule(encoder, batch_size=BATCH, total_steps=steps + 1, max_length=256)
    data.add_source("rows", rows)
    model = add_adapter(loaded.model, SPEC)
    model.train()
    module = FineTuneModule(model, learning_rate=LEARNING_RATE, total_steps=steps + 1)
    clock, seen = _StepClock(), _TokenCount()
    trainer = pl.Trainer(
        accelerator="auto", devices=1, max_steps=steps + 1, max_epochs=1, callbacks=[clock, seen], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=1.0,
        use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    return clock.ends[-1] - clock.ends[0], sum(seen.tokens[1:])


class _TokenCount(pl.Callback):
    def __init__(self) -> None:
        self.tokens: list[int] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.tokens.append(batch.num_tokens)


def measure_transformers(rows: Sequence[Example], *, steps: int) -> tuple[float, int]:
    """Return (seconds, tokens) of ``steps`` steps of the transformers Trainer on the same rows."""
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

    loaded = load_model(ModelSpec())
    encoder = ChatEncoder(loaded.tokenizer, system="")
    encoded = [encoder.encode_example(row) for row in rows]
    model = add_adapter(loaded.model, SPEC)
    ends: list[float] = []
    counted: list[int] = []
    collate = DataCollatorForSeq2Seq(loaded.tokenizer, pad_to_multiple_of=8, label_pad_token_id=-100)

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            ends.append(time.perf_counter())

    def collate_and_count(features: list[dict[str, Any]]) -> Any:
        batch = collate(features)
        counted.append(int(batch["attention_mask"].sum()))
        return batch

    loaded.tokenizer.padding_side = "right"
    with TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=BATCH, max_steps=steps + 1, learning_rate=LEARNING_RATE,
            lr_scheduler_type="cosine", report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
            max_grad_norm=1.0, weight_decay=0.0, use_cpu=not torch.cuda.is_available(),
        )  # fmt: skip
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=[_as_features(row) for row in encoded],
            data_collator=collate_and_count,
            callbacks=[Clock()],
        )
        trainer.train()
    return ends[-1] - ends[0], sum(counted[1 : steps + 1])


def _as_features(row: EncodedExample) -> dict[str, Any]:
    ids = list(row.input_ids)
    labels = [-100] * row.num_prompt_tokens + ids[row.num_prompt_tokens :]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def main() -> None:
    """Print tokens per second of both sides, round by round, and the ratio of the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--data", choices=("triage", "safety"), default="triage")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    set_threads(None)
    rows = _rows(arguments.data)
    speeds: dict[str, list[float]] = {"ours": [], "transformers": []}
    for number in range(arguments.rounds):
        for name, measure in (("ours", measure_ours), ("transformers", measure_transformers)):
            seconds, tokens = measure(rows, steps=arguments.steps)
            speeds[name].append(tokens / seconds)
            print(f"round {number + 1} {name}: {tokens / seconds:.1f} tokens/s ({tokens} tokens, {seconds:.1f} s)")
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    ratio = medians["ours"] / medians["transformers"]
    print(f"median ours {medians['ours']:.1f}, transformers {medians['transformers']:.1f} tokens/s, ratio {ratio:.2f}")
    if arguments.output:
        write_json(
            arguments.output,
            {"data": arguments.data, "tokens_per_second": speeds, "ratio": ratio, "environment": environment()},
        )
    else:
        print(json.dumps(speeds))


def _rows(data: str) -> list[Example]:
    if data == "triage":
        return create_task("triage").train_examples(count=480, seed=0)
    return [*safety_examples("embedded", seed=0), *benign_examples("embedded", seed=0)]


if __name__ == "__main__":
    main()
