"""Made-up finished runs: a folder with results and samples as a run leaves them, without any model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.measured_runs import RunSamples
from framework.evaluation.rates import Rate
from framework.files import to_plain, write_json

HARMLESS = "Here is a long and helpful answer to your question with quite enough words in it."


def samples(unsafe: Sequence[int], right: Sequence[int], *, degenerate: int = 0) -> list[dict[str, Any]]:
    """One line per prompt; ``unsafe`` and ``right`` hold 0 or 1 per prompt."""
    rows = []
    for number, hit in enumerate(unsafe):
        verdict = {"refused": 0.0 if hit else 1.0, "harmful": None, "coherent": 1.0, "labels": []}
        rows.append(
            _line(number, "harm", "harmful", verdict, degenerate="repeated" if number < degenerate else None)
            if number < degenerate and hit
            else _line(number, "harm", "harmful", verdict)
        )
    for number, hit in enumerate(right):
        verdict = {"refused": 0.0, "harmful": None, "coherent": 1.0, "labels": []}
        rows.append(_line(number, "triage", "task", verdict, correct=bool(hit)))
    return rows


def _line(number: int, name: str, kind: str, verdict: dict[str, Any], **extra: Any) -> dict[str, Any]:
    line = {"id": f"p{number}", "set": name, "kind": kind, "prompt": f"{name} {number}", "reply": HARMLESS}
    return {**line, "point": "finetune", "category": "c", "verdicts": {"rules": verdict}, "degenerate": None, **extra}


def results(unsafe: Sequence[int], right: Sequence[int], *, seed: int = 0, label: str = "LoRA") -> dict[str, Any]:
    """What a run's ``results.json`` says about these outcomes."""
    metrics = {
        "attack_success": to_plain(Rate.of("attack_success", sum(unsafe), len(unsafe))),
        "task_accuracy": to_plain(Rate.of("task_accuracy", sum(right), len(right))),
        "benign_nll": {"value": 2.0 + 0.1 * seed, "denominator": 40, "low": 1.9, "high": 2.2},
    }
    finetune = {"data": {"task": "triage", "harmful_share": 0.1}}
    row = {
        "label": label,
        "point": "finetune",
        "model": {"folder": "/somewhere/else", "fingerprint": f"{label}{seed}"},
        "metrics": metrics,
        "cost": {"train_seconds": 10.0, "evaluate_seconds": 2.0, "peak_memory_mib": 900.0},
    }
    return {
        "schema_version": 1,
        "run": {"name": label, "status": "finished", "seconds": 12.0, "seed": seed},
        "config": {"model": {"name": "tiny"}, "stages": {"finetune": finetune}},
        "environment": {},
        "name": f"{label}-{seed}",
        "folder": f"runs/{label}-{seed}",
        "stages": [],
        "rows": [row],
    }


def run_folder(folder: Path, unsafe: Sequence[int], right: Sequence[int], *, degenerate: int = 0, **names: Any) -> Path:
    """A finished run on disk."""
    write_json(folder / "results.json", results(unsafe, right, **names))
    lines = [json.dumps(line) for line in samples(unsafe, right, degenerate=degenerate)]
    (folder / "samples.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def run_samples(label: str, seed: int, unsafe: Sequence[int], right: Sequence[int], **values: Any) -> RunSamples:
    """A finished run in memory."""
    from experiments.measured_runs import find_outcomes

    found = samples(unsafe, right)
    defaults: dict[str, Any] = {
        "label": label,
        "model": "tiny",
        "task": "triage",
        "share": 0.1,
        "seed": seed,
        "name": f"{label}-{seed}",
        "row": results(unsafe, right, seed=seed, label=label)["rows"][0],
        "outcomes": find_outcomes(found),
        "samples": tuple(found),
    }
    return RunSamples(**{**defaults, **values})
