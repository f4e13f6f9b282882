"""The attacks in a model card: those of the run, of ``seawall attack``, and those that somebody wrote down."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.attacks.attack_files import RESULTS_FILE, point_setting, read_attack_file
from experiments.attacks.interface import AttackOutcome, AttackPoint
from experiments.attacks.view import best_point
from experiments.release.rates import RATE_PARTS, rate_problem
from framework.config import RunConfig
from framework.errors import DataError
from framework.files import read_json

__all__ = ["BY_HAND", "MEASURED", "OWN", "UNCOMPARED", "prefill_attacks", "prefill_key", "read_attacks"]

OWN = "run"
"""Measured by the run that is released."""
MEASURED = "attack"
"""Measured by ``seawall attack`` on the released model."""
UNCOMPARED = "attack_uncompared"
"""Measured by ``seawall attack``; its file does not say which weights were attacked, as behind an endpoint."""
BY_HAND = "by_hand"
"""Written down by whoever released the model."""
SHOWN = ("attack_success", "harmful_success")
"""Rates of ``seawall attack`` that stand in a card; the others are about single judges and variants."""
_PREFILL = re.compile(r"prefill_(\d+)/attack_success")


def prefill_attacks(config: RunConfig, metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the prefilling attacks that a run measured.

    Args:
        config: of the run.
        metrics: of its last model.
    """
    found = []
    for key, rate in metrics.items():
        if match := _PREFILL.fullmatch(key):
            budget = {"forced_tokens": int(match[1]), "openings": config.evaluate.prefill_replies}
            rates = {"attack_success": dict(rate)}
            found.append({"name": "prefill", "origin": OWN, "budget": budget, "cost": {}, "metrics": rates})
    return found


def prefill_key(attack: Mapping[str, Any], rate: str) -> str:
    """Return the metric of the run that a rate of its prefilling attack was taken from.

    Example:
        >>> prefill_key({"name": "prefill", "budget": {"forced_tokens": 5}}, "attack_success")
        'prefill_5/attack_success'
    """
    return f"prefill_{attack['budget'].get('forced_tokens')}/{rate}"


def read_attacks(path: Path, *, fingerprint: str) -> list[dict[str, Any]]:
    """Return the attacks in a file, as ``release.json`` lists them.

    It is the ``attack.json`` of ``seawall attack``, or a JSON list (or a mapping with a list under ``attacks``) that
    somebody wrote. An attack of such a list has a ``name``, and may have ``budget`` and ``cost`` (mappings) and
    ``metrics`` (rates with counts and bounds). Transcripts and whatever else stands there is left out.

    Args:
        path: the file, or the folder with an ``attack.json``.
        fingerprint: of the released model.

    Raises:
        DataError: the file is not of that form, another model was attacked, or a rate contradicts itself.
    """
    file = path / RESULTS_FILE if path.is_dir() else path
    try:
        value = read_json(file)
    except (OSError, ValueError) as error:
        raise DataError(f"Expected `{file}` to be a JSON file of attacks, but got: {error}.") from error
    if isinstance(value, dict) and "outcomes" in value:
        return _read_measured(file, value.get("model"), fingerprint)
    items = value.get("attacks") if isinstance(value, dict) else value
    if not isinstance(items, list) or not items:
        raise DataError(
            f"Expected `{file}` to list attacks, but got none. It needs a list under `attacks`, or be the "
            f"{RESULTS_FILE} of `seawall attack`."
        )
    return [_by_hand(item, file) for item in items]


def _read_measured(file: Path, model: Any, fingerprint: str) -> list[dict[str, Any]]:
    attacked = model.get("fingerprint") if isinstance(model, dict) else None
    if attacked is not None and attacked != fingerprint:
        raise DataError(
            f"Expected `{file}` to hold attacks on the released model, with fingerprint {fingerprint}, but got "
            f"{attacked!r}. Attack the folder `model` of the run that is released."
        )
    read = read_attack_file(file)
    origin = UNCOMPARED if attacked is None else MEASURED
    floor = read.utility_floor
    return [_measured(outcome, file, 0.0 if floor is None else float(floor), origin) for outcome in read.outcomes]


def _measured(outcome: AttackOutcome, file: Path, floor: float, origin: str) -> dict[str, Any]:
    """Return one attack at the point that ``seawall attack`` itself shows, by counts that agree with themselves."""
    if not outcome.points:
        raise DataError(f"Expected attack `{outcome.name}` in `{file}` to have reached something, but got no points.")
    for point in outcome.points:
        for key in SHOWN:
            if key == SHOWN[0] or key in point.metrics:
                _check_rate(key, point.metrics.get(key), outcome.name, is_ours=True)
    best = AttackPoint(**best_point(outcome.to_dict(), floor))
    budget: dict[str, Any] = {outcome.unit: best.spent, **point_setting(best)}
    share = best.metrics.get("utility_share", {}).get("value")
    if outcome.unit != "queries" and share is not None:
        # The point was chosen among those above the floor, if there are any: another may have had more success.
        budget |= {"utility_share": share, "utility_floor": floor}
    rates = {key: {part: best.metrics[key][part] for part in RATE_PARTS} for key in SHOWN if key in best.metrics}
    return {"name": outcome.name, "origin": origin, "budget": budget, "cost": dict(outcome.cost), "metrics": rates}


def _by_hand(item: Any, file: Path) -> dict[str, Any]:
    if not isinstance(item, dict) or not isinstance(item.get("name"), str) or not item["name"]:
        raise DataError(f"Expected every attack in `{file}` to have a name, but got {str(item)[:60]!r}.")
    parts = {part: item.get(part) or {} for part in ("budget", "cost", "metrics")}
    wrong = [part for part, value in parts.items() if not isinstance(value, dict)]
    if wrong:
        raise DataError(
            f"Expected `{wrong[0]}` of attack `{item['name']}` to be a mapping, but got {str(parts[wrong[0]])[:60]!r}."
        )
    rates = {key: value for key, value in parts["metrics"].items() if isinstance(value, dict)}
    for key, rate in rates.items():
        _check_rate(key, rate, item["name"], is_ours=False)
    return {"name": item["name"], "origin": BY_HAND, **parts, "metrics": rates}


def _check_rate(key: str, rate: Any, name: str, *, is_ours: bool) -> None:
    """Refuse a rate that a card could not show, or that it would show wrongly."""
    if not isinstance(rate, Mapping) or not set(RATE_PARTS) <= set(rate):
        raise DataError(f"Expected rate `{key}` of attack `{name}` to have counts and bounds, but it lacks some.")
    if problem := rate_problem(rate, is_ours=is_ours):
        raise DataError(
            f"Expected rate `{key}` of attack `{name}` to agree with its own counts, but it {problem}. Give the "
            "numbers as they were measured."
        )
