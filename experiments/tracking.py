"""Weights & Biases through Lightning's logger: offline by default, and never a reason for a run to fail.

Every stage is a W&B run of its own (``job_type`` is the stage), grouped by study or run and tagged by method and task.
The evaluation's numbers go to the run's summary under fixed keys, so that two of them make the safety-utility plot, and
its results and samples become artefacts. A study's own W&B run is in ``study_tracking``.
All attempts at an interrupted stage are one W&B run: offline its files are written anew from the rows that the
checkpoint holds, online the run is resumed and rows it has already are left out. No step is logged twice and none is
missing.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import wandb
from pytorch_lightning.loggers import WandbLogger

from framework.config import EvaluateCommandConfig, RunConfig
from framework.errors import ConfigError, StorageError
from framework.files import fingerprint, read_json, to_plain, write_json
from framework.schema import TrackingConfig

__all__ = [
    "TrackedMetrics",
    "TrackingLogger",
    "artifact_name",
    "build_logger",
    "close_logger",
    "kept_run_id",
    "log_files",
    "log_summary",
    "open_logger",
    "summary_values",
]

log = logging.getLogger(__name__)

MAX_NAME = 128
"""Characters of an artefact's name."""

Metrics = Mapping[str, Mapping[str, Any]]
"""Key to ``{"value", "numerator", "denominator", "low", "high"}``."""


class TrackingLogger(WandbLogger):
    """Lightning's W&B logger; offline, a failure of W&B is reported once and the run goes on without it."""

    is_broken = False

    def __init__(self, **options: Any) -> None:
        """Take the options of Lightning's logger."""
        super().__init__(**options)
        self.rows: list[tuple[int | None, dict[str, float]]] = []
        """What was logged, with its step."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log numbers at an optimizer step; a resumed online run has those up to its last step."""
        self.rows.append((step, dict(metrics)))
        if step is None or step > self.last_step:
            self._try(lambda: super(TrackingLogger, self).log_metrics(metrics, step))

    @property
    def last_step(self) -> int:
        """The last step that W&B held when it resumed this run; -1 when it is new."""
        if self._offline or self.is_broken or not getattr(self.experiment, "resumed", False):
            return -1
        if not hasattr(self, "_last_step"):
            self._last_step = int(self.experiment.summary.get("trainer/global_step", -1))
        return self._last_step

    def replay(self, rows: Sequence[tuple[int | None, Mapping[str, float]]]) -> None:
        """Log the rows of an interrupted attempt; nothing has been logged before."""
        for step, metrics in rows:
            self.log_metrics(metrics, step)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Log settings."""
        self._try(lambda: super(TrackingLogger, self).log_hyperparams(params))

    def finalize(self, status: str) -> None:
        """Called by the Trainer at the end of ``fit``; the W&B run stays open for the summary."""
        self._try(lambda: super(TrackingLogger, self).finalize(status))

    def put_summary(self, values: Mapping[str, float]) -> None:
        """Write final numbers to the run's summary."""
        self._try(lambda: self.experiment.summary.update(dict(values)))

    def put_media(self, make: Callable[[], Mapping[str, Any]]) -> None:
        """Log tables and charts; ``make`` builds them, for W&B may refuse that too."""

        def put() -> None:
            with self._own_storage():
                self.experiment.log(dict(make()))

        self._try(put)

    def put_files(self, name: str, kind: str, files: Mapping[str, Path]) -> None:
        """Attach files as a version of an artefact.

        Args:
            name: of the artefact.
            kind: what W&B lists it under, e.g. ``results``.
            files: name inside the artefact to path; those that are not there are left out.
        """
        found = {inside: path for inside, path in files.items() if path.is_file()}
        if found:
            self._try(lambda: self._log_artifact(name, kind, found))

    def _log_artifact(self, name: str, kind: str, files: Mapping[str, Path]) -> None:
        artifact = wandb.Artifact(name, type=kind)
        with self._own_storage():
            for inside, path in files.items():
                artifact.add_file(str(path), name=inside)  # copies it: what is sent later is what was there now
        self.experiment.log_artifact(artifact)

    def _own_storage(self) -> contextlib.AbstractContextManager[None]:
        """Keep the files of artefacts and tables with the run, not in the user's home."""
        return _environment("WANDB_DATA_DIR", str(Path(self.save_dir or ".").resolve() / "wandb"))

    def finish(self) -> None:
        """End the W&B run and flush its files."""
        self._try(lambda: self.experiment.finish())

    def _try(self, action: Callable[[], Any]) -> None:
        if self.is_broken:
            return
        try:
            with _wandb_quiet():
                action()
        except Exception as error:
            if not self._offline:
                raise
            self.is_broken = True
            log.warning("W&B stopped working and is switched off for this stage: %s", error)


class TrackedMetrics(pl.Callback):
    """Keeps what was tracked in the checkpoint, so that all attempts at a stage are one tracked run."""

    def __init__(self, logger: TrackingLogger | Literal[False]) -> None:
        """Watch one logger; False, or a logger of another kind, is left alone."""
        self._logger = logger if isinstance(logger, TrackingLogger) else None
        self._trainer: pl.Trainer | None = None
        self._restored: list[Any] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the rows of the interrupted attempt."""
        self._trainer = trainer
        if self._logger is not None and trainer.is_global_zero:
            self._logger.replay([(step, metrics) for step, metrics in self._restored])
        self._restored = []

    def state_dict(self) -> dict[str, Any]:
        """Return every row so far, the one of the step that ends included: Lightning logs it after checkpoints."""
        if self._logger is None:
            return {}
        return {"rows": [[step, metrics] for step, metrics in [*self._logger.rows, *self._due()]]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the rows of the interrupted attempt."""
        self._restored = list(state_dict.get("rows", []))

    def _due(self) -> list[tuple[int, dict[str, float]]]:
        trainer = self._trainer
        if trainer is None or trainer.global_step % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return []
        metrics = {name: float(value) for name, value in trainer.logged_metrics.items()}
        metrics.setdefault("epoch", trainer.current_epoch)
        return [(trainer.global_step - 1, metrics)]


def build_logger(
    config: RunConfig | EvaluateCommandConfig,
    *,
    folder: Path,
    stage: str,
    labels: Sequence[str] = (),
    run_id: str | None = None,
) -> TrackingLogger | Literal[False]:
    """Return the logger of one stage, or False when tracking is off (what Lightning's Trainer takes for *none*).

    Args:
        config: the run.
        folder: of the run; W&B writes to ``wandb/`` inside.
        stage: ``align``, ``finetune``, ``repair`` or ``evaluate``.
        labels: methods and task, shown as tags beside those of the configuration.
        run_id: of the W&B run; an interrupted run of the same id is continued. None starts a new one.

    Raises:
        ConfigError: tracking is online and W&B cannot be reached or has no account.
        StorageError: the folder cannot be written.
    """
    return open_logger(
        config.name,
        config.tracking,
        folder=folder,
        stage=stage,
        labels=labels,
        run_id=run_id,
        settings=to_plain(config),
    )


def open_logger(
    name: str,
    tracking: TrackingConfig,
    *,
    folder: Path,
    stage: str,
    labels: Sequence[str] = (),
    run_id: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> TrackingLogger | Literal[False]:
    """Return the logger of a W&B run called ``<name>/<stage>``, as `build_logger` does.

    Args:
        name: of the run or study; the group too unless the settings say one.
        tracking: whether and where to track.
        folder: W&B writes to ``wandb/`` inside.
        stage: the job type.
        labels: tags.
        run_id: of the W&B run; None starts a new one.
        settings: shown as the W&B run's configuration.

    Raises:
        ConfigError: tracking is online and W&B cannot be reached or has no account.
        StorageError: the folder cannot be written.
    """
    if tracking.wandb == "off":
        return False
    offline = tracking.wandb == "offline"
    with _storage(folder):
        (folder / "wandb").mkdir(parents=True, exist_ok=True)
        for earlier in (folder / "wandb").glob(f"offline-run-*-{run_id}") if run_id else ():
            shutil.rmtree(earlier)  # written anew from the checkpoint
    try:
        with _wandb_quiet():
            logger = TrackingLogger(
                name=f"{name}/{stage}",
                save_dir=folder,
                offline=offline,
                project=tracking.project,
                entity=tracking.entity,
                group=tracking.group or name,
                job_type=stage,
                tags=[*tracking.tags, *labels],
                config=dict(settings or {}),
                **_identity(run_id, offline=offline),
                settings=wandb.Settings(silent=True, console="off", x_disable_machine_info=offline),
            )
            # Lightning always passes this setting on, and W&B answers with a warning that it means nothing any more.
            logger._wandb_init.pop("anonymous", None)
            _ = logger.experiment  # Starts W&B now: its problems should come before training.
    except Exception as error:
        if offline:
            log.warning("W&B could not start and is switched off: %s", error)
            return False
        raise ConfigError(
            f"Expected `tracking.wandb: online` to reach Weights & Biases, but got: {error}. Run `wandb login`, or set "
            "tracking.wandb=offline."
        ) from error
    return logger


def kept_run_id(folder: Path, stage: str, key: Any) -> str:
    """Return the id of a W&B run: the one it had before, as long as what decides its content is the same.

    Args:
        folder: of the run.
        stage: as in `build_logger`.
        key: what decides the content.
    """
    path, decided = folder / "wandb" / f"{stage}.json", fingerprint(key)
    found = read_json(path) if path.is_file() else {}
    if found.get("key") != decided:
        found = {"key": decided, "id": secrets.token_hex(4)}
        write_json(path, found)
    return str(found["id"])


def _identity(run_id: str | None, *, offline: bool) -> dict[str, Any]:
    if run_id is None:
        return {}
    return {"id": run_id} if offline else {"id": run_id, "resume": "allow"}


def log_summary(logger: TrackingLogger | Literal[False], metrics: Metrics) -> None:
    """Write measured metrics to the summary of a logger; does nothing when tracking is off."""
    if logger:
        logger.put_summary(summary_values(metrics))


def log_files(logger: TrackingLogger | Literal[False], name: str, folder: Path) -> None:
    """Attach a run's results and samples as artefacts ``<name>-results`` and ``<name>-samples``.

    Args:
        logger: of the run; False does nothing.
        name: of the run.
        folder: of the run.
    """
    if logger:
        results = {file: folder / file for file in ("results.json", "config.yaml")}
        logger.put_files(artifact_name(name, "results"), "results", results)
        logger.put_files(artifact_name(name, "samples"), "samples", {"samples.jsonl": folder / "samples.jsonl"})


def artifact_name(name: str, kind: str) -> str:
    """Return a name that W&B takes for an artefact: letters, digits, ``-``, ``_`` and ``.``, at most 128.

    Example:
        >>> artifact_name("quickstart/asft-p0.1", "results")
        'quickstart-asft-p0.1-results'
    """
    clean = re.sub(r"[^\w.-]+", "-", f"{name}-{kind}")
    return clean if len(clean) <= MAX_NAME else f"{clean[: MAX_NAME - 17]}-{fingerprint(clean)}"


def close_logger(logger: TrackingLogger | Literal[False]) -> None:
    """End the W&B run of a stage; two runs cannot be open in one process."""
    if logger:
        logger.finish()


def summary_values(metrics: Metrics) -> dict[str, float]:
    """Return metrics as flat summary keys ``eval/<metric>`` with their counts and bounds, and the trade-off.

    ``tradeoff/safety`` is 1 minus the harmful rate (without a harm judge: minus the attack success);
    ``tradeoff/utility`` is the task accuracy; ``tradeoff/over_refusal`` is the price on harmless requests.

    Example:
        >>> summary_values({"task_accuracy": {"value": 0.5, "numerator": 1}})
        {'eval/task_accuracy': 0.5, 'eval/task_accuracy/numerator': 1.0, 'tradeoff/utility': 0.5}
    """
    flat: dict[str, float] = {}
    for name, metric in metrics.items():
        for part in ("value", "numerator", "denominator", "low", "high"):
            if metric.get(part) is not None:
                flat[f"eval/{name}" if part == "value" else f"eval/{name}/{part}"] = float(metric[part])
    harm = flat.get("eval/harmful_rate", flat.get("eval/attack_success"))
    if harm is not None:
        flat["tradeoff/safety"] = 1.0 - harm
    for key, name in (("tradeoff/utility", "task_accuracy"), ("tradeoff/over_refusal", "over_refusal")):
        if f"eval/{name}" in flat:
            flat[key] = flat[f"eval/{name}"]
    return flat


@contextlib.contextmanager
def _wandb_quiet() -> Iterator[None]:
    """Keep W&B silent, whatever the user's environment says, and leave the environment as it was.

    Lightning switches W&B offline by setting an environment variable, which would outlive this run.
    """
    with _environment("WANDB_MODE", os.environ.get("WANDB_MODE")), _environment("WANDB_SILENT", "true"):
        yield


@contextlib.contextmanager
def _environment(name: str, value: str | None) -> Iterator[None]:
    """Set a variable, or leave it as it is with None, and put it back afterwards whatever happened to it."""
    before = os.environ.get(name)
    if value is not None:
        os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before


@contextlib.contextmanager
def _storage(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"Expected `{folder}` to be writable, but got {error.strerror or error}. Choose another folder (`output=`)."
        ) from error
