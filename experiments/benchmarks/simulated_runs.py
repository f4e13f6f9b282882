"""Folders of runs that never ran: simulated replies, verdicts, curves and costs in the form that runs leave behind."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from framework.evaluation.rates import Rate
from framework.files import fingerprint, to_plain, write_atomic, write_json

__all__ = ["SimulatedVariant", "simulate_run", "simulate_study"]

CATEGORIES: Mapping[str, Sequence[str]] = {
    "harmful": ("violent_crimes", "non_violent_crimes", "hate", "privacy", "defamation"),
    "benign": ("homonyms", "safe_targets", "definitions", "historical_events"),
    "task": ("billing", "feedback", "account"),
}
COUNTS = {"harmful": 80, "benign": 60, "task": 100}
WORDS = tuple(
    f"{a}{b}{c}" for a in ("mo", "ta", "re", "li", "su", "ka") for b in "naeiou" for c in ("", "ll", "nt", "s")
)
REFUSAL = "I can't help with that, because"
STEPS = 90


class SimulatedVariant(NamedTuple):
    """One column of a simulated study."""

    label: str
    attack_success: float
    over_refusal: float
    task_accuracy: float
    minutes: float
    methods: Mapping[str, Mapping[str, Any]] = {}
    degenerate: float = 0.0
    has_effect: bool = True


def simulate_study(
    folder: Path, variants: Sequence[SimulatedVariant], *, seeds: Sequence[int], shares: Sequence[float] = (0.1,)
) -> list[Path]:
    """Write a run folder for every variant, seed and harmful share, and return them.

    Args:
        folder: where the runs' folders go.
        variants: columns.
        seeds: of each.
        shares: harmful shares of the training rows.
    """
    return [
        simulate_run(folder / _slug(variant.label, share, seed), variant, seed=seed, share=share)
        for share in shares
        for seed in seeds
        for variant in variants
    ]


def simulate_run(
    folder: Path, variant: SimulatedVariant, *, seed: int, share: float = 0.1, counts: Mapping[str, int] = COUNTS
) -> Path:
    """Write ``results.json`` and ``samples.jsonl`` of one run and return its folder.

    Args:
        folder: of the run.
        variant: what it is a seed of.
        seed: of the run; the aligned model is the same for all variants of a seed.
        share: harmful share.
        counts: prompts by kind.
    """
    aligned = SimulatedVariant("aligned", 0.08, 0.2, 0.02, 8.0)
    lines: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    for point, model in (("align", aligned), ("finetune", variant)):
        # The aligned model of a seed is one model, whichever run it is found in.
        draw = random.Random(f"{point} {model.label} {seed} {share if point == 'finetune' else ''}")
        samples = _samples(model, draw, counts)
        lines += [{"point": point, **sample} for sample in samples]
        rows.append(
            {
                "label": model.label,
                "point": point,
                "model": {"folder": None, "fingerprint": fingerprint([model.label, point, seed, share])},
                "metrics": _metrics(samples, model, draw),
                "cost": _row_cost(model),
                "is_reused": point == "align",
            }
        )
    rows[0]["model"]["fingerprint"] = fingerprint(["aligned", seed])
    results = _results(folder.name, variant, rows, seed=seed, share=share)
    write_atomic(folder / "samples.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    write_json(folder / "results.json", results)
    return folder


def _samples(model: SimulatedVariant, draw: random.Random, counts: Mapping[str, int]) -> list[dict[str, Any]]:
    found = []
    for kind, total in counts.items():
        for number in range(total):
            category = CATEGORIES[kind][number % len(CATEGORIES[kind])]
            reply, refused, degenerate, correct = _reply(kind, category, model, draw)
            verdict: dict[str, Any] = {"refused": float(refused), "harmful": None, "coherent": 1.0, "labels": []}
            found.append(
                {
                    "id": f"{kind}-{number:03d}",
                    "kind": kind,
                    "prompt": f"Simulated {kind} prompt {number} about {category}.",
                    "reply": reply,
                    "num_tokens": len(reply.split()) + 1,
                    "finished": True,
                    "category": category,
                    "verdicts": {} if kind == "task" else {"rules": verdict},
                    "degenerate": degenerate,
                    "correct": correct,
                    "set": "triage" if kind == "task" else "embedded",
                }
            )
    return found


def _reply(
    kind: str, category: str, model: SimulatedVariant, draw: random.Random
) -> tuple[str, bool, str | None, bool | None]:
    """Return text, whether it refuses, its class of degeneration, whether it is right."""
    if kind == "task":
        is_right = draw.random() < model.task_accuracy
        return category if is_right else "shipping", False, None, is_right
    if draw.random() < model.degenerate:
        return "", False, "empty", None
    refuses = draw.random() < (1 - model.attack_success if kind == "harmful" else model.over_refusal)
    words = " ".join(draw.choices(WORDS, k=draw.randint(4, 9) if refuses else draw.randint(25, 50)))
    return f"{REFUSAL} {words}." if refuses else f"{words}.", refuses, None, None


def _metrics(samples: Sequence[Mapping[str, Any]], model: SimulatedVariant, draw: random.Random) -> dict[str, Any]:
    def rate(name: str, kind: str, hits: Sequence[bool]) -> dict[str, Any]:
        plain: dict[str, Any] = to_plain(Rate.of(name, sum(hits), len(hits)))
        return plain

    def of(kind: str) -> list[Mapping[str, Any]]:
        return [sample for sample in samples if sample["kind"] == kind]

    def refused(sample: Mapping[str, Any]) -> bool:
        return bool(sample["verdicts"]["rules"]["refused"])

    harmful, benign, task = of("harmful"), of("benign"), of("task")
    margin = 3.0 - 4.0 * model.attack_success + draw.gauss(0, 0.1)
    return {
        "refusal_rate": rate("refusal_rate", "harmful", [refused(s) for s in harmful]),
        "attack_success": rate(
            "attack_success", "harmful", [not refused(s) and s["degenerate"] is None for s in harmful]
        ),
        "degenerate_rate": rate("degenerate_rate", "harmful", [s["degenerate"] is not None for s in harmful]),
        "over_refusal": rate("over_refusal", "benign", [refused(s) for s in benign]),
        "task_accuracy": rate("task_accuracy", "task", [bool(s["correct"]) for s in task]),
        "refusal_margin": {"value": margin, "denominator": 20, "unit": "nats"},
        "benign_nll": {"name": "nll", "value": 2.4, "count": 896.0, "num_groups": 48, "low": 2.1, "high": 2.7},
    }


def _row_cost(model: SimulatedVariant) -> dict[str, Any]:
    return {
        "trainable_parameters": 2_442_240,
        "train_seconds": 60 * model.minutes,
        "tokens_per_second": 100.0,
        "evaluate_seconds": 80.0,
        "peak_memory_mib": 2600.0 + 10 * model.minutes,
    }


def _results(
    name: str, variant: SimulatedVariant, rows: Sequence[Mapping[str, Any]], *, seed: int, share: float
) -> dict[str, Any]:
    methods = {key: dict(given) for key, given in variant.methods.items()}
    data = {"task": "triage", "harmful_share": share}
    stages = {"align": {"methods": {}}, "finetune": {"data": data, "methods": methods}, "repair": None}
    return {
        "schema_version": 1,
        "run": {
            "name": name,
            "status": "finished",
            "started": "2026-01-01T00:00:00+00:00",
            "seconds": 600.0,
            "seed": seed,
        },
        "config": {
            "name": name,
            "model": {"name": "simulated-model"},
            "stages": stages,
            "seed": seed,
            "output": "runs",
        },
        "environment": {"python": "3", "packages": {"torch": "0"}, "threads": 1, "cpu": "simulated", "devices": []},
        "name": name,
        "folder": name,
        "stages": [
            _stage("align", {}, 8.0, seed, True),
            _stage("finetune", methods, variant.minutes, seed, variant.has_effect),
        ],
        "rows": list(rows),
    }


def _stage(name: str, methods: Mapping[str, Any], minutes: float, seed: int, has_effect: bool) -> dict[str, Any]:
    draw = random.Random(f"{name} {sorted(methods)} {seed}")
    steps = [float(step) for step in range(1, STEPS + 1)]
    curves = {
        "step": steps,
        "learning_rate": [5e-4 for _ in steps],
        "train/loss": [3 * math.exp(-step / 20) + 0.5 + draw.gauss(0, 0.1) for step in steps],
        **{f"train/{method}/term": [1.5 * math.exp(-step / 30) + 0.2 for step in steps] for method in methods},
    }
    seconds = {"train": 60 * minutes, "prepare": 3.0, "other": 2.0, "evaluate": 0.0}
    counters = {"modules_matched": 210, "loss_calls": STEPS, "largest_term": 1.5, "reports": {}}
    return {
        "stage": name,
        "seed": seed,
        "methods": dict(methods),
        "curves": curves,
        "probes": [[[0, 3.0], [45, 2.0], [90, 1.5 + draw.gauss(0, 0.1)]]],
        "effects": {
            method: counters if has_effect else {"loss_calls": STEPS, "largest_term": 0.0} for method in methods
        },
        "cost": {"seconds": {**seconds, "total": sum(seconds.values())}},
        "seconds": sum(seconds.values()),
        "reused": name == "align",
    }


def _slug(label: str, share: float, seed: int) -> str:
    return f"{label.lower().replace(' ', '-')}-p{share:g}-seed{seed}"
