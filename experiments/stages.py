"""The chain of stages: each takes a model and gives a model, found again by what decides it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from callbacks.safety_probe import SafetyProbe
from callbacks.telemetry import RefusalMarginProbe
from datamodules.catalog import evaluation_prompts, harmful_examples
from datamodules.finetune import FineTuneDataModule
from experiments.fingerprints import embedded_hash, guard_key, resolved_methods, versions
from experiments.launch import check_connected, check_methods
from experiments.stage_data import build_datamodule, check_mining, poison_examples
from experiments.training import STAGE_FILE, StageJob, run_stage_job
from framework.chat import ChatEncoder
from framework.config import RunConfig, StageConfig, TrainingConfig
from framework.errors import ConfigError, SeawallError
from framework.evaluation.margin import refusal_margin
from framework.examples import Example, Prompt
from framework.files import ArtifactStore, fingerprint, read_json
from framework.interruption import check_stop, stop_requested
from framework.method import MethodStore
from framework.model_files import read_tokenizer
from framework.models import ModelSpec, find_model, model_fingerprint, resolved_dtype
from framework.processes import gather, is_main, main_first, on_main, writing_together

__all__ = ["ModelState", "StageChain", "Watch", "spread"]

PROBE_STRIDE = 4
"""Every fourth validation prompt: ten prompts over all topics."""
FORMAT = 1
"""Raise it when the meaning of a stage's key changes, so that old outputs are not taken for new ones."""


@dataclass(frozen=True)
class ModelState:
    """A model at a point of the run."""

    point: str
    """``start`` or the stage it came out of."""
    folder: Path
    """Holds the weights."""
    fingerprint: str
    record: dict[str, Any] = field(default_factory=dict)
    """``stage.json`` of the stage; empty for ``start``."""
    is_reused: bool = False


@dataclass(frozen=True)
class Watch:
    """What a caller wants to see of the stages."""

    progress: Callable[[str, int | None], Callable[..., None]]
    """Opens a bar: (name, total) -> (done, total)."""
    callbacks: Callable[[str], tuple[pl.Callback, ...]]
    """Watching callbacks of a stage."""
    open_logger: Callable[[str, StageConfig, str], Any]
    """Opens the Lightning logger of a stage; False for none. The last argument is the same for all attempts at it."""
    close_logger: Callable[[Any], None]
    say: Callable[[str], None] = lambda text: None
    """Tells the user a sentence."""


class StageChain:
    """Runs the stages of one config, or finds their outputs.

    Every process of a run has one and calls the same functions; the first fetches, samples and writes, and all of them
    train.
    """

    def __init__(self, config: RunConfig, artifacts: ArtifactStore, watch: Watch) -> None:
        """Find the start model; it is fetched and converted when needed.

        Args:
            config: the run.
            artifacts: where stage outputs are kept.
            watch: progress, watching callbacks and loggers.

        Raises:
            ConfigError: the config asks for another number of processes than there are, or names a method that does
                not support its strategy.
        """
        check_connected(config.trainer)
        check_methods(config)
        main_first(lambda: check_mining(config))
        self.config = config
        self.artifacts = artifacts
        self.watch = watch
        given = config.model
        self.spec = ModelSpec(given.name, given.dtype, given.revision, given.trust_remote_code)
        bar = watch.progress("model", 100)
        folder = on_main(lambda: find_model(self.spec, progress=lambda _, share: bar(round(100 * share), 100)).folder)
        self.start = ModelState("start", folder, on_main(lambda: model_fingerprint(folder)))

    def run(self, *, before: str | None = None) -> list[ModelState]:
        """Return the model at every point, ``start`` first.

        Args:
            before: name of the stage to stop short of; None runs them all.
        """
        states = [self.start]
        for name, stage in self.config.active_stages():
            if name == before:
                break
            states.append(self._run_stage(name, stage, states))
        return states

    def encoder(self, state: ModelState) -> ChatEncoder:
        """Return the encoder of a model."""
        tokenizer = read_tokenizer(state.folder, trust_remote_code=self.config.model.trust_remote_code)
        return ChatEncoder(tokenizer, system=self.config.model.system)

    def model_spec(self, state: ModelState) -> ModelSpec:
        """Return how a state's model is loaded: from its folder, in the run's dtype."""
        return replace(self.spec, name=str(state.folder), revision=None)

    def _run_stage(self, name: str, stage: StageConfig, states: list[ModelState]) -> ModelState:
        before, settings = states[-1], self.config.training(name)
        if not settings.has_training and not stage.methods:
            raise ConfigError(
                f"Expected stage `{name}` with 0 steps to have a method, but got none. Give it `max_steps` or a method "
                "that edits weights."
            )
        datamodule = self._datamodule(stage, settings, before)
        if datamodule is not None:
            datamodule.mining_progress = self.watch.progress("mine", None)
        base = self._base(states)
        key = self._key(name, stage, settings, before, base, datamodule)
        _check_same(name, key)
        found = on_main(lambda: self.artifacts.find("stage", key))
        reused = found is not None
        if found is None:
            try:
                job = StageJob(
                    name,
                    self.config,
                    stage,
                    settings,
                    self.model_spec(before),
                    datamodule,
                    self._store(states, base),
                    before.fingerprint,
                    watchers=(*self.watch.callbacks(name), *self._probes(before)),
                    probe=self._safety_probe(name, before),
                    open_logger=lambda run_id: self.watch.open_logger(name, stage, run_id),
                    close_logger=self.watch.close_logger,
                    say=self.watch.say,
                )
                with writing_together(self.artifacts, "stage", key, keep_partial=True) as folder:
                    # Another command may have finished the stage while this one waited for the lock.
                    if on_main(lambda: self.artifacts.find("stage", key)) is None:
                        run_stage_job(job, folder)
                check_stop(max(gather(stop_requested() or 0)) or None)
            finally:
                # Trainer, module and callbacks refer to each other: without this the next stage holds two models.
                gc.collect()
            found = self.artifacts.path("stage", key)
        record = read_json(found / STAGE_FILE)
        guard = self.config.trainer.guard
        if guard is not None and guard.guards(name) and "guard" not in record and is_main():
            self.watch.say(
                f"stage {name}: it was trained without a guard and is reused, so that the guard measured nothing; a "
                "guard that only watches does not train a stage again"
            )
        return ModelState(name, found / "model", fingerprint(key), record, reused)

    def _probes(self, before: ModelState) -> list[pl.Callback]:
        """Return the refusal-margin probe, when the run asks for one; it watches and changes nothing."""
        every = self.config.trainer.probe_every_n_steps
        if every is None:
            return []
        encoder = self.encoder(before)
        prompts = evaluation_prompts("embedded", kind="safety", split="validation")[::PROBE_STRIDE]

        def look(model: Any) -> dict[str, float]:
            found = refusal_margin(model, encoder, prompts, batch_size=len(prompts))
            return {"refusal_margin": found.mean, "refusal_probability": found.refusal_probability}

        return [RefusalMarginProbe(look, every=every)]

    def _safety_probe(self, name: str, before: ModelState) -> SafetyProbe | None:
        """Return what the guard measures with, when this stage has one."""
        guard = self.config.trainer.guard
        if guard is None or not guard.guards(name):
            return None
        harmful, benign = (
            spread(evaluation_prompts("embedded", kind=kind, split="validation"), guard.prompts)
            for kind in ("safety", "over_refusal")
        )
        return SafetyProbe(self.encoder(before), harmful, benign, layer=guard.layer)

    def _base(self, states: list[ModelState]) -> ModelState:
        """Return the model that entered ``align``; without that stage, the start model."""
        points = [state.point for state in states]
        return states[points.index("align") - 1] if "align" in points else states[0]

    def _store(self, states: list[ModelState], base: ModelState) -> MethodStore:
        roles = {"start": states[-1], "base": base}
        # A run without `align` starts from a model that is aligned already; within that stage there is none yet.
        aligned = [state for state in states if state.point == "align"] or states[:1]
        if self.config.stages.align is None or aligned[0].point == "align":
            roles["aligned"] = aligned[0]
        return MethodStore(
            self.artifacts,
            models={role: state.folder for role, state in roles.items()},
            fingerprints={role: state.fingerprint for role, state in roles.items()},
        )

    def _datamodule(
        self, stage: StageConfig, settings: TrainingConfig, before: ModelState
    ) -> FineTuneDataModule | None:
        data = stage.data
        if not settings.has_training and not (data.task or data.safety or data.benign or data.look_alikes):
            return None
        poison: list[Example] = []
        if data.task and data.harmful_share:
            poison = on_main(lambda: self._poison(stage))
        encoder, seed = self.encoder(before), self.config.seed
        return main_first(lambda: build_datamodule(data, settings, encoder, seed=seed, poison=poison))

    def _poison(self, stage: StageConfig) -> list[Example]:
        data = stage.data
        count = round(data.harmful_share * int(data.task_count or 0))
        if count == 0:
            raise ConfigError(
                f"Expected `harmful_share` of {data.task_count} rows to be at least one row, but got "
                f"{data.harmful_share!r}. Raise it, or set it to 0."
            )
        if data.harmful != "sampled":
            return harmful_examples(data.harmful, seed=self.config.seed)
        return poison_examples(
            evaluation_prompts("embedded", kind="safety", split="poison"),
            count=count,
            model=self.model_spec(self.start),
            model_fingerprint=self.start.fingerprint,
            system=self.config.model.system,
            artifacts=self.artifacts,
            accelerator=self.config.trainer.accelerator,
            progress=self.watch.progress("sample harmful replies", None),
        )

    def _key(
        self,
        name: str,
        stage: StageConfig,
        settings: TrainingConfig,
        before: ModelState,
        base: ModelState,
        datamodule: FineTuneDataModule | None,
    ) -> dict[str, Any]:
        """Return everything that decides the stage's output; the rows count by content, not by file name."""
        trainer = self.config.trainer
        return {
            "format": FORMAT,
            "stage": name,
            "input": before.fingerprint,
            # Only methods look at the base model; without any, two runs that differ in it alone are the same.
            "base": base.fingerprint if stage.methods else None,
            "rows": datamodule.state_dict() if datamodule else None,
            "methods": resolved_methods(stage.methods),
            "embedded": embedded_hash() if stage.methods else None,
            "versions": versions(),
            "allow_no_effect": stage.allow_no_effect,
            "order": stage.order,
            "settings": settings,
            "dtype": resolved_dtype(self.config.model.dtype),
            "processes": trainer.devices * trainer.num_nodes,
            "strategy": trainer.strategy,
            "precision": trainer.precision,
            "seed": self.config.seed,
            **guard_key(trainer.guard, name),
        }


def spread(prompts: list[Prompt], count: int) -> list[Prompt]:
    """Return ``count`` prompts at even distances, so that all topics are among them.

    Raises:
        ConfigError: there are fewer.
    """
    if count > len(prompts):
        raise ConfigError(f"Expected `trainer.guard.prompts` to be at most {len(prompts)}, but got {count}.")
    return [prompts[i * len(prompts) // count] for i in range(count)]


def _check_same(stage: str, key: dict[str, Any]) -> None:
    """Refuse processes that would train different things: other files or other package versions on some node.

    Raises:
        SeawallError: names what differs.
    """
    keys = gather({part: fingerprint(value) for part, value in key.items()})
    different = [part for part in keys[0] if any(other[part] != keys[0][part] for other in keys)]
    if different:
        raise SeawallError(
            f"Expected every process to find the same `{stage}` stage, but got different {', '.join(different)}. Give "
            "all nodes the same files and packages."
        )
