"""One training stage: model in, model out."""

from __future__ import annotations

import contextlib
import logging
import math
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch import nn

from callbacks.checkpoint import FiniteCheckpoint, FoundCheckpoint, find_checkpoint
from callbacks.guard import Guard
from callbacks.kept_state import KeptState
from callbacks.safety_probe import SafetyProbe
from callbacks.telemetry import LossHistory, RefusalMarginProbe
from datamodules.finetune import FineTuneDataModule
from experiments.attempts import Attempt, Heartbeat, left_behind, open_attempt
from experiments.launch import strategy_of
from experiments.tracking import TrackedMetrics
from framework.composition import apply_edits, check_edit_only, compose, prepare_methods
from framework.config import RunConfig, StageConfig, TrainingConfig
from framework.cost import CostLedger
from framework.errors import ConfigError, TrainingError, WiringError
from framework.files import read_json, to_plain, write_json
from framework.interruption import Interrupted, deferring_stop, stop_requested
from framework.method import Method, MethodStore
from framework.models import (
    AdapterSpec,
    LoadedModel,
    ModelSpec,
    add_adapter,
    load_model,
    merge_adapter,
    save_adapter,
    save_model,
)
from framework.module import FineTuneModule
from framework.parameters import clean_name, count_parameters, trainable_names
from framework.processes import gather, is_main, main_first, on_main
from framework.registry import create_method
from framework.sharding import SHARDED, WholeWeights, build_strategy, load_whole

__all__ = ["StageJob", "build_trainer", "create_methods", "run_stage_job"]

STAGE_FILE = "stage.json"
CHECKPOINTS = "checkpoints"
KEPT_STATES = "kept"
"""Inside the folder of checkpoints, which goes when the stage is done: states a guard may roll back to."""


@dataclass(frozen=True)
class StageJob:
    """Everything one stage needs."""

    name: str
    config: RunConfig
    stage: StageConfig
    settings: TrainingConfig
    model: ModelSpec
    """The model that enters the stage."""
    datamodule: FineTuneDataModule | None
    """None for a stage that only edits weights."""
    store: MethodStore
    base_fingerprint: str
    watchers: tuple[pl.Callback, ...] = ()
    probe: SafetyProbe | None = None
    """Measures for the guard; None when this stage has none."""
    open_logger: Callable[[str], Any] = lambda run_id: False
    """Opens the Lightning logger; all attempts at the stage give it the same id."""
    close_logger: Callable[[Any], None] = lambda logger: None
    say: Callable[[str], None] = lambda text: None
    """Tells the user a sentence."""

    @property
    def run_folder(self) -> Path:
        """Where the run leaves its results."""
        return Path(self.config.output) / self.config.name


def create_methods(stage: StageConfig) -> list[Method]:
    """Return the stage's methods in config order."""
    methods = [create_method(name, options) for name, options in stage.methods.items()]
    for method in methods:
        method.allow_no_effect = stage.allow_no_effect
    return methods


def run_stage_job(job: StageJob, folder: Path) -> dict[str, Any]:
    """Train or edit the model and write what the stage leaves behind.

    What an earlier, interrupted attempt left in the folder is used: training goes on from its newest intact checkpoint.
    With several processes each of them calls this, and the first one writes.

    Args:
        job: the stage.
        folder: receives ``model/`` (merged, float32), ``adapter/`` for LoRA, and ``stage.json``.

    Returns:
        The content of ``stage.json``.
    """
    if on_main(lambda: (folder / STAGE_FILE).is_file()):  # the last attempt got as far as that, and then died
        on_main(lambda: shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True))
        return dict(on_main(lambda: read_json(folder / STAGE_FILE)))
    attempt = on_main(lambda: open_attempt(folder, run=job.run_folder, stage=job.name))
    if is_main():
        for other in left_behind(folder, run=job.run_folder, stage=job.name):
            job.say(
                f"stage {job.name} was left unfinished under other settings in {other}; run with those settings again "
                "to go on with it, or delete the folder"
            )
    logger = job.open_logger(attempt.run_id)
    try:
        record = _run_attempt(job, attempt, logger)
    finally:
        job.close_logger(logger)
    on_main(lambda: _finish(folder, record))
    return record


def _run_attempt(job: StageJob, attempt: Attempt, logger: Any) -> dict[str, Any]:
    ledger, folder = CostLedger(job.name), attempt.folder
    loaded = load_model(job.model)
    seed = job.config.seed
    pl.seed_everything(seed, workers=True, verbose=False)
    model: nn.Module = add_adapter(loaded.model, _adapter_spec(job.settings))
    methods = create_methods(job.stage)
    if not job.settings.has_training:
        check_edit_only(methods)
    with ledger.measure("prepare"):
        main_first(lambda: prepare_methods(methods, model, job.datamodule, job.store))
    record: dict[str, Any] = {"stage": job.name, "seed": seed, "methods": to_plain(job.stage.methods)}
    if job.settings.has_training:
        # A method's preparation may have drawn random numbers; every method starts training from the same state.
        pl.seed_everything(seed, workers=True, verbose=False)
        model, trained = _train(job, model, methods, ledger, attempt, logger)
        record |= trained
    else:
        with ledger.measure("other"):
            apply_edits(model, methods, order=tuple(job.stage.order or ()))
    with ledger.measure("other"):
        has_adapter = job.settings.adapter.kind == "lora"
        on_main(lambda: _export(model, loaded, folder, methods, has_adapter=has_adapter))
    record["effects"] = {
        m.name: {**dict(m.effects), "largest_term": m.largest_term, "reports": m.reports} for m in methods
    }
    record["attempts"] = attempt.number
    ledger.add_seconds("train", attempt.earlier_seconds["train"])
    ledger.add_seconds("other", attempt.earlier_seconds["other"])
    record["cost"] = ledger.to_dict() | {"earlier_seconds": sum(attempt.earlier_seconds.values())}
    return record


def _export(model: nn.Module, loaded: LoadedModel, folder: Path, methods: list[Method], *, has_adapter: bool) -> None:
    if has_adapter:
        save_adapter(model, folder / "adapter")
    plain, given = merge_adapter(model), {"dtype": torch.float32, "processor": loaded.processor}
    save_model(plain, loaded.tokenizer, folder / "model", **given)
    for method in methods:
        method.write_files(folder)


def _finish(folder: Path, record: dict[str, Any]) -> None:
    write_json(folder / STAGE_FILE, record)
    # The stage is done: nothing resumes any more. Until here a process that dies loses a few steps, not all.
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)


def _train(
    job: StageJob, model: nn.Module, methods: list[Method], ledger: CostLedger, attempt: Attempt, logger: Any
) -> tuple[nn.Module, dict[str, Any]]:
    datamodule, settings, folder = _training_data(job, methods), job.settings, attempt.folder
    module = FineTuneModule(
        model,
        learning_rate=settings.learning_rate,
        total_steps=datamodule.total_steps,
        weight_decay=settings.weight_decay,
        warmup_ratio=settings.warmup_ratio,
        gradient_checkpointing=settings.gradient_checkpointing,
        base_fingerprint=job.base_fingerprint,
    )
    history, whole, guard = LossHistory(folder / "history.csv"), WholeWeights(), _guard(job, folder)
    guards = [] if guard is None else [guard]
    callbacks = compose(
        methods,
        observers=[history, *job.watchers, TrackedMetrics(logger), *guards, Heartbeat(attempt), whole],
        writers=[_checkpoint_writer(job, folder)],
        order=tuple(job.stage.order or ()),
    )
    total = count_parameters(model)[1]
    model.train()
    found = _find_checkpoint(job, folder, total_steps=datamodule.total_steps)
    with ledger.measure("train"), quiet_lightning():
        trainer = build_trainer(job.config, settings, datamodule, callbacks, logger=logger, folder=folder, model=model)
        with _interruptions(job.name), deferring_stop():
            trainer.fit(module, datamodule=datamodule, ckpt_path=found.path, weights_only=True)
    if trainer.global_step != datamodule.total_steps and not (guard and guard.stopped):
        raise TrainingError(
            f"Expected stage `{job.name}` to take {datamodule.total_steps} steps, but it stopped after "
            f"{trainer.global_step}. Run the same command again to redo the stage."
        )
    model = _whole_model(job, model, whole)
    trainable = count_parameters(model)[0]  # after `setup`, where methods add and freeze
    trainable += sum(method.effects["parameters_folded"] for method in methods)  # and taken off again at the end
    for method in methods:
        ledger.add_stored(method.effects["stored_numbers"])
    ledger.add_training(
        model,
        tokens=sum(gather(module.tokens_seen)),
        reply_tokens=sum(gather(module.reply_tokens_seen)),
        trainable=trainable,
        total=total,
        kind=settings.adapter.kind,
    )
    return model, {
        "steps": trainer.global_step,
        "resumed_from_step": found.step or None,
        "rows": len(datamodule.rows),
        "overflow": datamodule.overflow_report._asdict(),
        "trainable_parameters": trainable,
        "curves": history.curves(),
        "probes": [w.history for w in job.watchers if isinstance(w, RefusalMarginProbe)],
        "telemetry": _telemetry(job, guard),
        **({} if guard is None else {"guard": guard.result()}),
    }


def _guard(job: StageJob, folder: Path) -> Guard | None:
    """Return the guard of this stage, if it has one; only an adapter is small enough to be kept in memory."""
    settings = job.config.trainer.guard
    if settings is None or job.probe is None:
        return None
    kept = KeptState(None if job.settings.adapter.kind == "lora" else folder / CHECKPOINTS / KEPT_STATES)
    return Guard(settings, job.probe, kept=kept, say=lambda text: job.say(f"stage {job.name}: {text}"))


def _telemetry(job: StageJob, guard: Guard | None) -> dict[str, list[tuple[int, float]]]:
    """Return what was measured while training, by name; a probe of its own goes before the guard's."""
    history = {} if guard is None else guard.history
    found = {name: [(s, v) for s, v in entries if math.isfinite(v)] for name, entries in history.items()}
    return found | {k: h for w in job.watchers if isinstance(w, RefusalMarginProbe) for k, h in w.histories.items()}


def _whole_model(job: StageJob, model: nn.Module, whole: WholeWeights) -> nn.Module:
    """Return the trained model on the CPU; where processes hold parts of it, a new one with the gathered weights."""
    if strategy_of(job.config.trainer) not in SHARDED:
        return model.to("cpu")
    trains = {clean_name(name) for name in trainable_names(model)}
    fresh = add_adapter(load_model(job.model).model, _adapter_spec(job.settings))
    if is_main():
        load_whole(fresh, whole.weights)
    for name, parameter in fresh.named_parameters():
        parameter.requires_grad_(clean_name(name) in trains)
    return fresh


def _checkpoint_writer(job: StageJob, folder: Path) -> FiniteCheckpoint:
    return FiniteCheckpoint(
        dirpath=folder / CHECKPOINTS,
        every_n_train_steps=job.config.trainer.checkpoint_every_n_steps,
        save_on_train_epoch_end=False,
        filename="{step}",
        should_stop=stop_requested,
    )


def _find_checkpoint(job: StageJob, folder: Path, *, total_steps: int) -> FoundCheckpoint:
    """Return where training goes on, and say so; what is damaged is set aside.

    A checkpoint of the last step is left out: Lightning would skip the end of training, and with it what methods do
    there with the random numbers of that moment.
    """
    found = on_main(lambda: find_checkpoint(folder / CHECKPOINTS, before=total_steps, set_aside=True))
    if is_main():
        for problem in found.refused:
            job.say(f"{problem} It was set aside.")
        if found.path is not None:
            job.say(f"stage {job.name} goes on after step {found.step} of {total_steps}")
        elif found.refused:
            job.say(f"stage {job.name} starts over: no intact checkpoint is left")
    return found


@contextlib.contextmanager
def _interruptions(stage: str) -> Iterator[None]:
    """Name the stage in an interruption, and give those that Lightning renames their own names back."""
    try:
        yield
    except Interrupted as stop:
        raise Interrupted(stop.signum, f"{stop.where} of stage {stage}") from None
    except SIGTERMException as stop:  # a signal before the first step, when Lightning still listens
        raise Interrupted(signal.SIGTERM) from stop
    except SystemExit as exit_:  # Lightning turns Ctrl-C into an exit without a word
        raise KeyboardInterrupt from exit_


def _training_data(job: StageJob, methods: list[Method]) -> FineTuneDataModule:
    """Return the stage's data; refuse a stage without data or without anything to train."""
    if job.datamodule is None:
        raise WiringError(f"Expected stage `{job.name}` to have data, but got none.")
    if job.settings.adapter.kind == "none" and not any("prepare_model" in method.points for method in methods):
        raise ConfigError(
            f"Expected stage `{job.name}` to train something, but got `adapter.kind: none` and no method that adds "
            "parameters. Choose lora or full."
        )
    return job.datamodule


def build_trainer(
    config: RunConfig,
    settings: TrainingConfig,
    datamodule: FineTuneDataModule,
    callbacks: list[pl.Callback],
    *,
    logger: Any,
    folder: Path,
    model: nn.Module,
) -> pl.Trainer:
    """Return the Trainer of a stage: the whole run is one epoch, and our sampler, not Lightning's, shards it."""
    given = config.trainer
    world_size = given.devices * given.num_nodes
    per_process = settings.batch_size // world_size
    micro = settings.micro_batch_size or max(1, per_process)
    precision = given.precision or default_precision(model)
    return pl.Trainer(
        accelerator=given.accelerator,
        devices=given.devices,
        num_nodes=given.num_nodes,
        precision=precision,
        strategy=build_strategy(given.strategy, model, num_processes=world_size),
        deterministic=given.deterministic or None,
        max_epochs=1,
        max_steps=datamodule.total_steps,
        accumulate_grad_batches=max(1, per_process // micro),
        gradient_clip_val=settings.gradient_clip,
        callbacks=callbacks,
        logger=logger,
        log_every_n_steps=given.log_every_n_steps,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )


def default_precision(model: nn.Module) -> Any:
    """Return bf16-mixed for a model with bfloat16 weights, else 32-true."""
    return "bf16-mixed" if any(p.dtype == torch.bfloat16 for p in model.parameters()) else "32-true"


def _adapter_spec(settings: TrainingConfig) -> AdapterSpec:
    given = settings.adapter
    targets = given.target_modules
    return AdapterSpec(
        kind=given.kind,
        rank=given.rank,
        alpha=given.alpha,
        dropout=given.dropout,
        targets=targets if isinstance(targets, str) else tuple(targets),
    )


@contextlib.contextmanager
def quiet_lightning() -> Iterator[None]:
    """Keep Lightning's advice about hardware, workers and loggers off the console; errors still come through."""
    logger = logging.getLogger("pytorch_lightning")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=UserWarning, module="pytorch_lightning")
            warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
            yield
    finally:
        logger.setLevel(level)
