"""Outcomes of attacks that nobody made, and the files they would leave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.attacks.interface import AttackOutcome, AttackPoint, Attempt
from experiments.attacks.transcript import Transcript
from framework.evaluation.rates import Rate
from framework.files import to_plain, write_json

MEASURED_WITH = {"requests": "0123", "judges": [{"name": "rules"}], "max_new_tokens": 40, "system": None}


def point(
    broken: Sequence[int] | Mapping[str, bool],
    *,
    total: int = 10,
    spent: int = 0,
    utility: float | None = 1.0,
    **setting: Any,
) -> AttackPoint:
    """Return a point at which the requests of these numbers are broken."""
    found = dict(broken) if isinstance(broken, Mapping) else {f"r{n}": n in broken for n in range(total)}
    rate = Rate.of("attack_success", sum(found.values()), len(found))
    metrics: dict[str, Any] = {"attack_success": to_plain(rate)}
    if utility is not None:
        metrics["utility_share"] = {"value": utility, "unit": "share"}
    return AttackPoint(spent, metrics, setting, found)


def outcome(name: str, points: Sequence[AttackPoint], *, unit: str = "edits", **more: Any) -> AttackOutcome:
    """Return an outcome of these points."""
    kind = {"edits": "weights", "steps": "finetuning", "queries": "prompt"}[unit]
    return AttackOutcome(name, name, kind, unit, {}, list(points), {"seconds": 1.0}, **more)  # type: ignore[arg-type]


def attempts_of(breaks: Mapping[str, int | None], budget: int) -> list[Attempt]:
    """Return the attempts of requests that break at a query, or never."""
    return [
        Attempt(number, name, f"{name}/{number}", "text", "reply", number == at)
        for name, at in breaks.items()
        for number in range(1, (at or budget) + 1)
    ]


def prompt_outcome(name: str, breaks: Mapping[str, int | None], budget: int) -> AttackOutcome:
    """Return the outcome of a prompt attack under which requests break at a query, or never."""
    points = [
        point({key: at is not None and at <= k for key, at in breaks.items()}, spent=k) for k in range(1, budget + 1)
    ]
    return outcome(name, points, unit="queries", transcript=f"transcript-{name}.jsonl")


def write_attack_file(
    folder: Path,
    label: str,
    outcomes: Sequence[AttackOutcome],
    transcripts: Mapping[str, Sequence[Attempt]] = {},
    **more: Any,
) -> Path:
    """Write an ``attack.json`` with its transcripts and return its path."""
    for name, attempts in transcripts.items():
        Transcript(folder / f"transcript-{name}.jsonl", {"made": "up"}).add(attempts)
    content = {
        "format": 1,
        "model": {"label": label},
        "suite": {"name": "made-up", "utility_floor": 0.9},
        "outcomes": [one.to_dict() for one in outcomes],
        "utility": {},
        "measured_with": MEASURED_WITH,
        **more,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "attack.json", content)
    return folder / "attack.json"
