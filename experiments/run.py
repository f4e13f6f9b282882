"""``seawall run``: the stages of one config, the measurements, and what the run leaves behind."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from rich.console import Console
from rich.text import Text

from experiments.compliant_replies import Sampler
from experiments.console import row_cost
from experiments.measure import Subject, TaskChoice, check_evaluation
from experiments.prefill import Measured, measure_point
from experiments.progress import Steps, TrainingProgress, evaluation_bars
from experiments.run_folder import PICTURES, only_process, portable_path, take_folder
from experiments.stages import ModelState, StageChain, Watch
from experiments.tracking import TrackingLogger, build_logger, close_logger, kept_run_id, log_files, log_summary
from experiments.training_picture import has_telemetry, training_svg
from framework.config import EvaluateCommandConfig, RunConfig, StageConfig
from framework.files import ArtifactStore, cache_root, to_plain, write_atomic, write_json
from framework.model_files import model_fingerprint
from framework.moments import moment
from framework.processes import is_main, main_first, on_main, together, world_size

__all__ = [
    "RESULTS_FILE",
    "SCHEMA_VERSION",
    "artifact_store",
    "environment",
    "local_processes",
    "run_recipe",
    "set_threads",
]

SCHEMA_VERSION = 1
RESULTS_FILE = "results.json"
PACKAGES = ("torch", "pytorch-lightning", "transformers", "peft", "torchmetrics", "omegaconf", "safetensors", "wandb")


def run_recipe(
    config: RunConfig,
    *,
    console: Console | None = None,
    label: str | None = None,
    watchers: Callable[[str], tuple[pl.Callback, ...]] = lambda stage: (),
    waits: bool = False,
) -> dict[str, Any]:
    """Run a config and return the content of its ``results.json``.

    Args:
        config: the run.
        console: where progress is drawn; None draws nothing.
        label: what the last model is called in tables; None takes the methods' names.
        watchers: further watching callbacks of a stage, by its name.
        waits: for another command that works on this run; what that one did is then found again.

    With several processes each of them calls this, and the first one writes and shows progress.

    Returns:
        Schema-versioned results; written to ``<output>/<name>/results.json`` with config, samples and model beside it.

    Raises:
        HeldError: another command works on this run, and ``waits`` is False.
    """
    return together(lambda: _run(config, console, label, watchers, waits))


def _run(
    config: RunConfig,
    console: Console | None,
    label: str | None,
    watchers: Callable[[str], tuple[pl.Callback, ...]],
    waits: bool,
) -> dict[str, Any]:
    started = time.time()
    set_threads(config.trainer.threads, processes=local_processes(config))
    folder = Path(config.output) / config.name
    main_first(lambda: check_evaluation(config.evaluate, _task(config)))
    artifacts = artifact_store()
    with _held(folder, console, waits=waits):
        with Steps((console or Console(stderr=True)) if is_main() else None) as steps:
            chain = StageChain(config, artifacts, _watch(config, steps, folder, watchers))
            on_main(lambda: take_folder(folder, config, steps.say))
            states = chain.run()
            measured = _measure_points(config, chain, states, steps)

        def finish() -> dict[str, Any]:
            results = _results(config, states, measured, started, label)
            _draw(folder, states)
            _leave_behind(folder, results, states[-1], measured)
            _track(config, results, folder)
            return results

        return on_main(finish)


@contextlib.contextmanager
def _held(folder: Path, console: Console | None, *, waits: bool) -> Iterator[None]:
    """Hold the run's folder on the first process, for as long as anything is written there."""

    def say(text: str) -> None:
        if console is not None:
            console.print(Text(text), soft_wrap=True)

    with contextlib.ExitStack() as stack:
        on_main(lambda: stack.enter_context(only_process(folder, "run", wait=say if waits else None)))
        yield


def artifact_store() -> ArtifactStore:
    """Return the store of stage outputs and measurements in the cache."""
    return ArtifactStore(cache_root() / "artifacts")


def local_processes(config: RunConfig | EvaluateCommandConfig) -> int:
    """Return how many processes of this command share the machine."""
    return config.trainer.devices if world_size() > 1 else 1


def set_threads(threads: int | None, *, processes: int = 1) -> None:
    """Let torch use ``threads`` CPU threads; None takes this process's part of the cores it may use.

    Args:
        threads: of one process.
        processes: that share the cores.
    """
    allowed = getattr(os, "sched_getaffinity", None)  # not on macOS
    cores = len(allowed(0)) if allowed else os.cpu_count() or 1
    torch.set_num_threads(threads or max(1, cores // processes))


def environment() -> dict[str, Any]:
    """Return versions, platform and devices, for the results."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "threads": torch.get_num_threads(),
        "cpu": _cpu_name(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # no such file outside Linux
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} x {len(names)}" if names else platform.processor()


def _watch(config: RunConfig, steps: Steps, folder: Path, watchers: Callable[[str], tuple[pl.Callback, ...]]) -> Watch:
    return Watch(
        progress=steps.task,
        callbacks=lambda name: (TrainingProgress(steps, f"train {name}"), *watchers(name)),
        open_logger=lambda name, stage, run_id: _open_logger(config, folder, name, _tags(stage), run_id),
        close_logger=close_logger,
        say=steps.say,
    )


def _open_logger(
    config: RunConfig, folder: Path, stage: str, labels: list[str], run_id: str
) -> TrackingLogger | Literal[False]:
    """Return the logger on the first process; the others have none, but fail with it."""
    opened: list[TrackingLogger | Literal[False]] = []
    on_main(lambda: opened.append(build_logger(config, folder=folder, stage=stage, labels=labels, run_id=run_id)))
    return opened[0] if opened else False


def _measure_points(
    config: RunConfig, chain: StageChain, states: Sequence[ModelState], steps: Steps
) -> dict[str, Measured]:
    start = Sampler(chain.model_spec(chain.start), chain.start.fingerprint)
    return {
        state.point: measure_point(
            Subject(chain.model_spec(state), state.fingerprint, config.model.system, config.trainer.accelerator),
            config.evaluate,
            task=_task(config),
            start=start,
            artifacts=chain.artifacts,
            bars=evaluation_bars(steps, f"evaluate {state.point}"),
        )
        for state in states
        if state.point in config.evaluation_points()
    }


def _task(config: RunConfig) -> TaskChoice | None:
    found = config.task()
    return TaskChoice(found[0], found[1].task_path) if found else None


def _results(
    config: RunConfig,
    states: Sequence[ModelState],
    measured: dict[str, Measured],
    started: float,
    label: str | None,
) -> dict[str, Any]:
    rows = []
    for state in states:
        if state.point in measured:
            found = measured[state.point]
            rows.append(
                {
                    "label": _label(config, state, label if state is states[-1] else None),
                    "point": state.point,
                    "model": {
                        "folder": portable_path(state.folder),
                        "fingerprint": state.fingerprint,
                        "weights": model_fingerprint(state.folder),
                    },
                    "metrics": found.metrics,
                    "cost": row_cost(state.record.get("cost"), found.plain.cost),
                    "is_reused": all(part.is_reused for part in found.parts),
                }
            )
    return {
        "schema_version": SCHEMA_VERSION,
        "run": {
            "name": config.name,
            "status": "finished",
            "started": moment(started),
            "seconds": time.time() - started,
            "seed": config.seed,
        },
        "config": to_plain(config),
        "environment": environment(),
        "name": config.name,
        "folder": str(Path(config.output) / config.name),
        "stages": _with_setup(_stage_records(states, measured), time.time() - started),
        "rows": rows,
    }


def _with_setup(records: list[dict[str, Any]], seconds: float) -> list[dict[str, Any]]:
    """Return the records with the rest of the wall time: fetching, converting and loading models, harmful replies."""
    spent = sum(r["seconds"] - r["cost"].get("earlier_seconds", 0.0) for r in records if not r["reused"])
    rest = seconds - spent
    return [{"stage": "set-up and loading", "seconds": max(0.0, rest), "reused": False}, *records]


def _label(config: RunConfig, state: ModelState, given: str | None) -> str:
    if given is not None:
        return given
    if state.point == "start":
        return config.model.name
    stage = dict(config.active_stages())[state.point]
    default = {"align": "aligned", "finetune": "plain fine-tuning", "repair": "repaired"}[state.point]
    return " + ".join(stage.methods) or default


def _stage_records(states: Sequence[ModelState], measured: dict[str, Measured]) -> list[dict[str, Any]]:
    """Return what was done, in order: training stages with curves and cost, measurements with cost."""
    records: list[dict[str, Any]] = []
    for state in states:
        if state.point != "start":
            seconds = state.record["cost"]["seconds"]["total"]
            records.append(
                {**state.record, "seconds": seconds, "reused": state.is_reused, "fingerprint": state.fingerprint}
            )
        for part in measured[state.point].parts if state.point in measured else []:
            name, seconds = f"{part.cost['stage']} {state.point}", part.cost["seconds"]["total"]
            records.append({"stage": name, "seconds": seconds, "reused": part.is_reused, "cost": part.cost})
    return records


def _leave_behind(folder: Path, results: dict[str, Any], last: ModelState, measured: dict[str, Measured]) -> None:
    lines = []
    for point, found in measured.items():
        for line in found.sample_lines():
            lines.append(json.dumps({"point": point, **json.loads(line)}, ensure_ascii=False))
    write_atomic(folder / "samples.jsonl", "\n".join(lines) + "\n")
    _link_model(last.folder, folder / "model")
    adapter = last.folder.parent / "adapter"
    if last.point != "start" and adapter.is_dir():
        _link_model(adapter, folder / "adapter")
    shutil.rmtree(folder / "patches", ignore_errors=True)
    for patch in [] if last.point == "start" else sorted(last.folder.parent.glob("*.safetensors")):
        (folder / "patches").mkdir(exist_ok=True)
        shutil.copy2(patch, folder / "patches" / patch.name)
    write_json(folder / RESULTS_FILE, results)  # last: a run with results is complete


def _draw(folder: Path, states: Sequence[ModelState]) -> None:
    """Draw what a probe or a method saw in training, one picture a stage; a stage without either has none."""
    for name, file in PICTURES.items():
        (folder / file).unlink(missing_ok=True)
        for state in states:
            if state.point == name and has_telemetry(state.record):
                write_atomic(folder / file, training_svg(state.record))


def _link_model(source: Path, target: Path) -> None:
    """Put the files of ``source`` into ``target`` by hard links, or copies where links do not work."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for path in source.iterdir():
        try:
            if path.suffix != ".safetensors":  # small, and people edit them: the cache must not change with them
                raise OSError
            os.link(path, target / path.name)
        except OSError:
            shutil.copy2(path, target / path.name)


def _tags(stage: StageConfig) -> list[str]:
    """Return what a stage is found by in W&B: its methods and its task."""
    return [*stage.methods, *([stage.data.task] if stage.data.task else [])]


def _track(config: RunConfig, results: dict[str, Any], folder: Path) -> None:
    if not results["rows"]:
        return
    labels = [label for _, stage in config.active_stages() for label in _tags(stage)]
    key = [[row["model"]["fingerprint"], row["metrics"]] for row in results["rows"]]
    run_id = None if config.tracking.wandb == "off" else kept_run_id(folder, "evaluate", key)
    logger = build_logger(config, folder=folder, stage="evaluate", labels=labels, run_id=run_id)
    log_summary(logger, results["rows"][-1]["metrics"])
    log_files(logger, config.name, folder)
    close_logger(logger)
