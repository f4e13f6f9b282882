"""How long a study will take and how much memory it needs, before anything is run.

Where runs of the same model have ended, here or in the same results folder, their seconds per training row and per
prompt are taken over; otherwise the estimate goes by the model's parameters and a short multiplication on this machine,
and says that it is rough. A stage that several runs share is counted once.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments.console import MISSING, format_seconds
from framework.files import fingerprint, read_json, to_plain
from framework.schema import RunConfig
from framework.study import StudyCell

__all__ = [
    "CellEstimate",
    "Rates",
    "estimate_cells",
    "measured_rates",
    "print_plan",
    "rough_rates",
    "study_history",
    "training_keys",
]

PROMPTS_UNKNOWN = 200
"""Prompts of an evaluation whose sets are not limited."""
ROW_TOKENS = 0.25
"""Share of ``max_length`` a row is taken to fill."""
REPLY_SECONDS_PER_PARAMETER = 2.0
TRAIN_FLOPS = 8.0
"""Per parameter and token: forward 2, backward 4, and what else a step does."""
PROCESS_MIB = 700.0


class Rates(NamedTuple):
    """How fast runs of a model are."""

    seconds_per_row: float
    """Of training."""
    seconds_per_prompt: float
    memory_mib: float
    is_measured: bool


class CellEstimate(NamedTuple):
    """What one run will take; None where nothing is known."""

    name: str
    seconds: float | None
    memory_mib: float | None
    is_measured: bool
    is_finished: bool = False


def estimate_cells(
    cells: Sequence[StudyCell], rates: Mapping[str, Rates], *, finished: Iterable[str] = ()
) -> list[CellEstimate]:
    """Return what every run will take, in their order; stages shared with an earlier one cost nothing.

    Args:
        cells: the runs.
        rates: model to its rates.
        finished: names of the runs that are there.
    """
    done, seen, found = set(finished), set[str](), []
    for cell in cells:
        seconds = 0.0
        known = rates.get(cell.model)
        for step in _work(cell.config):
            if step.key not in seen and known is not None and cell.name not in done:
                seconds += step.rows * known.seconds_per_row + step.prompts * known.seconds_per_prompt
            seen.add(step.key)
        if cell.name in done:
            found.append(CellEstimate(cell.name, 0.0, None, True, is_finished=True))
        elif known is None:
            found.append(CellEstimate(cell.name, None, None, False))
        else:
            found.append(CellEstimate(cell.name, seconds, known.memory_mib, known.is_measured))
    return found


def study_history(folders: Iterable[Path]) -> list[dict[str, Any]]:
    """Return the results kept below folders of studies; what cannot be read has no say here."""
    found = []
    for path in (path for folder in folders for path in sorted(folder.glob("*/*.json"))):
        try:
            record = read_json(path)
        except (OSError, ValueError):
            continue
        if isinstance(record, dict) and isinstance(record.get("results"), dict) and "stages" in record["results"]:
            found.append(record["results"])
    return found


def measured_rates(history: Iterable[Mapping[str, Any]]) -> dict[str, Rates]:
    """Return model to the rates that its earlier runs show.

    Args:
        history: contents of ``results.json``.
    """
    sums: dict[str, list[float]] = {}
    for results in history:
        config = results.get("config", {})
        model = (config.get("model") or {}).get("name")
        if model is None:
            continue
        total = sums.setdefault(str(model), [0.0] * 5)
        for stage in results["stages"]:
            if stage.get("reused"):
                continue
            if stage.get("steps"):
                own = (config.get("stages") or {}).get(stage["stage"]) or {}
                total[0] += float(stage["seconds"])
                total[1] += stage["steps"] * (own.get("batch_size") or config["batch_size"])
            elif str(stage["stage"]).startswith("evaluate "):
                total[2] += float(stage["seconds"])
                total[3] += _num_prompts(results, str(stage["stage"]).removeprefix("evaluate "))
        peaks = [(row.get("cost") or {}).get("peak_memory_mib") or 0.0 for row in results.get("rows", [])]
        total[4] = max([total[4], *peaks])
    return {
        model: Rates(train / rows, evaluate / prompts if prompts else 0.0, memory, True)
        for model, (train, rows, evaluate, prompts, memory) in sums.items()
        if rows
    }


def rough_rates(config: RunConfig, *, parameters: int, flops: float) -> Rates:
    """Return rates from the size of a model and the speed of a machine.

    Args:
        config: a run of the model.
        parameters: numbers in the model.
        flops: operations a second.
    """
    tokens = ROW_TOKENS * config.max_length
    row = TRAIN_FLOPS * parameters * tokens / flops
    prompt = REPLY_SECONDS_PER_PARAMETER * parameters * (tokens + 4 * config.evaluate.max_new_tokens) / flops
    size = {"bfloat16": 2, "float16": 2}.get(config.model.dtype, 4)
    optimizer = 12 if config.adapter.kind == "full" else 0
    # Stages hand models on in float32, so one such copy is in memory beside the one that is trained.
    return Rates(row, prompt, parameters * (size + 4 + optimizer) / 2**20 + PROCESS_MIB, False)


def machine_flops(*, size: int = 512, repeats: int = 20) -> float:
    """Return how many operations a second a float32 product of square matrices reaches here.

    The fastest of ``repeats`` products counts: what else runs on the machine makes single ones many times slower.
    """
    left = torch.ones(size, size)
    fastest = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        _ = left @ left
        fastest = min(fastest, time.perf_counter() - started)
    return 2 * size**3 / max(1e-9, fastest)


def count_on_disk(name: str) -> int | None:
    """Return the parameters of a model that lies on this machine, from its files' headers; None if it does not."""
    from safetensors import safe_open

    from framework.default_model import DEFAULT_MODEL
    from framework.files import cache_root

    folder = Path(name)
    if name == DEFAULT_MODEL:
        found = next(iter(sorted(cache_root().glob(f"models/*{DEFAULT_MODEL}*"))), None)
        if found is None:
            return 134_515_008  # as its card says
        folder = found
    total = 0
    for path in sorted(folder.rglob("*.safetensors")) if folder.is_dir() else []:
        with safe_open(path, framework="pt") as tensors:
            total += sum(_size(tensors.get_slice(key).get_shape()) for key in tensors.keys())  # noqa: SIM118
    return total or None


def print_plan(estimates: Sequence[CellEstimate], console: Console, *, workers: int = 1) -> None:
    """Print the runs with time and memory, and the whole."""
    table = Table(box=box.SIMPLE_HEAD, title="What would be run", title_justify="left")
    for column in ("run", "time", "memory", "estimate"):
        table.add_column(column, justify="right" if column in ("time", "memory") else "left")
    for one in estimates:
        basis = "finished" if one.is_finished else "from earlier runs" if one.is_measured else "rough"
        memory = MISSING if one.memory_mib is None else f"{one.memory_mib / 1024:.1f} GiB"
        known = one.seconds is not None
        table.add_row(
            Text(one.name),
            MISSING if one.is_finished else format_seconds(one.seconds),
            memory,
            basis if known else "unknown: the model is not on this machine",
        )
    console.print(table)
    seconds = [one.seconds for one in estimates if one.seconds is not None]
    left = [one for one in estimates if not one.is_finished]
    needed = max((one.memory_mib or 0.0 for one in left), default=0.0) * min(workers, max(1, len(left)))
    unknown = sum(one.seconds is None for one in estimates)
    parts = [f"{len(left)} of {len(estimates)} runs to do", f"about {format_seconds(sum(seconds) / workers)}"]
    parts += [f"{needed / 1024:.1f} GiB of memory"] if needed else []
    parts += [f"{unknown} runs unknown"] if unknown else []
    console.print(Text(", ".join(parts)), soft_wrap=True)


def training_keys(config: RunConfig) -> frozenset[str]:
    """Return a key for every stage a run trains, with all that led to it; runs that share a stage share its key."""
    return frozenset(step.key for step in _work(config) if step.is_training)


class _Step(NamedTuple):
    key: str
    rows: float
    """Trained on."""
    prompts: float
    """Measured with."""
    is_training: bool


def _work(config: RunConfig) -> list[_Step]:
    """Return every step of a run; equal keys are one and the same step."""
    chain: list[Any] = [to_plain(config.model)]
    prompts = _config_prompts(config)
    steps = []
    if "start" in config.evaluation_points():
        steps.append(_Step(fingerprint(["evaluate", *chain]), 0.0, prompts, False))
    for name, stage in config.active_stages():
        settings = config.training(name)
        chain += [name, to_plain(stage), to_plain(settings), config.seed]
        rows = settings.max_steps * settings.batch_size if settings.max_steps is not None else 0
        if settings.max_epochs is not None:
            data = stage.data
            counts = (data.task_count, data.safety_count, data.benign_count, data.look_alikes_count)
            rows = settings.max_epochs * sum(count or 0 for count in counts)
        steps.append(_Step(fingerprint(["train", *chain]), float(rows), 0.0, True))
        if name in config.evaluation_points():
            steps.append(_Step(fingerprint(["evaluate", *chain]), 0.0, prompts, False))
    return steps


def _config_prompts(config: RunConfig) -> float:
    evaluate, task = config.evaluate, config.task()
    sets = len(evaluate.safety) + len(evaluate.over_refusal)
    total = sets * min(evaluate.limit or PROMPTS_UNKNOWN, PROMPTS_UNKNOWN)
    if evaluate.task and task is not None:
        total += evaluate.task_count or evaluate.limit or PROMPTS_UNKNOWN
    return float(total)


def _num_prompts(results: Mapping[str, Any], point: str) -> float:
    row = next((row for row in results.get("rows", []) if row["point"] == point), None)
    metrics = row["metrics"] if row else {}
    return float(
        sum((metrics.get(key) or {}).get("denominator", 0) for key in ("refusal_rate", "over_refusal", "task_accuracy"))
    )


def _size(shape: Sequence[int]) -> int:
    return int(torch.Size(shape).numel())
