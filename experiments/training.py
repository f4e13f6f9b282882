"""One training stage: model in, model out."""

from __future__ import annotations

import contextlib
import logging
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from callbacks.checkpoint import FiniteCheckpoint
from callbacks.telemetry import LossHistory, RefusalMarginProbe
from datamodules.finetune import FineTuneDataModule
from framework.composition import apply_edits, compose, prepare_methods
from framework.config import RunConfig, StageConfig, TrainingConfig
from framework.cost import CostLedger
from framework.errors import ConfigError, TrainingError, WiringError
from framework.files import to_plain, write_json
from framework.method import Method, MethodStore
from framework.models import AdapterSpec, ModelSpec, add_adapter, load_model, merge_adapter, save_adapter, save_model
from framework.module import FineTuneModule
from framework.parameters import count_parameters
from framework.registry import create_method

__all__ = ["StageJob", "build_trainer", "create_methods", "run_stage_job"]

STAGE_FILE = "stage.json"


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
    logger: Any = False


def create_methods(stage: StageConfig) -> list[Method]:
    """Return the stage's methods in config order."""
    methods = [create_method(name, options) for name, options in stage.methods.items()]
    for method in methods:
        method.allow_no_effect = stage.allow_no_effect
    return methods


def run_stage_job(job: StageJob, folder: Path) -> dict[str, Any]:
    """Train or edit the model and write what the stage leaves behind.

    Args:
        job: the stage.
        folder: receives ``model/`` (merged, float32), ``adapter/`` for LoRA, and ``stage.json``.

    Returns:
        The content of ``stage.json``.
    """
    ledger = CostLedger(job.name)
    loaded = load_model(job.model)
    seed = job.config.seed
    pl.seed_everything(seed, workers=True, verbose=False)
    model: nn.Module = add_adapter(loaded.model, _adapter_spec(job.settings))
    methods = create_methods(job.stage)
    with ledger.measure("prepare"):
        prepare_methods(methods, model, job.datamodule, job.store)
    record: dict[str, Any] = {"stage": job.name, "seed": seed, "methods": to_plain(job.stage.methods)}
    if job.settings.has_training:
        # A method's preparation may have drawn random numbers; every method starts training from the same state.
        pl.seed_everything(seed, workers=True, verbose=False)
        record |= _train(job, model, methods, ledger, folder)
    else:
        with ledger.measure("other"):
            apply_edits(model, methods)
    with ledger.measure("other"):
        if job.settings.adapter.kind == "lora":
            save_adapter(model, folder / "adapter")
        merged = merge_adapter(model)
        save_model(merged, loaded.tokenizer, folder / "model", dtype=torch.float32)
    record["effects"] = {
        m.name: {**dict(m.effects), "largest_term": m.largest_term, "reports": m.reports} for m in methods
    }
    record["cost"] = ledger.to_dict()
    write_json(folder / STAGE_FILE, record)
    return record


def _train(job: StageJob, model: nn.Module, methods: list[Method], ledger: CostLedger, folder: Path) -> dict[str, Any]:
    datamodule, settings = _training_data(job, methods), job.settings
    module = FineTuneModule(
        model,
        learning_rate=settings.learning_rate,
        total_steps=datamodule.total_steps,
        weight_decay=settings.weight_decay,
        warmup_ratio=settings.warmup_ratio,
        gradient_checkpointing=settings.gradient_checkpointing,
        base_fingerprint=job.base_fingerprint,
    )
    history = LossHistory(folder / "history.csv")
    checkpoint = FiniteCheckpoint(
        dirpath=folder / "checkpoints",
        every_n_train_steps=job.config.trainer.checkpoint_every_n_steps,
        save_on_train_epoch_end=False,
        filename="{step}",
    )
    callbacks = compose(
        methods, observers=[history, *job.watchers], writers=[checkpoint], order=tuple(job.stage.order or ())
    )
    total = count_parameters(model)[1]
    model.train()
    with ledger.measure("train"), quiet_lightning():
        trainer = build_trainer(
            job.config, settings, datamodule, callbacks, logger=job.logger, folder=folder, model=model
        )
        try:
            trainer.fit(module, datamodule=datamodule)
        except SystemExit as exit_:  # Lightning turns Ctrl-C into an exit without a word
            raise KeyboardInterrupt from exit_
    if trainer.global_step != datamodule.total_steps:
        raise TrainingError(
            f"Expected stage `{job.name}` to take {datamodule.total_steps} steps, but it stopped after "
            f"{trainer.global_step}. Run the same command again to redo the stage."
        )
    model.to("cpu")
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # the stage is done: nothing resumes from them
    trainable = count_parameters(model)[0]  # after `setup`, where methods add and freeze
    for method in methods:
        ledger.add_stored(method.effects["stored_numbers"])
    ledger.add_training(
        model,
        tokens=module.tokens_seen,
        reply_tokens=module.reply_tokens_seen,
        trainable=trainable,
        total=total,
        kind=settings.adapter.kind,
    )
    return {
        "steps": trainer.global_step,
        "rows": len(datamodule.rows),
        "overflow": datamodule.overflow_report._asdict(),
        "trainable_parameters": trainable,
        "curves": history.curves(),
        "probes": [w.history for w in job.watchers if isinstance(w, RefusalMarginProbe)],
    }


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
    return pl.Trainer(
        accelerator=given.accelerator,
        devices=given.devices,
        num_nodes=given.num_nodes,
        strategy=given.strategy,
        precision=given.precision or default_precision(model),
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
