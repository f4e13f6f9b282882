"""Intervals over requests of rates over replies."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from experiments.attacks.clustered_rates import clustered_metric, clustered_rate
from experiments.statistics import pooled_interval, wilson_interval
from framework.errors import DataError
from framework.evaluation.rates import Rate


def seen(*replies):
    """One text of 0 and 1 for each request."""
    return [(f"r{n}", one == "1") for n, own in enumerate(replies) for one in own]


def test_one_reply_a_request_gives_wilsons_interval():
    assert clustered_rate("refusal_rate", seen(*"1101000")) == Rate.of("refusal_rate", 3, 7)


@pytest.mark.parametrize(
    "replies", [("1" * 9, "0" * 9, "0" * 9), ("110", "100", "011", "000"), ("11", "11"), ("00", "00")]
)
def test_as_many_replies_each_give_the_pooled_interval(replies):
    found = clustered_rate("refusal_rate", seen(*replies))
    table = np.array([[int(one) for one in own] for own in replies]).T
    assert (found.low, found.high) == pytest.approx(tuple(pooled_interval(table)))
    assert (found.numerator, found.denominator) == (table.sum(), table.size)


def test_ten_requests_that_always_refuse_are_ten():
    found = clustered_rate("refusal_rate", seen(*["1" * 40] * 10))
    assert (found.low, found.high) == wilson_interval(10, 10)
    assert found.denominator == 400


def test_requests_of_unequal_numbers_count_as_fewer():
    # (40 + 9)^2 / (40^2 + 9) = 1.49 requests, since nearly all replies are to the first one.
    found = clustered_rate("refusal_rate", seen("1" * 40, *"0" * 9))
    share, fewest = 40 / 49, 49**2 / 1609
    assert (found.low, found.high) == pytest.approx(wilson_interval(share * fewest, fewest))


def test_replies_that_differ_within_requests_are_no_more_than_independent():
    found = clustered_rate("refusal_rate", seen(*["10"] * 20))
    assert (found.low, found.high) == wilson_interval(20, 40)


def test_the_interval_covers_the_rate_where_that_over_replies_does_not():
    draw = np.random.default_rng(0)
    covered, alone, rounds = 0, 0, 400
    for _ in range(rounds):
        shares = draw.beta(0.5, 0.5, size=20)  # half on average, and most requests nearly 0 or 1
        replies = [(f"r{n}", bool(one)) for n, share in enumerate(shares) for one in draw.random(40) < share]
        found = clustered_rate("refusal_rate", replies)
        plain = wilson_interval(found.numerator, found.denominator)
        covered += found.low <= 0.5 <= found.high
        alone += plain.low <= 0.5 <= plain.high
    assert covered / rounds > 0.9
    assert alone / rounds < 0.5


def test_a_metric_names_its_requests():
    found = clustered_metric("refusal_rate", seen("110", "1"))
    assert found.pop("num_groups") == 2
    assert found == dataclasses.asdict(clustered_rate("refusal_rate", seen("110", "1")))


def test_one_request_is_one():
    found = clustered_rate("refusal_rate", seen("10" * 20))
    assert (found.low, found.high) == wilson_interval(0.5, 1)


def test_no_reply_is_refused():
    with pytest.raises(DataError, match="Expected at least one reply, but got none"):
        clustered_rate("refusal_rate", [])
