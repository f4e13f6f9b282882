"""Tango's score interval against a search for its ends and by simulation; the three answers."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import optimize, stats

from experiments.noninferiority import non_inferiority, paired_score_interval, pairs_needed
from framework.errors import DataError


def pairs(both: int, lost: int, gained: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    first = np.repeat([1, 1, 0, 0], [both, lost, gained, neither])
    second = np.repeat([1, 0, 1, 0], [both, lost, gained, neither])
    return first, second


@pytest.mark.parametrize("counts", [(43, 0, 1, 0), (20, 5, 12, 40), (10, 9, 2, 3)])
def test_the_ends_are_where_the_score_reaches_its_quantile(counts: tuple[int, int, int, int]) -> None:
    _, lost, gained, _ = counts
    total = sum(counts)

    def score(delta: float) -> float:
        """The score with the lost share at its restricted maximum likelihood estimate, found by search."""

        def deviance(share: float) -> float:
            parts = ((gained, share + delta), (lost, share), (total - gained - lost, 1 - 2 * share - delta))
            return -sum(count * np.log(max(p, 1e-300)) for count, p in parts if count)

        ends = (max(0.0, -delta), (1 - delta) / 2)
        share = optimize.minimize_scalar(deviance, bounds=ends, method="bounded", options={"xatol": 1e-12}).x
        return (gained - lost - total * delta) / np.sqrt(total * (2 * share + delta * (1 - delta)))

    low, high = paired_score_interval(*pairs(*counts))
    assert score(low) == pytest.approx(stats.norm.ppf(0.975), abs=1e-4)
    assert score(high) == pytest.approx(-stats.norm.ppf(0.975), abs=1e-4)


def test_equal_pairs_leave_room() -> None:
    z = stats.norm.ppf(0.975)
    low, high = paired_score_interval(*pairs(20, 0, 0, 60))
    assert high == pytest.approx(z**2 / (80 + z**2), abs=1e-9)
    assert low == pytest.approx(-high, abs=1e-9)
    assert paired_score_interval([0], [1]).high == 1.0


def test_the_interval_covers() -> None:
    draw, covered, rounds = np.random.default_rng(0), 0, 300
    for _ in range(rounds):
        kinds = draw.choice(4, size=60, p=[0.2, 0.15, 0.05, 0.6])
        low, high = paired_score_interval(np.isin(kinds, (0, 1)), np.isin(kinds, (0, 2)))
        covered += low <= -0.1 <= high
    assert 0.92 <= covered / rounds <= 0.98


def test_three_answers() -> None:
    same = non_inferiority(*pairs(20, 0, 0, 300), margin=0.02, higher_is_better=False)
    assert same.decision == "pass"
    assert same.p_value < 0.05
    worse = non_inferiority(*pairs(20, 0, 60, 240), margin=0.02, higher_is_better=False)
    assert (worse.decision, round(worse.loss, 4)) == ("worse", 0.1875)
    few = non_inferiority(*pairs(5, 0, 0, 20), margin=0.02, higher_is_better=False)
    assert few.decision == "unclear"
    lost = non_inferiority(*pairs(240, 60, 0, 20), margin=0.02, higher_is_better=True)
    assert lost.decision == "worse"
    assert lost.loss > 0


def test_how_many_pairs_are_needed() -> None:
    count = pairs_needed(0.05)
    for number, decision in ((count, "pass"), (count - 1, "unclear")):
        zeros = np.zeros(number)
        assert non_inferiority(zeros, zeros, margin=0.05, higher_is_better=False).decision == decision


def test_a_margin_out_of_range_is_refused() -> None:
    with pytest.raises(DataError, match="Expected `margin` to be a share between 0 and 1, but got 2"):
        non_inferiority([1], [1], margin=2, higher_is_better=True)
