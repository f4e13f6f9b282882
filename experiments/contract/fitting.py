"""One short training run of a tiny model with some methods, and what is remembered of it."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from pytorch_lightning.strategies import DDPStrategy
from torch import nn

from callbacks.checkpoint import FiniteCheckpoint
from datamodules.finetune import FineTuneDataModule
from experiments.contract.case import START
from experiments.contract.tiny import make_tokenizer, task_examples
from framework.adapters import AdapterSpec, add_adapter
from framework.batch import Batch
from framework.chat import ChatEncoder
from framework.composition import compose, prepare_methods
from framework.files import fingerprint
from framework.method import Method, MethodStore
from framework.module import FineTuneModule
from framework.parameters import clean_name

__all__ = [
    "BATCH",
    "STEPS",
    "FitSpec",
    "Fitted",
    "PowerCut",
    "Recorder",
    "build_data",
    "build_model",
    "fit",
    "plain_state",
]

BATCH = 8
STEPS = 4
ROWS = 16
SEED = 0
PROCESS_TIMEOUT = timedelta(seconds=300)
ADAM_EPS = 1e-3
"""About the size of the tiny model's gradients: where a gradient is small the step is small as well. With AdamW's usual
1e-8 a gradient that is nearly zero becomes a whole step of rounding, which may take weights over the tolerance."""


@dataclass(frozen=True)
class FitSpec:
    """How a run is cut and in which numbers it computes."""

    adapter: str = "lora"
    """lora, full or none."""
    steps: int = STEPS
    """Optimizer steps."""
    micro_batch_size: int = BATCH
    """Rows of one forward pass, over all processes."""
    processes: int = 1
    """Processes of the run; this is one of them."""
    precision: str = "32-true"
    """Of the trainer; the model's frozen weights are bfloat16 with bf16-mixed."""
    weight_decay: float = 0.0
    wrapper: str = ""
    """Attribute under which a wrapping module holds the model; empty for none."""
    interrupt_at: int | None = None
    """Step at which the run breaks off."""
    checkpoints: str = ""
    """Folder of checkpoints, one every second step; empty for none."""
    resume_from: str = ""
    """Checkpoint to go on from."""

    @property
    def rows_per_forward(self) -> int:
        """Rows that this process gives to one forward pass."""
        return max(1, self.micro_batch_size // self.processes)


class Recorder(pl.Callback):
    """Watches a run: rows of every step, first gradient, frozen tensors, logged values."""

    def __init__(self, interrupt_at: int | None = None) -> None:
        """Break the run off at a step, if one is given."""
        self.interrupt_at = interrupt_at
        self.served: list[tuple[int, list[int]]] = []
        self.gradient: dict[str, torch.Tensor] = {}
        self.first: dict[str, torch.Tensor] = {}
        self.trained: dict[str, torch.Tensor] = {}
        self.untrained: set[str] = set()
        self.steps = 0
        self.model: nn.Module | None = None
        """What is trained; known also when the run breaks off."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Remember every parameter as training finds it, after the set-up of the methods."""
        self.model = _model(pl_module)
        named = {clean_name(n): p for n, p in self.model.named_parameters()}
        self.first = {name: p.detach().clone() for name, p in named.items()}
        self.untrained = {name for name, p in named.items() if not p.requires_grad}

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Note the rows, or break off."""
        if trainer.global_step == self.interrupt_at:
            raise PowerCut
        self.served.append((trainer.global_step, batch.example_ids.tolist()))

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Keep the first gradient."""
        if not self.gradient:
            named = _model(pl_module).named_parameters()
            self.gradient = {clean_name(n): p.grad.detach().clone() for n, p in named if p.grad is not None}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the weights: at the end of training methods may edit them."""
        self.steps = trainer.global_step
        self.trained = {clean_name(n): p.detach().clone() for n, p in _model(pl_module).named_parameters()}


class PowerCut(Exception):
    """The run breaks off, as when a machine stops."""


class Fitted(NamedTuple):
    """What a run leaves."""

    model: nn.Module
    methods: list[Method]
    recorder: Recorder
    data: FineTuneDataModule
    metrics: dict[str, float]
    """Everything that was logged, last values."""

    @property
    def state(self) -> dict[str, torch.Tensor]:
        """Final tensors by plain name."""
        return plain_state(self.model)

    @property
    def rows_fingerprint(self) -> str:
        """Depends on the training rows, their content and order."""
        return fingerprint([[row.id, row.prompt, row.reply] for row in self.data.rows])


def plain_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return every tensor of a model by its plain name, detached and copied."""
    return {clean_name(name): value.detach().clone() for name, value in model.state_dict().items()}


@lru_cache(maxsize=1)
def _encoder() -> ChatEncoder:
    return ChatEncoder(make_tokenizer())


def build_data(spec: FitSpec) -> FineTuneDataModule:
    """Return the data module with the task's rows."""
    data = FineTuneDataModule(
        _encoder(),
        batch_size=BATCH,
        micro_batch_size=spec.rows_per_forward,
        total_steps=spec.steps,
        max_length=512,
        overflow="truncate_left",
        seed=SEED,
    )
    data.add_source("task", task_examples(ROWS))
    return data


def build_model(spec: FitSpec) -> nn.Module:
    """Return the start model with what is trained; LoRA pairs are warm, so that there is an update from the start."""
    plain = START.build()
    if spec.precision == "bf16-mixed":
        plain = plain.to(torch.bfloat16)  # type: ignore[arg-type]  # stubs of transformers
    torch.manual_seed(SEED)
    adapter = AdapterSpec(kind=spec.adapter, rank=4, alpha=8.0)  # type: ignore[arg-type]
    model = add_adapter(plain, adapter)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return _Wrapped(model, spec.wrapper) if spec.wrapper else model


def fit(
    spec: FitSpec,
    methods: Sequence[Method],
    store: MethodStore,
    *,
    order: Sequence[str] = (),
    is_prepared: bool = True,
    recorder: Recorder | None = None,
) -> Fitted:
    """Train a fresh tiny model with ``methods``.

    Args:
        spec: how.
        methods: fresh ones, in callback order.
        store: where their ``prepare`` finds models and puts artefacts.
        order: declared order.
        is_prepared: False leaves ``prepare`` out.
        recorder: watches the run, and still knows what it saw when the run fails.
    """
    model, data = build_model(spec), build_data(spec)
    if is_prepared:
        prepare_methods(methods, model, data, store)
    pl.seed_everything(SEED, workers=True, verbose=False)
    recorder = recorder or Recorder(spec.interrupt_at)
    writers = []
    if spec.checkpoints:
        writers = [
            FiniteCheckpoint(
                dirpath=spec.checkpoints, every_n_train_steps=2, save_on_train_epoch_end=False, filename="{step}"
            )
        ]
    module = _SteadyModule(model, learning_rate=1e-2, total_steps=spec.steps, weight_decay=spec.weight_decay)
    model.train()
    with quiet():
        callbacks = compose(methods, observers=[recorder], writers=writers, order=order)
        trainer = _trainer(spec, data, callbacks)
        trainer.fit(module, datamodule=data, ckpt_path=spec.resume_from or None)
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
    return Fitted(model.eval(), list(methods), recorder, data, metrics)


def _trainer(spec: FitSpec, data: FineTuneDataModule, callbacks: list[pl.Callback]) -> pl.Trainer:
    options: dict[str, Any] = {}
    if spec.processes > 1:
        strategy = DDPStrategy(process_group_backend="gloo", timeout=PROCESS_TIMEOUT)
        options = {"strategy": strategy, "plugins": [LightningEnvironment()]}
    return pl.Trainer(
        accelerator="cpu",
        devices=spec.processes,
        precision=spec.precision,  # type: ignore[arg-type]
        max_epochs=1,
        max_steps=spec.steps,
        accumulate_grad_batches=max(1, BATCH // spec.processes // spec.rows_per_forward),
        callbacks=callbacks,
        logger=False,
        log_every_n_steps=1,
        enable_checkpointing=bool(spec.checkpoints),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        **options,
    )


class _SteadyModule(FineTuneModule):
    """The module of every run, with steps that do not magnify rounding."""

    def configure_optimizers(self) -> Any:
        configured = super().configure_optimizers()
        for group in configured["optimizer"].param_groups:
            group["eps"] = ADAM_EPS
        return configured


class _Wrapped(nn.Module):
    """A module that holds the model under an attribute and passes everything on, as wrappers do."""

    def __init__(self, model: nn.Module, attribute: str) -> None:
        super().__init__()
        self._attribute = attribute
        self.add_module(attribute, model)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._modules[self._attribute](*args, **kwargs)  # type: ignore[misc]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__(self._attribute), name)


def _model(pl_module: pl.LightningModule) -> nn.Module:
    return pl_module.model  # type: ignore[return-value]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep advice about loaders, loggers and devices off the console; errors come through."""
    logger = logging.getLogger("pytorch_lightning")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
