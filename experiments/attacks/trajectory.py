"""Fine-tuning as an attacker does it: one training per learning rate, and the model at several steps on the way.

It is built of what the stages of a run use (data module, module, trainer) and leaves neither run folder nor log. The
rate is constant, so that the model after s steps is what an attacker with a budget of s steps would stop at; a schedule
that ends at 0 would make each budget a training of its own. Only what is trained is kept at a step: a few MB with LoRA,
the whole model with full fine-tuning. The model of a step is made from it when it is asked for.
"""

# ruff: noqa: RUF009 - `setting` is dataclasses.field with a rule, which ruff does not know.

from __future__ import annotations

import gc
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.utilities.seed import isolate_rng
from safetensors.torch import load_file, save_file
from torch import nn

from datamodules.finetune import FineTuneDataModule
from experiments.attacks.held_out_loss import MAX_LENGTH, mean_loss
from experiments.attacks.interface import FAILED_TRAINING, AttackedModel, ModelAttack, ModelTarget
from experiments.attacks.model_folders import (
    differs_from,
    list_problems,
    load_exact,
    nothing_changed,
    passing_folder,
    save_exact,
)
from experiments.training import build_trainer, quiet_lightning
from framework.chat import ChatEncoder
from framework.composition import compose
from framework.config import AdapterConfig, RunConfig, TrainerConfig, TrainingConfig
from framework.errors import ConfigError, TrainingError
from framework.examples import Example
from framework.fields import COUNT, COUNT_OR_ZERO, POSITIVE, check_instance, setting
from framework.models import AdapterSpec, ModelSpec, add_adapter, load_model, merge_adapter
from framework.module import FineTuneModule
from framework.parameters import nonfinite_names

__all__ = ["FineTuningAttack", "FineTuningConfig", "Rows", "Snapshot", "export_step", "train_trajectory"]


@dataclass(frozen=True)
class FineTuningConfig:
    """Settings that all fine-tuning attacks have."""

    adapter: AdapterConfig = setting(factory=lambda: AdapterConfig(targets=["all-linear"]))
    """What is trained: lora or full."""
    examples: list[int] = setting(factory=lambda: [100], rule=COUNT)
    """Rows trained on; each number is a training of its own, and a smaller one takes a part of a larger one's rows."""
    learning_rates: list[float] = setting(factory=lambda: [1e-4, 1e-3], rule=POSITIVE)
    """Constant rates of AdamW; each is a training of its own."""
    steps: list[int] = setting(factory=lambda: [0, 10, 20, 50, 100], rule=COUNT_OR_ZERO)
    """Optimizer steps after which the model is measured; the last one ends the training."""
    batch_size: int = setting(10, rule=COUNT)
    """Rows of a step."""
    micro_batch_size: int | None = setting(None, rule=COUNT)
    """Rows of one forward pass; null takes the whole batch."""

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: lists every problem.
        """
        check_instance(self)
        problems = list_problems(examples=self.examples, learning_rates=self.learning_rates, steps=self.steps)
        if self.steps and max(self.steps) == 0:
            problems.append(
                f"Expected `steps` to hold a number above 0, but got {self.steps}: that attacks nothing. Add a step."
            )
        if self.adapter.kind == "none":
            problems.append("Expected `adapter.kind` to be lora or full, but got 'none'. There is nothing to train.")
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            problems.append(
                f"Expected `micro_batch_size` to divide `batch_size` {self.batch_size}, but got "
                f"{self.micro_batch_size}."
            )
        if problems:
            raise ConfigError(problems)

    @property
    def measured_steps(self) -> list[int]:
        """The steps, ascending."""
        return sorted(self.steps)


@dataclass(frozen=True)
class Rows:
    """What an attacker trains on, and how they ask afterwards."""

    examples: Sequence[Example]
    held_out: Sequence[Example] = ()
    """Rows of the same kind that are not trained on; their loss is among the facts."""
    system: str | None = None
    """System message in training and afterwards; None keeps the target's."""
    template: str = "{request}"
    """What becomes of a request afterwards."""
    num_left_out: int = 0
    """Rows that were left out because they are among the measured requests."""


@dataclass(frozen=True)
class Snapshot:
    """What was trained, at one step."""

    step: int
    path: Path
    cost: Mapping[str, Any] = field(default_factory=dict)
    """Since the snapshot before: seconds, optimizer_steps, tokens."""
    loss: float = float("nan")
    """Of the step, on its own rows, in nats a reply token."""


class FineTuningAttack(ModelAttack):
    """Base of the attacks that train; a subclass says on which rows."""

    kind = "finetuning"
    unit = "steps"
    config: FineTuningConfig

    @property
    def num_models(self) -> int:
        """One a step of every training."""
        return len(self.config.steps) * self._num_trainings

    @property
    def num_steps(self) -> int:
        """Of all trainings."""
        return max(self.config.steps) * self._num_trainings

    @property
    def _num_trainings(self) -> int:
        return len(self.config.examples) * len(self.config.learning_rates)

    @abstractmethod
    def rows(self, target: ModelTarget, count: int) -> Rows:
        """Return the rows of a training.

        Args:
            target: the model under attack.
            count: rows to train on.

        Raises:
            DataError: there are fewer.
        """

    def make(self, target: ModelTarget, folder: Path) -> Iterator[AttackedModel]:
        """Yield the model at every step of every training; the one after 0 steps is the target itself.

        Raises:
            ConfigError: the target lacks what the rows are made of.
            DataError: there are fewer rows than asked for.
            TrainingError: no training gave a model; one of several that fails is noted and the others go on.
            WiringError: a model has the weights of the target.
        """
        if lacking := self.missing(target):
            raise ConfigError(lacking)
        failed: list[str] = []
        num_trained = 0
        for count in self.config.examples:
            rows = self.rows(target, count)
            for rate in self.config.learning_rates:
                with passing_folder(folder / f"rows-{count}-rate-{rate:g}") as place:
                    for made in self._train(target, rows, rate, place):
                        num_trained += made.spent > 0
                        failed += [made.facts["failed"]] if "failed" in made.facts else []
                        yield made
        if not num_trained:
            raise TrainingError(
                f"Expected at least one of {self._num_trainings} trainings to give a model, but got none: "
                f"{' '.join(dict.fromkeys(failed))} Name lower `learning_rates`."
            )

    def _train(self, target: ModelTarget, rows: Rows, rate: float, folder: Path) -> Iterator[AttackedModel]:
        """Yield the models of one training; where it fails, the target itself with the reason among its facts."""
        asked: dict[str, Any] = {"system": rows.system, "template": rows.template}
        setting_ = {"learning_rate": rate, "examples": len(rows.examples), "adapter": self.config.adapter.kind}
        common: dict[str, Any] = {"measured_rows_left_out": rows.num_left_out} if target.requests else {}
        if 0 in self.config.steps:
            facts = {**common, **self._held_out(target, rows, target.folder)}
            yield AttackedModel(target.folder, 0, setting_, facts, **asked)
        try:
            snapshots, stopped = train_trajectory(target, rows, self.config, learning_rate=rate, folder=folder)
            common |= {} if stopped is None else {"stopped": stopped}
            for snapshot in snapshots:
                with passing_folder(folder / f"step-{snapshot.step}") as place:
                    export_step(target, snapshot, self.config.adapter, place)
                    snapshot.path.unlink()
                    facts = {"loss": snapshot.loss, **common, **self._held_out(target, rows, place)}
                    yield AttackedModel(place, snapshot.step, setting_, facts, snapshot.cost, **asked)
        except TrainingError as error:
            # A setting of its own: the model after 0 steps may be among the points already.
            failed = {**setting_, **FAILED_TRAINING}
            yield AttackedModel(target.folder, 0, failed, {**common, "failed": str(error)}, **asked)

    def _held_out(self, target: ModelTarget, rows: Rows, folder: Path) -> dict[str, Any]:
        """Return the loss of the rows that were held out, if there are any."""
        return {"held_out_loss": mean_loss(folder, rows.held_out, target)} if rows.held_out else {}


class ConstantRate(FineTuneModule):
    """Trains with AdamW at one rate from the first step to the last."""

    def configure_optimizers(self) -> Any:
        """Return AdamW over the trainable parameters."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.AdamW(parameters, lr=self.learning_rate, weight_decay=self.weight_decay)


class StepKeeper(Checkpoint):
    """Writes what is trained after certain steps."""

    def __init__(self, steps: Sequence[int], folder: Path, on_step: Callable[[], None] | None = None) -> None:
        """Name the steps, the folder and who is told of every optimizer step."""
        super().__init__()
        self.kept: list[Snapshot] = []
        self._on_step, self._told = on_step, 0
        self._steps, self._folder = frozenset(steps), folder
        self._before: tuple[float, int, int] = (time.perf_counter(), 0, 0)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write after a wanted step, unless a weight is no longer finite."""
        step = trainer.global_step
        if self._on_step is not None and step > self._told:  # not after every micro-batch
            self._told = step
            self._on_step()
        is_new = step > (self.kept[-1].step if self.kept else 0)
        if step not in self._steps or not is_new or nonfinite_names(pl_module):
            return
        module: Any = pl_module
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"step-{step}.safetensors"
        trained = {n: p.detach().cpu().contiguous() for n, p in module.model.named_parameters() if p.requires_grad}
        save_file(trained, path)
        now = (time.perf_counter(), step, module.tokens_seen)
        seconds, steps, tokens = (after - before for after, before in zip(now, self._before, strict=True))
        cost = {"seconds": seconds, "optimizer_steps": steps, "tokens": tokens}
        self.kept.append(Snapshot(step, path, cost, float(trainer.callback_metrics["train/loss"])))
        self._before = now


def train_trajectory(
    target: ModelTarget, rows: Rows, config: FineTuningConfig, *, learning_rate: float, folder: Path
) -> tuple[list[Snapshot], str | None]:
    """Train the target once and return what was kept on the way, and why training stopped early, if it did.

    All random states are as before afterwards; everything random in training follows from the target's seed.

    Args:
        target: the model; its folder is left as it is.
        rows: to train on.
        config: what is trained, how long.
        learning_rate: constant.
        folder: receives a file a step.

    Raises:
        DataError: a row has no reply.
        TrainingError: the loss is not finite before the first step that is kept.
    """
    dtype: Any = "float32" if config.adapter.kind == "full" else target.dtype
    loaded = load_model(ModelSpec(str(target.folder), dtype))
    settings = _settings(config, learning_rate)
    system = target.system if rows.system is None else rows.system
    data = FineTuneDataModule(
        ChatEncoder(loaded.tokenizer, system=system),
        batch_size=config.batch_size,
        micro_batch_size=config.micro_batch_size,
        total_steps=max(config.steps),
        max_length=MAX_LENGTH,
        overflow="truncate_left",
        seed=target.seed,
    )
    data.add_source("attack", rows.examples)
    keeper = StepKeeper(config.measured_steps, folder, target.on_step)
    stopped = None
    with isolate_rng():
        pl.seed_everything(target.seed, workers=True, verbose=False)
        model = add_adapter(loaded.model, adapter_spec(config.adapter)).train()
        module = ConstantRate(model, learning_rate=learning_rate, total_steps=max(config.steps))
        try:
            _fit(module, data, settings, keeper, accelerator=target.accelerator, folder=folder)
        except TrainingError as error:
            if not keeper.kept:
                raise
            stopped = str(error)
    del loaded, model, module
    gc.collect()
    return keeper.kept, stopped


def export_step(target: ModelTarget, snapshot: Snapshot, adapter: AdapterConfig, folder: Path) -> None:
    """Write the whole model of one step, in float32.

    Args:
        target: the model that was trained.
        snapshot: what was trained.
        adapter: as in training.
        folder: receives the model.

    Raises:
        TrainingError: the merged weights are not finite.
        WiringError: after at least one step the model has the weights of the target.
    """
    loaded = load_exact(target.folder)
    with isolate_rng():  # the pairs are drawn at random before they get their values
        model: nn.Module = add_adapter(loaded.model, adapter_spec(adapter))
    trained = load_file(snapshot.path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(trained[name])
    whole: Any = merge_adapter(model)
    if snapshot.step and not differs_from(whole, target.folder):
        raise nothing_changed(
            f"training for {snapshot.step} steps",
            "every weight is what it was",
            "Raise `learning_rates`, and check that `adapter.targets` names what should be trained.",
        )
    save_exact(replace(loaded, model=whole), folder)


def adapter_spec(adapter: AdapterConfig) -> AdapterSpec:
    """Return what is trained, as the framework takes it."""
    targets = adapter.target_modules
    return AdapterSpec(
        kind=adapter.kind,
        rank=adapter.rank,
        alpha=adapter.alpha,
        dropout=adapter.dropout,
        targets=targets if isinstance(targets, str) else tuple(targets),
    )


def _settings(config: FineTuningConfig, learning_rate: float) -> TrainingConfig:
    return TrainingConfig(
        adapter=config.adapter,
        learning_rate=learning_rate,
        batch_size=config.batch_size,
        micro_batch_size=config.micro_batch_size,
        max_steps=max(config.steps),
        max_length=MAX_LENGTH,
        overflow="truncate_left",
    )


def _fit(
    module: FineTuneModule,
    data: FineTuneDataModule,
    settings: TrainingConfig,
    keeper: StepKeeper,
    *,
    accelerator: str,
    folder: Path,
) -> None:
    """Train; Ctrl-C is what it was, not the silent exit that Lightning makes of it."""
    run = RunConfig(name="attack", trainer=TrainerConfig(accelerator=accelerator))  # type: ignore[arg-type]
    callbacks = compose([], writers=[keeper])
    with quiet_lightning():
        trainer = build_trainer(run, settings, data, callbacks, logger=False, folder=folder, model=module.model)
        try:
            trainer.fit(module, datamodule=data)
        except SystemExit as exit_:
            raise KeyboardInterrupt from exit_
