"""Rates over the queries of an attack, with intervals over its requests.

An attack asks for one thing many times, and what a model says to one request is much alike: ten requests with forty
queries each are not four hundred independent replies. The rate stays that of all replies; its interval is Wilson's with
fewer of them, by the design effect of clusters of any size (Kish, Survey Sampling, 1965; ratio estimator):

    effective = n / deff,  deff = sum_i (w_i (y_i - rate n_i))^2 / (n rate (1 - rate)),  w_i = (1 - 1/m) / (1 - n_i/n),

y_i of the n_i replies to request i counting, n their number, m that of requests. The weights are the jackknife's: a
request with most of the replies pulls the rate towards itself and would seem to agree with it. What is effective lies
between n and (sum_i n_i)^2 / sum_i n_i^2, the number of requests where all have as many replies: what is left when the
replies to a request are all the same. Where the rate is 0 or 1 the replies tell nothing of their likeness, and that
smallest number is taken. With as many replies to each request it is ``statistics.pooled_interval``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from framework.errors import DataError
from framework.evaluation.rates import Rate, wilson_interval

__all__ = ["clustered_metric", "clustered_rate"]


def clustered_rate(name: str, seen: Iterable[tuple[str, bool]]) -> Rate:
    """Return the rate over all replies with the 95 % interval over requests.

    Args:
        name: key of the rate.
        seen: request id and whether the reply counts, one for each reply.

    Raises:
        DataError: there are none.

    Example:
        >>> alike = clustered_rate("refusal_rate", [("a", True)] * 40 + [("b", False)] * 40)
        >>> alike.value, round(alike.low, 2), round(alike.high, 2)
        (0.5, 0.09, 0.91)
    """
    return _rate(name, _counts(seen))


def clustered_metric(name: str, seen: Iterable[tuple[str, bool]]) -> dict[str, Any]:
    """Return ``clustered_rate`` as a metric: plain values, with ``num_groups`` requests the interval is over.

    Args:
        name: key of the rate.
        seen: request id and whether the reply counts, one for each reply.

    Raises:
        DataError: there are none.
    """
    counts = _counts(seen)
    return {**dataclasses.asdict(_rate(name, counts)), "num_groups": len(counts)}


def _counts(seen: Iterable[tuple[str, bool]]) -> list[tuple[int, int]]:
    """Return for each request how many of its replies count, and how many there are."""
    found: dict[str, tuple[int, int]] = {}
    for request, holds in seen:
        counting, total = found.get(request, (0, 0))
        found[request] = counting + bool(holds), total + 1
    if not found:
        raise DataError("Expected at least one reply, but got none. An empty set has no rate.")
    return list(found.values())


def _rate(name: str, counts: list[tuple[int, int]]) -> Rate:
    counting, total = (sum(column) for column in zip(*counts, strict=True))
    rate = counting / total
    fewest = total**2 / sum(own**2 for _, own in counts)
    effective = fewest
    if 0 < counting < total and len(counts) > 1:
        evenly = 1 - 1 / len(counts)
        spread = sum((evenly / (1 - own / total) * (held - rate * own)) ** 2 for held, own in counts)
        # Replies that differ within a request more than between requests are no more than independent.
        effective = max(fewest, total / max(1.0, spread / (total * rate * (1 - rate))))
    low, high = wilson_interval(rate * effective, effective)
    return Rate(name, counting, total, rate, low, high)
