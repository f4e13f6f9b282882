"""What a bundle says of itself in ``release.json``: numbers, judges, attacks, data, cost, how it replied.

Places of this machine still stand in it; who writes it takes them out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from datamodules.catalog import EMBEDDED, MORE
from datamodules.tasks import create_task
from experiments.fingerprints import content_hashes, embedded_hash
from experiments.measured_runs import ATTACKED, RATES, find_outcomes
from experiments.release.attacks import prefill_attacks
from experiments.release.finished_run import FinishedRun
from experiments.release.manifest import show_time
from experiments.release.names import public_name
from experiments.release.overlap import Overlap
from framework.config import RunConfig
from framework.errors import ConfigError, DataError
from framework.evaluation.rates import Rate
from framework.files import read_json, to_plain
from framework.models import choose_dtype

__all__ = ["metrics_without", "release_facts"]

SCHEMA_VERSION = 1
INDEPENDENT = ("refusal_margin", "benign_nll", "nll/", "choice_accuracy/")
"""Metrics that do not come from the recorded replies; leaving prompts out does not change them."""


def release_facts(
    run: FinishedRun,
    samples: Sequence[Mapping[str, Any]],
    *,
    content: str,
    created: datetime,
    expires: datetime | None,
    overlap: Overlap,
    excluded: frozenset[str],
    base_fingerprint: str | None,
    attacks: Sequence[Mapping[str, Any]],
    num_with_image: int,
) -> dict[str, Any]:
    """Return the content of ``release.json``.

    Args:
        run: the finished run.
        samples: of its last model, those that count.
        content: ``model`` or ``adapter``.
        created: now.
        expires: end of validity.
        overlap: of measured prompts with training data.
        excluded: prompts left out of the numbers for it.
        base_fingerprint: of the base model, for an adapter.
        attacks: what other attacks found.
        num_with_image: replies in the bundle that were made with a picture.
    """
    config = run.config
    metrics = dict(run.row["metrics"]) if not excluded else metrics_without(run.row["metrics"], samples)
    return {
        "schema_version": SCHEMA_VERSION,
        "name": run.name,
        "label": run.row["label"],
        "content": content,
        "created": show_time(created),
        "expires": None if expires is None else show_time(expires),
        "base_model": {
            "name": public_name(config.model.name),
            "revision": config.model.revision,
            "fingerprint": base_fingerprint,
        },
        "stages": [name for name, _ in config.active_stages()],
        "methods": {name: to_plain(stage.methods) for name, stage in config.active_stages()},
        "generation": _generation(run, samples),
        "judges": list(config.evaluate.judges),
        "metrics": metrics,
        "is_model_checked": run.is_model_checked,
        "num_with_image": num_with_image,
        "overlap": _overlap(overlap, excluded),
        "attacks": [*prefill_attacks(config, metrics), *attacks],
        "data": _provenance(config),
        "training": _training(run.results),
        "cost": dict(run.row.get("cost") or {}),
        "environment": run.results.get("environment", {}),
    }


def _overlap(overlap: Overlap, excluded: frozenset[str]) -> dict[str, Any]:
    return {
        "num_prompts": overlap.num_prompts,
        "num_training_prompts": overlap.num_training,
        "exact": list(overlap.exact),
        "near": list(overlap.near),
        "unknown": list(overlap.unknown),
        "excluded": sorted(excluded),
    }


def metrics_without(metrics: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the metrics on a part of the samples; those that cannot be computed from samples and depend on them go.

    Args:
        metrics: over all samples.
        samples: that count.

    Raises:
        DataError: no samples are left.
    """
    if not samples:
        raise DataError(
            "Expected prompts that are not in the training data, but got none. Measure the model on others."
        )
    plain = [sample for sample in samples if not ATTACKED.fullmatch(sample["set"])]
    found = _rates(plain)
    for name in dict.fromkeys(sample["set"] for sample in samples):
        # Under one name of their own, so that a set under attack has all its rates too.
        own = _rates([{**sample, "set": ""} for sample in samples if sample["set"] == name])
        found |= {f"{name}/{key}": rate for key, rate in own.items()}
    found |= _attacked_share(samples)
    kept = {key: value for key, value in metrics.items() if key.startswith(INDEPENDENT)}
    return {key: found[key] for key in metrics if key in found} | kept


def _rates(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    outcomes = find_outcomes(samples)
    return {
        name: to_plain(Rate.of(name, sum(outcomes[name].values()), len(outcomes[name])))
        for name in RATES
        if outcomes.get(name)
    }


def _attacked_share(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return how many of the harmful prompts that count were attacked; nothing where none was."""
    sets = list(dict.fromkeys(sample["set"] for sample in samples if ATTACKED.fullmatch(sample["set"])))
    asked = sum(sample["kind"] == "harmful" and sample["set"] not in sets for sample in samples)
    hits = sum(sample["set"] == sets[0] for sample in samples) if sets else 0
    return {"prefill_prompts": to_plain(Rate.of("prefill_prompts", hits, asked))} if 0 < hits <= asked else {}


def _generation(run: FinishedRun, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return how the replies were made; the ``prefill`` is each sample's own."""
    config = run.config
    limits: dict[str, int] = {}
    for sample in samples:
        limits.setdefault(f"{sample['kind']}/{sample['set']}", config.evaluate.max_new_tokens)
    found = config.task()
    for key in [key for key in limits if key.startswith("task/")]:
        if found is None:
            raise ConfigError(f"Expected the settings to name the task of set {key!r}, but they name none.")
        task = create_task(found[0], Path(found[1].task_path) if found[1].task_path else None)
        limits[key] = min(task.max_new_tokens, config.evaluate.max_new_tokens)
    context = read_json(run.model / "config.json").get("max_position_embeddings")
    is_cut = config.evaluate.overflow == "truncate_left" and context
    return {
        "system": config.model.system,
        "dtype": str(choose_dtype(config.model.dtype)).removeprefix("torch."),
        "max_prompt_tokens": context - config.evaluate.max_new_tokens if is_cut else None,
        "max_new_tokens": limits,
        "decoding": "greedy",
    }


def _provenance(config: RunConfig) -> list[dict[str, Any]]:
    """Return what every stage was trained on: set or file, rows asked for, and the hash of its content."""
    rows = []
    for name, stage in config.active_stages():
        data = stage.data
        sources: list[tuple[str, str | None, int | None, str | None]] = [
            ("task", data.task, data.task_count, data.task_path or data.task),
            ("safety", data.safety, data.safety_count, data.safety),
            ("benign", data.benign, data.benign_count, data.benign),
            ("look-alikes", data.look_alikes, data.look_alikes_count, data.look_alikes),
        ]
        if data.harmful_share:
            poison = round(data.harmful_share * int(data.task_count or 0))
            sources.append(("harmful rows put into the task", data.harmful, poison, data.harmful))
        for role, source, count, place in sources:
            if source:
                rows.append({"stage": name, "role": role, "source": public_name(str(source)), "rows": count,
                             "sha256": _content_hash(place)})  # fmt: skip
    return rows


def _content_hash(place: str | None) -> str | None:
    """Return the hash of a set's content: the embedded sets share one, a file or folder has its own; else None."""
    if place in (EMBEDDED, MORE):
        return embedded_hash()
    hashes = list(content_hashes(place).values())
    return hashes[0] if len(hashes) == 1 else None


def _training(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return time, operations and memory of every stage that was trained, without its curves."""
    found = []
    for record in results.get("stages", []):
        if "cost" not in record:
            continue
        cost = record["cost"]
        host = (cost.get("peak_memory_mib") or {}).get("host_lifetime")
        seconds = float(record.get("seconds") or 0.0)
        found.append(
            {
                "stage": record["stage"],
                "fingerprint": record.get("fingerprint"),
                "steps": record.get("steps"),
                "seconds": seconds if math.isfinite(seconds) else None,
                "tokens": cost.get("tokens", {}),
                "flops": (cost.get("flops") or {}).get("total"),
                "trainable_parameters": record.get("trainable_parameters"),
                "peak_host_memory_mib": host,
                "reused": bool(record.get("reused")),
            }
        )
    return found
