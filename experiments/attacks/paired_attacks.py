"""How two models stand to each other under each attack, request by request.

Compared is what both were given: the same attack at the same setting with the same budget. A training that stops early
leaves points up to there; the two are then compared at the largest budget both were measured at, and what has none in
common is named instead of left out in silence.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from experiments.attacks.attack_files import point_setting
from experiments.attacks.interface import FAILED_TRAINING, AttackOutcome, AttackPoint
from experiments.attacks.worst_case import AttackedPoint, attacked_point
from experiments.noninferiority import paired_score_interval
from experiments.statistics import holm, mcnemar_exact
from framework.errors import DataError
from framework.evaluation.rates import Rate

__all__ = ["PairedAttack", "paired_attacks", "unpaired_attacks"]


@dataclass(frozen=True)
class PairedAttack:
    """One attack on a defended model and on its undefended twin, the same requests."""

    point: AttackedPoint
    """Of the defended model, over the shared requests."""
    undefended: Rate
    num_requests: int
    difference: float
    """Defended minus undefended; below 0 the defence helps."""
    low: float
    """95 %, Tango's score interval of paired rates."""
    high: float
    only_undefended: int
    """Requests that are broken without the defence alone."""
    only_defended: int
    p_value: float
    """Exact McNemar test, two-sided."""
    p_holm: float
    """Corrected over all attacks compared."""


class _Match(NamedTuple):
    """An attack at a setting that at least one of the models was given."""

    outcome: AttackOutcome
    """Of the defended model."""
    setting: Mapping[str, Any]
    points: tuple[AttackPoint, AttackPoint] | None
    """Defended and undefended, of one budget and with a request in common; None where there are none."""
    reason: str = ""
    """Why there are none."""


@dataclass
class _Tried:
    """What there is of an attack at one setting."""

    setting: Mapping[str, Any]
    points: dict[int, AttackPoint] = field(default_factory=dict)
    """By what was spent."""
    has_failed: bool = False
    """Whether its training gave no model, or broke off later on."""


def paired_attacks(defended: Sequence[AttackOutcome], undefended: Sequence[AttackOutcome]) -> list[PairedAttack]:
    """Return how a defended model stands to its undefended twin, attack by attack.

    Compared are the attacks of one name in both, at each setting both have, with the largest budget at which both were
    measured, over the requests both were asked. Attacks of one name must have the same settings, unless they were
    searched for on each model; an attack with one setting on either side is then compared whatever it is. A training
    that gave no model, and a model after 0 steps, are no attack and in no comparison.

    Args:
        defended: attacks on the one model.
        undefended: on the other.

    Raises:
        DataError: there is nothing to compare, or attacks of one name have other settings.
    """
    matches = list(_matches(defended, undefended))
    rows = [_paired(match.outcome, *match.points) for match in matches if match.points is not None]
    if not rows:
        reasons = "; ".join(map(_reason, matches))
        raise DataError(
            "Expected both models to have at least one attack, setting and request in common, but got none"
            f"{reasons and f' ({reasons})'}. Attack both with the same suite."
        )
    return [replace(row, p_holm=p) for row, p in zip(rows, holm([row.p_value for row in rows]), strict=True)]


def unpaired_attacks(defended: Sequence[AttackOutcome], undefended: Sequence[AttackOutcome]) -> list[str]:
    """Return what ``paired_attacks`` leaves out of the attacks both models were given, each with the reason.

    Args:
        defended: attacks on the one model.
        undefended: on the other, called the baseline.

    Raises:
        DataError: attacks of one name have other settings.
    """
    return [_reason(match) for match in _matches(defended, undefended) if match.points is None]


def _check_settings(first: AttackOutcome, second: AttackOutcome) -> None:
    if first.attack != second.attack:
        raise DataError(
            f"Expected `{first.name}` to be the same attack on both models, but got `{first.attack}` and "
            f"`{second.attack}`. Attack both with the same suite."
        )
    if "search" in first.settings or "search" in second.settings:
        return
    ours, theirs = (json.loads(json.dumps(dict(one.settings))) for one in (first, second))
    differing = sorted(key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key))
    if differing:
        texts = [f"{key} {ours.get(key)!r} and {theirs.get(key)!r}" for key in differing]
        raise DataError(
            f"Expected `{first.name}` to have the same settings on both models, but got {', '.join(texts)}. Attack "
            "both with the same suite."
        )


def _matches(defended: Sequence[AttackOutcome], undefended: Sequence[AttackOutcome]) -> Iterator[_Match]:
    other = {outcome.name: outcome for outcome in undefended}
    for outcome in defended:
        if outcome.name in other:
            _check_settings(outcome, other[outcome.name])
            ours, theirs = _by_setting(outcome), _by_setting(other[outcome.name])
            names = [(name, name) for name in dict.fromkeys([*ours, *theirs])]
            if len(ours) == len(theirs) == 1:
                names = [(next(iter(ours)), next(iter(theirs)))]
            for mine, its in names:
                yield _matched(outcome, ours.get(mine), theirs.get(its))


def _by_setting(outcome: AttackOutcome) -> dict[str, _Tried]:
    """Return the points by setting as JSON; a training that failed belongs to the setting it was made with."""
    found: dict[str, _Tried] = {}
    for point in outcome.points:
        setting = point_setting(point)
        is_failed = FAILED_TRAINING.items() <= setting.items()
        if is_failed:
            setting = {key: value for key, value in setting.items() if key not in FAILED_TRAINING}
        tried = found.setdefault(json.dumps(setting, sort_keys=True), _Tried(setting))
        if is_failed:
            tried.has_failed = True
        elif point.spent or outcome.unit != "steps":
            tried.points[point.spent] = point
    return found


def _matched(outcome: AttackOutcome, ours: _Tried | None, theirs: _Tried | None) -> _Match:
    if ours is None or theirs is None:
        there = theirs or ours or _Tried({})
        return _Match(outcome, there.setting, None, f"only the {'model' if theirs is None else 'baseline'} has it")
    common = ours.points.keys() & theirs.points.keys()
    if not common:
        told = f"the model {_budgets(ours, outcome.unit)}, the baseline {_budgets(theirs, outcome.unit)}"
        return _Match(outcome, ours.setting, None, told)
    pair = ours.points[max(common)], theirs.points[max(common)]
    if not pair[0].successes.keys() & pair[1].successes.keys():
        return _Match(outcome, ours.setting, None, "no request in common")
    return _Match(outcome, ours.setting, pair)


def _budgets(tried: _Tried, unit: str) -> str:
    if not tried.points:
        return "could not be trained" if tried.has_failed else "was not trained"
    return f"was measured at {', '.join(map(str, sorted(tried.points)))} {unit}"


def _reason(match: _Match) -> str:
    setting = ", ".join(f"{key} {value}" for key, value in match.setting.items())
    return f"{match.outcome.name}{f' ({setting})' if setting else ''}: {match.reason}"


def _paired(outcome: AttackOutcome, point: AttackPoint, other: AttackPoint) -> PairedAttack:
    shared = [name for name in point.successes if name in other.successes]
    before = [float(other.successes[name]) for name in shared]
    after = [float(point.successes[name]) for name in shared]
    test, interval = mcnemar_exact(before, after), paired_score_interval(before, after)
    return PairedAttack(
        point=attacked_point(outcome, point, shared),
        undefended=Rate.of("attack_success", int(sum(before)), len(shared)),
        num_requests=len(shared),
        difference=(sum(after) - sum(before)) / len(shared),
        low=interval.low,
        high=interval.high,
        only_undefended=test.only_baseline,
        only_defended=test.only_candidate,
        p_value=test.p_value,
        p_holm=test.p_value,
    )
