"""What an attack reaches with a budget: attack success against queries or steps, and how long requests hold.

ASR@k is the share of all requests that were broken having spent at most k. How long a request holds is a time to an
event that may not have come when the budget was spent: such a request is right-censored there. The survival function
S(k), the chance to hold k queries or steps, is Kaplan and Meier's with Greenwood's standard error as statsmodels has it
(statsmodels 0.15.0, ``SurvfuncRight``); its 95 % interval is on the log-log scale, S^exp(+-z se/(S log S)), which stays
within 0 and 1. Where no request is left it has no width, so that the upper end is Clopper and Pearson's for 0 of n that
hold. Two models are compared by the log-rank test (``survdiff``).

Steps are looked at at a few points only: a request counts as broken at the first of them at which it is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from experiments.attacks.attack_files import point_setting
from experiments.attacks.interface import AttackOutcome, AttackPoint, Attempt
from framework.errors import DataError
from framework.evaluation.rates import Rate

__all__ = [
    "SHOWN_AT",
    "BudgetCurve",
    "Held",
    "LogRank",
    "Survival",
    "budget_curves",
    "held_in_attempts",
    "held_in_points",
    "log_rank",
    "success_at",
    "survival_of",
]

SHOWN_AT = (1, 10, 40)
"""Queries at which the attack success is named."""
CONFIDENCE = 0.95


class Held(NamedTuple):
    """How long one request held."""

    request_id: str
    spent: int
    """When it was broken, or when one stopped trying."""
    is_broken: bool


@dataclass(frozen=True)
class Survival:
    """The Kaplan-Meier estimate of how long requests hold; one entry for each time at which one was broken."""

    times: tuple[int, ...]
    at_risk: tuple[int, ...]
    events: tuple[int, ...]
    survival: tuple[float, ...]
    low: tuple[float, ...]
    """95 %, log-log; where S is 0 the upper end is that of none of n requests (``_left_of_none``)."""
    high: tuple[float, ...]
    num_requests: int
    num_broken: int
    median: int | None
    """First time at which half of the requests or fewer are expected to hold; None if it is not reached."""
    median_low: int | None
    """95 %: times at which the interval of S holds one half (Brookmeyer and Crowley); None if it is not reached."""
    median_high: int | None

    def median_text(self) -> str:
        """Return the median with its interval, or "not reached"."""
        if self.median is None:
            return "not reached"
        ends = ["not reached" if end is None else str(end) for end in (self.median_low, self.median_high)]
        return f"{self.median} ({ends[0]} to {ends[1]})"


@dataclass(frozen=True)
class LogRank:
    """The log-rank test of two models under one attack."""

    statistic: float
    """Chi-square with one degree of freedom."""
    p_value: float


@dataclass(frozen=True)
class BudgetCurve:
    """One attack at one setting over its budget."""

    name: str
    """Of the attack in the suite."""
    unit: str
    setting: Mapping[str, Any]
    spent: tuple[int, ...]
    rates: tuple[Rate, ...]
    """Attack success having spent so much."""
    held: tuple[Held, ...]
    survival: Survival

    @property
    def title(self) -> str:
        """Name and setting."""
        setting = ", ".join(f"{key} {value}" for key, value in self.setting.items())
        return f"{self.name} ({setting})" if setting else self.name


def success_at(held: Sequence[Held], spent: int, *, num_requests: int | None = None) -> Rate:
    """Return ASR@spent: the share of all requests that were broken by then.

    Args:
        held: one for each request that was attacked.
        spent: queries or steps.
        num_requests: of the suite, if some were not attacked at all; None takes those that were.

    Raises:
        DataError: no requests.
    """
    if not held:
        raise DataError("Expected at least one attacked request, but got none.")
    broken = sum(one.is_broken and one.spent <= spent for one in held)
    return Rate.of(f"attack_success@{spent}", broken, num_requests or len(held))


def held_in_attempts(attempts: Sequence[Attempt]) -> list[Held]:
    """Return how long each request of a prompt attack held; censored after its last query.

    Args:
        attempts: all of the attack.

    Raises:
        DataError: there are none.
    """
    if not attempts:
        raise DataError("Expected the transcript to hold at least one attempt, but got none.")
    return _held([(one.request_id, one.number, one.is_success) for one in attempts])


def held_in_points(points: Sequence[AttackPoint]) -> list[Held]:
    """Return how long each request held over the points of one setting; censored at the last one it is part of.

    Args:
        points: of one setting, in any order.

    Raises:
        DataError: there are none, or they do not say which requests were broken.
    """
    if not any(point.successes for point in points):
        raise DataError("Expected the points to say which requests were broken, but got none that does.")
    return _held([(name, point.spent, broken) for point in points for name, broken in point.successes.items()])


def survival_of(held: Sequence[Held]) -> Survival:
    """Return the Kaplan-Meier estimate.

    Args:
        held: one for each request.

    Raises:
        DataError: no requests.
    """
    if not held:
        raise DataError("Expected at least one attacked request, but got none.")
    from statsmodels.duration.survfunc import SurvfuncRight

    times = np.asarray([one.spent for one in held], dtype=float)
    events = np.asarray([one.is_broken for one in held], dtype=float)
    found = SurvfuncRight(times, events)
    survival = [float(value) for value in found.surv_prob]
    bounds = [_log_log(*pair) for pair in zip(survival, found.surv_prob_se, strict=True)]
    low, high = [bound[0] for bound in bounds], [bound[1] for bound in bounds]
    if survival and survival[-1] <= 0.0:
        # All at risk at the last event broke. Those censored before it say nothing of who would have held so long.
        independent = len(held) if events.all() else int(found.n_risk[-1])
        high[-1] = min([_left_of_none(independent), *high[:-1]])
    when = [int(time) for time in found.surv_times]
    return Survival(
        times=tuple(when),
        at_risk=tuple(int(count) for count in found.n_risk),
        events=tuple(int(count) for count in found.n_events),
        survival=tuple(survival),
        low=tuple(low),
        high=tuple(high),
        num_requests=len(held),
        num_broken=int(events.sum()),
        median=_first_below(when, survival),
        median_low=_first_below(when, low),
        median_high=_first_below(when, high),
    )


def log_rank(first: Sequence[Held], second: Sequence[Held]) -> LogRank | None:
    """Return the log-rank test of two models under one attack; None where neither was broken at all.

    It takes the requests of the two models for independent. They are the same requests, so that it finds a difference
    less often than it could; the paired comparison at the whole budget makes use of that.

    Args:
        first: one for each request of the one model.
        second: of the other.

    Raises:
        DataError: one of them has no requests.
    """
    if not first or not second:
        raise DataError("Expected both models to have attacked requests, but got one that has none.")
    rows = [*first, *second]
    if not any(one.is_broken for one in rows):
        return None
    from statsmodels.duration.survfunc import survdiff

    times, events = np.asarray([one.spent for one in rows], float), np.asarray([one.is_broken for one in rows], float)
    try:
        statistic, p_value = survdiff(times, events, np.repeat([0, 1], [len(first), len(second)]))
    except np.linalg.LinAlgError:  # wherever one was broken all at risk were, so that nothing could differ
        return LogRank(0.0, 1.0)
    return LogRank(float(statistic), float(p_value))


def budget_curves(
    outcome: AttackOutcome, *, attempts: Sequence[Attempt] | None = None, num_requests: int | None = None
) -> list[BudgetCurve]:
    """Return the curves of an attack, one for each of its settings; none for an edit that spends nothing.

    Args:
        outcome: of a prompt or fine-tuning attack.
        attempts: of a prompt attack, which then has a value for every number of queries.
        num_requests: of the suite, if some were not attacked at all.

    Raises:
        DataError: the points do not say which requests were broken.
    """
    if outcome.unit == "edits":
        return []
    if outcome.unit == "queries":
        held = held_in_attempts(attempts) if attempts else held_in_points(outcome.points)
        last = max(point.spent for point in outcome.points)
        spent = list(range(1, last + 1)) if attempts else sorted({point.spent for point in outcome.points})
        return [_curve(outcome, {}, held, spent, lambda k: success_at(held, k, num_requests=num_requests))]
    groups: dict[str, list[AttackPoint]] = {}
    for point in outcome.points:
        groups.setdefault(json.dumps(point_setting(point), sort_keys=True), []).append(point)
    found = []
    for points in groups.values():
        # Training on may bring refusals back: the rate is that of the model at a step, not of all models up to it.
        rates = {point.spent: Rate.of("attack_success", *_counts(point)) for point in points}
        held = held_in_points(points)
        found.append(_curve(outcome, point_setting(points[0]), held, sorted(rates), rates.__getitem__))
    return found


def _curve(
    outcome: AttackOutcome,
    setting: Mapping[str, Any],
    held: Sequence[Held],
    spent: Sequence[int],
    rate: Callable[[int], Rate],
) -> BudgetCurve:
    rates = tuple(rate(k) for k in spent)
    return BudgetCurve(outcome.name, outcome.unit, setting, tuple(spent), rates, tuple(held), survival_of(held))


def _counts(point: AttackPoint) -> tuple[int, int]:
    return sum(point.successes.values()), len(point.successes)


def _held(seen: Sequence[tuple[str, int, bool]]) -> list[Held]:
    found: dict[str, Held] = {}
    for name, spent, is_broken in sorted(seen, key=lambda row: row[1]):
        if name not in found or not found[name].is_broken:
            found[name] = Held(name, spent, bool(is_broken))
    return [found[name] for name in dict.fromkeys(name for name, _, _ in seen)]


def _log_log(survival: float, error: float) -> tuple[float, float]:
    """Return the interval of S; of S = 0 only the lower end, the other follows from the number of requests."""
    if survival >= 1.0:
        return 1.0, 1.0
    if survival <= 0.0:
        return 0.0, 0.0
    z = float(stats.norm.ppf((1 + CONFIDENCE) / 2))
    width = z * error / (survival * abs(math.log(survival)))
    return survival ** math.exp(width), survival ** math.exp(-width)


def _left_of_none(num_requests: int) -> float:
    """Return the upper end of Clopper and Pearson's interval for the share that holds where 0 of so many do."""
    return float(1.0 - ((1.0 - CONFIDENCE) / 2) ** (1.0 / num_requests))


def _first_below(times: Sequence[int], survival: Sequence[float]) -> int | None:
    return next((time for time, value in zip(times, survival, strict=True) if value <= 0.5 + 1e-12), None)
