"""``seawall evaluate``: measure a finished model without training it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments.console import row_cost
from experiments.endpoint_measure import measure_endpoint
from experiments.launch import check_connected
from experiments.measure import Subject, TaskChoice
from experiments.prefill import Measured, measure_point
from experiments.progress import Steps, evaluation_bars
from experiments.run import (
    RESULTS_FILE,
    SCHEMA_VERSION,
    artifact_store,
    environment,
    local_processes,
    set_threads,
)
from experiments.tracking import build_logger, close_logger, log_summary
from framework.config import EvaluateCommandConfig, to_yaml
from framework.endpoint_settings import is_endpoint
from framework.files import to_plain, write_atomic, write_json
from framework.models import ModelSpec, find_model, model_fingerprint
from framework.moments import moment
from framework.processes import is_main, on_main, together

__all__ = ["evaluate_command"]


def evaluate_command(model: str, config: EvaluateCommandConfig, *, console: Console | None = None) -> dict[str, Any]:
    """Measure one model and return the content of its ``results.json``.

    With several processes each of them calls this, and the first one writes and shows progress.

    Args:
        model: name or path, as given on the command line; the row's label.
        config: model, sets and judges.
        console: where progress is drawn; None draws nothing.
    """
    return together(lambda: _evaluate(model, config, console))


def _evaluate(model: str, config: EvaluateCommandConfig, console: Console | None) -> dict[str, Any]:
    started = time.time()
    check_connected(config.trainer)
    set_threads(config.trainer.threads, processes=local_processes(config))
    task = TaskChoice(config.task, config.task_path) if config.task else None
    facts: dict[str, Any] = {}
    with Steps((console or Console(stderr=True)) if is_main() else None) as steps:
        bars = evaluation_bars(steps, "evaluate")
        if is_endpoint(config.model.name):
            artifacts = artifact_store()
            measured, known = measure_endpoint(config, task=task, artifacts=artifacts, bars=bars, say=steps.say)
            facts = {"endpoint": to_plain(known)}
        else:
            measured = measure_point(
                _subject(config, steps), config.evaluate, task=task, start=None, artifacts=artifact_store(), bars=bars
            )
    return on_main(lambda: _leave_behind(model, config, measured, started, facts))


def _subject(config: EvaluateCommandConfig, steps: Steps) -> Subject:
    """Return the model, found and fetched."""
    given, bar = config.model, steps.task("model", 100)
    spec = ModelSpec(given.name, given.dtype, given.revision, given.trust_remote_code)
    folder = on_main(lambda: find_model(spec, progress=lambda _, share: bar(round(100 * share), 100)).folder)
    found = ModelSpec(str(folder), given.dtype, None, given.trust_remote_code)
    decided = on_main(lambda: model_fingerprint(folder))
    return Subject(found, decided, given.system, config.trainer.accelerator)


def _leave_behind(
    model: str, config: EvaluateCommandConfig, measured: Measured, started: float, facts: dict[str, Any]
) -> dict[str, Any]:
    row: dict[str, Any] = {"label": model, "point": "start", "metrics": measured.metrics}
    row["cost"] = row_cost(None, measured.plain.cost)
    results = {
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
        "stages": [],
        "rows": [row],
        **facts,
    }
    folder = Path(config.output) / config.name
    write_atomic(folder / "config.yaml", to_yaml(config))
    write_json(folder / RESULTS_FILE, results)
    write_atomic(folder / "samples.jsonl", "\n".join(measured.sample_lines()) + "\n")
    logger = build_logger(config, folder=folder, stage="evaluate", labels=[config.task] if config.task else [])
    log_summary(logger, measured.metrics)
    close_logger(logger)
    return results
