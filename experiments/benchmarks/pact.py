"""What PACT costs: a training step and its memory against plain LoRA, cached, live and by the reference formula.

Run: ``python -m experiments.benchmarks.pact [--model NAME | --tiny] [--rounds 3] [--steps 12] [--output FILE]``. The
variants alternate within one process. Times are of the processor where there is no GPU, because they are not moved by
what else runs on the machine; the time that passed is kept beside them.

* ``plain``: LoRA without a method.
* ``cached``: references read from the cache; building it is timed apart, in forward passes over the same rows.
* ``live``: the model with its adapter off, twice a step.
* ``formula``: the reference code's way: a second model, whole logits of prompt and reply, twice a step.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import pytorch_lightning as pl
import torch
from torch import nn

from datamodules.catalog import safety_examples
from datamodules.finetune import FineTuneDataModule
from datamodules.tasks import create_task
from experiments.contract.tiny import TinyModel, make_tokenizer, task_examples
from experiments.run import environment, set_threads
from experiments.training import quiet_lightning
from framework.adapters import AdapterSpec, add_adapter
from framework.batch import Batch, collate
from framework.chat import ChatEncoder, EncodedExample
from framework.composition import StepContext, compose, prepare_methods
from framework.errors import ConfigError
from framework.examples import Example
from framework.files import ArtifactStore, write_json
from framework.method import MethodStore
from framework.model_files import read_model, read_tokenizer, save_model
from framework.models import ModelSpec, choose_dtype, find_model
from framework.module import FineTuneModule, forward_reply_tokens
from framework.packing import can_pack
from framework.reference import frozen_copy, on_fast_device, reference_mode
from methods.pact import PACT, PACTConfig, competitive_count, gate_values, subset_divergence
from methods.pact.functional import position_weights
from methods.pact.references import reply_only_batch

STEP_BOUND = 1.05
MEMORY_BOUND = 1.05
BYTES_BOUND = 220.0
PASSES_BOUND = 2.0
VARIANTS = ("plain", "cached", "live", "formula")
BATCH = 8
SPEC = AdapterSpec(rank=8, alpha=32.0)
NOISE = 0.02
"""Added to the model's matrices for an unaligned one, where none is named: timing needs two that differ."""


class Formula(PACT):
    """The published formula with a second model and whole logits, for timing."""

    name = "pact_formula"

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Take the copy once the model is complete; the references of the base class are not used."""
        super(PACT, self).setup(trainer, pl_module, stage)
        model: Any = pl_module.model
        self._copies = [frozen_copy(model)]

    def loss_term(self, ctx: StepContext) -> torch.Tensor | None:
        """Return the mean divergence, the references computed here."""
        given, tokens, outputs = self.config, self._found_tokens(), ctx.outputs
        device = outputs.logits.device
        model = self._copies[0] = self._copies[0].to(device)
        ids = tokens.ids.to(device)
        post = reply_only_batch(ctx.batch, self._header)
        with reference_mode(model):
            readings = [_whole_logits(model, batch)[:, ids].float() for batch in (ctx.batch, post)]
        z = outputs.logits[:, ids].float()
        counts = [competitive_count(one, top_p=given.top_p) for one in (z, readings[1])]
        shares = position_weights(outputs.positions, prefix=given.prefix, decay=given.decay)
        gate = gate_values(
            counts[0], counts[1], shares, num_tokens=given.num_tokens, slope=given.gate_slope, offset=0.0
        )
        values = subset_divergence(
            z, readings[0], readings[1], gate=gate, weights=tokens.weights.to(device), temperature=given.temperature
        )
        return ctx.token_mean(values)


class TimedBuilding(PACT):
    """PACT that notes what computing the cache takes, apart from looking up the safety tokens it is for."""

    name = "pact_timed"
    seconds = 0.0

    def _cover(self, model: nn.Module, rows: Sequence[EncodedExample]) -> int:
        covered: list[int] = []
        self.seconds += _clocked(lambda: covered.append(PACT._cover(self, model, rows)))
        return covered[0]


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return times, memory and the size of the cache."""
    seconds: dict[str, list[float]] = {name: [] for name in arguments.variants}
    passed: dict[str, list[float]] = {name: [] for name in arguments.variants}
    memory: dict[str, list[int]] = {name: [] for name in arguments.variants}
    with TemporaryDirectory() as name:
        folder = Path(name)
        start, rows = _files(arguments, folder)
        store = MethodStore(ArtifactStore(folder / "store"), models={"start": start, "base": folder / "base"})
        building = _building(start, rows, store, arguments)
        for number in range(arguments.rounds):
            print(f"round {number + 1}", flush=True)
            for variant in arguments.variants:
                cpu, wall, peak = _fit(variant, start, rows, store, arguments)
                seconds[variant].append(cpu)
                passed[variant].append(wall)
                memory[variant].append(peak)
                print(f"  {variant}: {cpu:.4f} s a step, {peak / 2**20:.0f} MiB at most", flush=True)
    steps, peaks = (
        {v: statistics.median(a / b for a, b in zip(of[v], of["plain"], strict=True)) for v in arguments.variants}
        for of in (seconds, memory)
    )
    for variant in arguments.variants:
        print(f"{variant}: step {steps[variant]:.3f} x plain, memory {peaks[variant]:.3f} x plain")
    bounds = {"step": STEP_BOUND, "memory": MEMORY_BOUND, "bytes_per_token": BYTES_BOUND, "passes": PASSES_BOUND}
    return {
        "seconds": seconds,
        "seconds_passed": passed,
        "peak_bytes": memory,
        "step_times_plain": steps,
        "memory_times_plain": peaks,
        "cache": building,
        "bounds": bounds,
    }


def _building(
    start: Path, rows: Sequence[Example], store: MethodStore, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Return what building the cache took, in seconds and in forward passes over the same rows; bytes a reply token.

    Each is done several times, in turn, into a cache of its own, and the median counts: a pass may be short.
    """
    model, data = _model(start), _data(start, rows, arguments)
    encoded = data.encoded
    # The search for the tokens comes first and is kept, so that the caches are timed alone.
    prepare_methods([PACT(PACTConfig(reference="live"))], model, data, store)
    passes, taken, looking = [], [], []
    for number in range(max(1, arguments.rounds)):
        with on_fast_device(model), reference_mode(model):
            passes.append(_clocked(lambda: _one_pass(model, encoded)))
        method = TimedBuilding(PACTConfig())
        elsewhere = MethodStore(_Fresh(store.artifacts.root, f"build-{number}"), models=store.models)
        whole = _clocked(lambda m=method, s=elsewhere: prepare_methods([m], model, data, s))  # type: ignore[misc]
        taken.append(method.seconds)
        looking.append(whole - method.seconds)
    # The first cache in the common store is the one that training reads.
    kept = PACT(PACTConfig())
    prepare_methods([kept], model, data, store)
    references = kept._references
    if references is None:
        raise ConfigError("Expected a cache to be built, but got none.")
    size = references.bytes / references.tokens
    ratio = statistics.median(spent / once for spent, once in zip(taken, passes, strict=True))
    seconds, other = statistics.median(taken), statistics.median(looking)
    print(
        f"cache: {seconds:.2f} s, {ratio:.2f} forward passes (bound {PASSES_BOUND:g}); {other:.2f} s to look up the "
        f"tokens; {size:.1f} bytes a token"
    )
    return {
        "seconds": seconds,
        "lookup_seconds": other,
        "passes": ratio,
        "bytes_per_token": size,
        "tokens": references.tokens,
    }


class _Fresh(ArtifactStore):
    """The store, but for reference caches, which are built anew in a folder of their own."""

    def __init__(self, root: Path, name: str) -> None:
        super().__init__(root)
        self._name = name

    def path(self, kind: str, key: Any) -> Path:
        """Return the artefact's place."""
        return super().path(f"{self._name}-{kind}" if kind == "pact_reference" else kind, key)


class _PeakMemory:
    """Looks at this process's memory every few milliseconds; what earlier variants left to the allocator counts too."""

    def __init__(self) -> None:
        self.bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> _PeakMemory:
        gc.collect()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        process = psutil.Process()
        while not self._stop.wait(0.005):
            self.bytes = max(self.bytes, process.memory_info().rss)


class _StepTimes(pl.Callback):
    """Notes the time of every step."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, float]] = []

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        _wait()
        self.marks.append((time.process_time(), time.perf_counter()))


def _fit(
    variant: str, start: Path, rows: Sequence[Example], store: MethodStore, arguments: argparse.Namespace
) -> tuple[float, float, int]:
    """Return seconds of a step, of processor (GPU: passed) and passed, and the peak of memory in bytes."""
    model, data = _model(start), _data(start, rows, arguments)
    methods: list[PACT] = []
    if variant != "plain":
        kind: Any = "cached" if variant == "cached" else "live"
        methods = [(Formula if variant == "formula" else PACT)(PACTConfig(reference=kind))]
    prepare_methods(methods, model, data, store)
    times = _StepTimes()
    with quiet_lightning():
        trainer = _trainer(methods, times, model, arguments)
    model.train()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with _PeakMemory() as memory, quiet_lightning():
        trainer.fit(FineTuneModule(model, learning_rate=5e-4, total_steps=arguments.steps + 1), datamodule=data)
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else memory.bytes
    column = 1 if torch.cuda.is_available() else 0
    spans = [
        [after[i] - before[i] for before, after in zip(times.marks, times.marks[1:], strict=False)] for i in (column, 1)
    ]
    return statistics.median(spans[0]), statistics.median(spans[1]), peak


def _trainer(methods: Sequence[PACT], times: _StepTimes, model: nn.Module, arguments: argparse.Namespace) -> pl.Trainer:
    return pl.Trainer(
        accelerator="auto", devices=1, max_steps=arguments.steps + 1, max_epochs=1, logger=False,
        callbacks=compose(methods, observers=[times]), enable_checkpointing=False, enable_progress_bar=False,
        log_every_n_steps=50, enable_model_summary=False, gradient_clip_val=1.0, use_distributed_sampler=False,
        precision="bf16-mixed" if next(model.parameters()).dtype == torch.bfloat16 else "32-true",
    )  # fmt: skip


def _files(arguments: argparse.Namespace, folder: Path) -> tuple[Path, list[Example]]:
    """Return the start model's folder and the rows; an unaligned model is written beside it."""
    if arguments.tiny:
        TinyModel(shift=0.05).build().save_pretrained(folder / "start")
        TinyModel().build().save_pretrained(folder / "base")
        for role in ("start", "base"):
            make_tokenizer().save_pretrained(folder / role)
        return folder / "start", task_examples(BATCH * (arguments.steps + 1))
    start = find_model(ModelSpec(arguments.model)).folder
    other = read_model(start, dtype=choose_dtype("auto"))
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.ndim == 2:
                parameter.add_(NOISE * parameter.std() * torch.randn_like(parameter))
    save_model(other, read_tokenizer(start), folder / "base")
    if arguments.rows == "replies":
        return start, safety_examples("embedded", seed=0, count=BATCH * (arguments.steps + 1))
    return start, list(create_task("triage").train_examples(count=480, seed=0))


def _model(start: Path) -> nn.Module:
    return add_adapter(read_model(start, dtype=choose_dtype("auto")), SPEC)


def _data(start: Path, rows: Sequence[Example], arguments: argparse.Namespace) -> FineTuneDataModule:
    encoder = ChatEncoder(read_tokenizer(start), system="")
    if encoder.tokenizer.pad_token_id is None:
        encoder.tokenizer.pad_token = encoder.tokenizer.eos_token
    data = FineTuneDataModule(
        encoder, batch_size=BATCH, total_steps=arguments.steps + 1, max_length=512, overflow="truncate_left"
    )
    data.add_source("rows", rows)
    return data


def _one_pass(model: nn.Module, rows: Sequence[EncodedExample]) -> None:
    device, order = next(model.parameters()).device, sorted(rows, key=lambda row: len(row.input_ids))
    shares = can_pack(model)
    for first in range(0, len(order), 16):
        part = order[first : first + 16]
        batch = collate(part, example_ids=range(len(part)), pad_id=0, step_reply_tokens=1).to(device)
        forward_reply_tokens(model, batch, share_prefixes=shares)


def _whole_logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Return logits at the reply tokens, computed at every position as the reference code does."""
    at = (batch.labels[:, 1:] != -100).nonzero(as_tuple=True)
    logits: torch.Tensor = model(**batch.model_inputs, use_cache=False).logits
    return logits[at]


def _clocked(call: Callable[[], object]) -> float:
    _wait()
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    before = clock()
    call()
    _wait()
    return clock() - before


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    """Measure and write the results to a file if one is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=ModelSpec().name)
    parser.add_argument("--tiny", action="store_true", help="a tiny random model: checks the script, not the figures")
    parser.add_argument("--rows", choices=("task", "replies"), default="task", help="short labels, or whole sentences")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if "plain" not in arguments.variants:
        parser.error("--variants must name plain: the others are compared with it")
    set_threads(arguments.threads)
    results = measure(arguments)
    if arguments.output:
        model = "tiny" if arguments.tiny else arguments.model
        write_json(arguments.output, results | {"model": model, "environment": environment()})


if __name__ == "__main__":
    main()
