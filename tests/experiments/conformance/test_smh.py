from __future__ import annotations

import pytest

from experiments.conformance import smh
from experiments.conformance.smh import Line, chosen_order, mixture


def measured(folder):
    rows = list(smh.deviations(folder))
    assert [row.bound for row in rows] == [0] * 5
    assert [row.cases for row in rows] == [8, 12, 12, 12, 12]
    return [row.deviation for row in rows]


def test_majority_choice_mixture_targets_and_steps_are_exact(tmp_path):
    assert measured(tmp_path) == [0] * 5


def test_the_derived_choice_drops_what_never_or_always_breaks():
    lines = [Line("a", 0), Line("b", 3), Line("c", 64), Line("d", 60), Line("e", 9)]
    assert chosen_order(lines) == ["d", "e"]


@pytest.mark.parametrize(
    ("harmful", "benign", "kinds"), [(1, 1, "hbhbhbhb"), (1, 0, "hhhh"), (2, 1, "hhbhhb"), (1, 2, "hbbhbbhbbhbb")]
)
def test_the_derived_mixture_is_strict(harmful, benign, kinds):
    assert mixture(4, harmful=harmful, benign=benign).count("h") == 4
    found = mixture(4, harmful=harmful, benign=benign)
    assert found.replace("h", "").count("b") == kinds.count("b")
    assert found == kinds


@pytest.mark.parametrize(
    ("name", "wrong", "row"),
    [
        ("chosen_order", lambda lines: chosen_order(lines)[::-1], 1),
        ("mixture", lambda count, harmful, benign: mixture(count, harmful=harmful, benign=benign)[::-1], 2),
    ],
)
def test_a_wrong_derivation_is_caught(tmp_path, monkeypatch, name, wrong, row):
    monkeypatch.setattr(smh, name, wrong)
    monkeypatch.setattr(smh, "SEEDS", (0,))
    found = [deviation.deviation for deviation in smh.deviations(tmp_path)]
    assert [number for number, deviation in enumerate(found) if deviation] == [row]
