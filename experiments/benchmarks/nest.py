"""What NeST costs: time and memory of a training step against plain LoRA, and of probing.

Run: ``python -m experiments.benchmarks.nest [--parts step probing tokens] [--rounds 3] [--output FILE]``. Times are of
the processor where there is no GPU, because they are not moved by what else runs on the machine; the time that passed
is kept beside them.

* ``step``: steps of the default model on the embedded rows, NeST against LoRA of rank 8 on all linear layers. Each side
  trains in processes of its own, in turn, so that the memory of one is not that of the other: the peak of the whole
  process, and the bytes that the backward pass keeps.
* ``probing``: seconds to probe with 500 + 500 prompts, from the model in memory to the selected, clustered neurons.
* ``tokens``: bytes kept, and the peak of the process, for prompts once and eight times as long.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytorch_lightning as pl
import torch

from datamodules.catalog import benign_examples, look_alike_examples, safety_examples
from datamodules.finetune import FineTuneDataModule
from experiments.run import environment, set_threads
from framework.adapters import AdapterSpec, add_adapter
from framework.chat import ChatEncoder
from framework.composition import compose, prepare_methods
from framework.cost import lifetime_host_peak
from framework.files import ArtifactStore, write_json
from framework.method import Method, MethodStore
from framework.models import LoadedModel, ModelSpec, load_model
from framework.module import FineTuneModule
from framework.parameters import count_parameters
from methods.nest import NeST, NeSTConfig, find_neurons
from methods.nest.probe import build_prompts, pooled_activations
from methods.nest.sites import find_projections

SIDES = {
    "LoRA": AdapterSpec(rank=8, alpha=16.0, targets="all-linear"),
    "NeST": AdapterSpec(kind="none"),
}
STEP_BOUND, MEMORY_BOUND, PROBING_BOUND = 0.9, 1.0, 180.0
BATCH, LENGTH = 8, 96
PROMPTS = 500
FEW = 64


class StepWatch(pl.Callback):
    """Notes the time of every step but the first two, and the bytes that the second keeps for its backward pass."""

    def __init__(self) -> None:
        """Hold nothing yet."""
        self.marks: list[tuple[float, float]] = []
        self.kept: dict[int, int] = {}
        self.trainable = 0
        self._weights: set[int] = set()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count what is trained."""
        self.trainable = count_parameters(pl_module)[0]
        self._weights = {p.untyped_storage().data_ptr() for p in pl_module.parameters()}

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Begin to count bytes in the second step."""
        if batch_idx == 1:
            self._hooks.__enter__()

    def on_before_backward(self, trainer: pl.Trainer, pl_module: Any, loss: torch.Tensor) -> None:
        """Stop counting; all that the backward pass needs is alive now."""
        if trainer.global_step == 1:
            self._hooks.__exit__()

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Note the time."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.marks.append((time.process_time(), time.perf_counter()))

    def seconds(self, column: int) -> list[float]:
        """Return the time of each step after the second: 0 of the processor, 1 that passed."""
        times = [mark[column] for mark in self.marks[1:]]
        return [after - before for before, after in itertools.pairwise(times)]

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._weights:
            self.kept[storage.data_ptr()] = storage.nbytes()
        return tensor


def train_side(side: str, steps: int, model: str, store: Path) -> dict[str, Any]:
    """Train one side and return its times and memory."""
    loaded = load_model(ModelSpec(model))
    data = _data(loaded, steps)
    trained = add_adapter(loaded.model, SIDES[side])
    methods: list[Method] = []
    if side == "NeST":
        methods = [NeST(NeSTConfig(held_out=0.5))]
        prepare_methods(methods, trained, data, MethodStore(ArtifactStore(store), models={"start": loaded.folder}))
    module, watch = FineTuneModule(trained, learning_rate=1e-3, total_steps=steps), StepWatch()
    trainer = pl.Trainer(
        accelerator="auto", devices=1, max_steps=steps, max_epochs=1, callbacks=compose(methods, observers=[watch]),
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        gradient_clip_val=1.0, use_distributed_sampler=False,
    )  # fmt: skip
    trained.train()
    before = lifetime_host_peak()
    trainer.fit(module, datamodule=data)
    peak = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else lifetime_host_peak()
    return {
        "seconds": watch.seconds(1 if torch.cuda.is_available() else 0),
        "seconds_passed": watch.seconds(1),
        "peak_mib": peak,
        "peak_before_training_mib": before,
        "kept_for_backward_mib": sum(watch.kept.values()) / 2**20,
        "trainable": watch.trainable,
    }


def measure_step(rounds: int, steps: int, model: str, threads: int | None) -> dict[str, Any]:
    """Return times and memory of both sides, trained in turn in processes of their own."""
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    with TemporaryDirectory() as store:
        _child("NeST", 3, model, store, threads)  # probes once; the rounds find it in the store
        for number in range(rounds):
            for side in list(SIDES) if number % 2 == 0 else list(reversed(SIDES)):
                one = _child(side, steps, model, store, threads)
                found[side].append(one)
                text = f"{statistics.median(one['seconds']):.3f} s a step, peak {one['peak_mib']:.0f} MiB"
                print(f"  {side}: {text}, {one['kept_for_backward_mib']:.1f} MiB kept", flush=True)
    times = {side: statistics.median(s for one in runs for s in one["seconds"]) for side, runs in found.items()}
    names = ("peak_mib", "kept_for_backward_mib")
    memory = {name: {side: statistics.median(o[name] for o in runs) for side, runs in found.items()} for name in names}
    ratios = {name: values["NeST"] / values["LoRA"] for name, values in memory.items()}
    ratios["step"] = times["NeST"] / times["LoRA"]
    print(f"  step {ratios['step']:.3f} x LoRA (bound {STEP_BOUND}), peak {ratios['peak_mib']:.3f} x ({MEMORY_BOUND})")
    return {"runs": found, "times_lora": ratios, "bounds": {"step": STEP_BOUND, "peak_mib": MEMORY_BOUND}}


def measure_probing(model: str) -> dict[str, Any]:
    """Return seconds to find the neurons of a model with 500 + 500 prompts."""
    loaded = load_model(ModelSpec(model))
    harmful, ordinary = _prompts(loaded)
    config = NeSTConfig(count=PROMPTS)
    prompts = build_prompts(harmful, ordinary, config)
    pad_id: Any = loaded.tokenizer.pad_token_id
    busy, wall = time.process_time(), time.perf_counter()
    selection = find_neurons(loaded.model, prompts, config, pad_id=pad_id)
    seconds, passed = time.process_time() - busy, time.perf_counter() - wall
    tokens = sum(map(len, prompts.ids))
    print(f"  {len(prompts.ids)} prompts, {tokens} tokens: {seconds:.1f} s of the processor, {passed:.1f} s passed")
    print(f"  {selection.num_rows} neurons, {selection.num_parameters} numbers (bound {PROBING_BOUND:g} s)")
    return {
        "prompts": len(prompts.ids),
        "tokens": tokens,
        "seconds": seconds,
        "seconds_passed": passed,
        "rows": selection.num_rows,
        "parameters": selection.num_parameters,
        "bound": PROBING_BOUND,
    }


def probe_tokens(times: int, model: str) -> dict[str, Any]:
    """Return bytes kept and the peak of the process for prompts ``times`` as long."""
    loaded = load_model(ModelSpec(model))
    prompts = [ids[:20] * times for ids in _prompts(loaded)[0][:FEW]]
    before = lifetime_host_peak() or 0.0
    kept = pooled_activations(loaded.model, find_projections(loaded.model), prompts, pad_id=0, batch_tokens=512)
    return {
        "tokens": sum(map(len, prompts)),
        "kept_mib": sum(one.numel() * one.element_size() for one in kept.values()) / 2**20,
        "growth_mib": (lifetime_host_peak() or 0.0) - before,
    }


def measure_tokens(model: str, threads: int | None) -> dict[str, Any]:
    """Return what probing keeps for short and for long prompts, each in a process of its own."""
    found = {}
    for times in (1, 8):
        found[times] = _child(str(times), 0, model, "", threads)
        print(f"  {found[times]['tokens']} tokens: {found[times]['kept_mib']:.1f} MiB kept, peak grew by "
              f"{found[times]['growth_mib']:.0f} MiB", flush=True)  # fmt: skip
    return {"runs": found}


# ---- private -----------------------------------------------------------------------------------------------------


def _child(side: str, steps: int, model: str, store: str, threads: int | None) -> dict[str, Any]:
    command = [sys.executable, "-m", "experiments.benchmarks.nest", "--child", side, "--steps", str(steps)]
    command += ["--model", model, "--store", store, *(["--threads", str(threads)] if threads else [])]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _data(loaded: LoadedModel, steps: int) -> FineTuneDataModule:
    encoder = ChatEncoder(loaded.tokenizer, system="")
    data = FineTuneDataModule(encoder, batch_size=BATCH, total_steps=steps, max_length=LENGTH, overflow="truncate_left")
    data.add_source("safety", safety_examples("embedded", seed=0))
    data.add_source("benign", benign_examples("embedded"))
    data.add_source("look_alikes", look_alike_examples("embedded"))
    return data


def _prompts(loaded: LoadedModel) -> tuple[list[list[int]], list[list[int]]]:
    """Return 500 prompts of each class; the embedded ones in several wordings, as time does not depend on content."""
    encoder, draw = ChatEncoder(loaded.tokenizer, system=""), random.Random(0)
    heads = ("", "Please answer. ", "A question: ", "Tell me. ", "I wonder. ")
    sets = []
    for examples in (safety_examples("embedded", seed=0), benign_examples("embedded")):
        texts = [(head, example) for head in heads for example in examples]
        draw.shuffle(texts)
        turns = [example.messages[-1]._replace(content=head + example.prompt) for head, example in texts[:PROMPTS]]
        sets.append([encoder.encode_prompt([turn]) for turn in turns])
    return sets[0], sets[1]


def main() -> None:
    """Measure the chosen parts and write them to a file if one is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("step", "probing", "tokens"), default=["step"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--model", default=ModelSpec().name)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--store", default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    set_threads(given.threads)
    if given.child:
        is_side = given.child in SIDES
        found = (
            train_side(given.child, given.steps, given.model, Path(given.store))
            if is_side
            else probe_tokens(int(given.child), given.model)
        )
        print(json.dumps(found))
        return
    results: dict[str, Any] = {}
    for part in given.parts:
        print(part, flush=True)
        if part == "step":
            results[part] = measure_step(given.rounds, given.steps, given.model, given.threads)
        elif part == "probing":
            results[part] = measure_probing(given.model)
        else:
            results[part] = measure_tokens(given.model, given.threads)
    if given.output:
        write_json(given.output, results | {"environment": environment()})


if __name__ == "__main__":
    main()
