"""Rates that agree with themselves, and each way in which one does not."""

from __future__ import annotations

import pytest

from experiments.release.rates import mean_problem, rate_problem
from framework.evaluation.rates import Rate
from framework.files import to_plain


@pytest.mark.parametrize(("hits", "total"), [(0, 1), (10, 10), (9, 10), (3, 520)])
def test_rate_of_this_project_agrees_with_itself(hits, total):
    rate = to_plain(Rate.of("x", hits, total))
    assert rate_problem(rate, is_ours=True) == rate_problem(rate, is_ours=False) == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"value": 0.0}, "has the value 0, but its counts 9/10 give 0.9"),
        ({"low": 0.91}, "which are none of its value 0.9"),
        ({"high": 1.2}, "which are none of its value 0.9"),
        ({"numerator": 11}, "counts 11 of 10"),
        ({"denominator": 0}, "counts 9 of 0"),
        ({"numerator": -1}, "counts -1 of 10"),
        ({"value": None}, "has no number as value"),
        ({"value": True, "low": "0"}, "has no number as value and low"),
        ({"high": float("nan")}, "has no number as high"),
    ],
)
def test_rate_that_contradicts_itself_is_told_whoever_computed_it(changes, message):
    rate = to_plain(Rate.of("x", 9, 10)) | changes
    assert message in rate_problem(rate, is_ours=True)
    assert message in rate_problem(rate, is_ours=False)


def test_only_rates_of_this_project_must_have_its_interval_to_the_last_digit():
    rounded = {"value": 0.33, "numerator": 1, "denominator": 3, "low": 0.06, "high": 0.79}
    assert rate_problem(rounded, is_ours=False) == ""
    assert "give 0.333333" in rate_problem(rounded, is_ours=True)
    narrow = to_plain(Rate.of("x", 9, 10)) | {"low": 0.89}
    assert rate_problem(narrow, is_ours=False) == ""
    assert "but the Wilson interval of its counts 9/10 is 0.595" in rate_problem(narrow, is_ours=True)


def test_mean_lies_within_its_bounds_where_it_has_some():
    assert mean_problem({"value": 1.0, "low": 0.5, "high": 1.5}) == ""
    assert mean_problem({"value": 1.0, "denominator": 20}) == mean_problem({"value": 1.0, "low": None}) == ""
    assert "none of its value 2" in mean_problem({"value": 2.0, "low": 0.5, "high": 1.5})
    assert "no number" in mean_problem({"value": float("inf"), "low": 0.5, "high": 1.5})
