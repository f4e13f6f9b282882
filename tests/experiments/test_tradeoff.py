"""Pareto front, hypervolume, knee and safety tax by hand and against brute force."""

from __future__ import annotations

import numpy as np
import pytest

from experiments.tradeoff import (
    Objective,
    analyse_tradeoff,
    dominators,
    hypervolume,
    knee,
    pareto_front,
    safety_tax,
)
from framework.errors import DataError

DOWN_UP = [False, True]


def test_dominated_points_and_who_dominates_them() -> None:
    points = [[0.1, 0.8], [0.2, 0.8], [0.05, 0.7], [0.3, 0.6], [0.1, 0.8]]
    assert pareto_front(points, maximise=DOWN_UP) == [True, False, True, False, True]
    assert dominators(points, maximise=DOWN_UP)[3] == (0, 1, 2, 4)


@pytest.mark.parametrize("dimensions", [1, 2, 3, 4])
def test_the_hypervolume_equals_a_count_of_cells(dimensions: int) -> None:
    draw = np.random.default_rng(dimensions)
    points = draw.integers(0, 5, size=(6, dimensions)) / 5
    grid = np.stack(np.meshgrid(*[np.arange(5) / 5 + 0.1] * dimensions), axis=-1).reshape(-1, dimensions)
    covered = (points[None] <= grid[:, None]).all(-1).any(-1).mean()
    found = hypervolume(points, [1.0] * dimensions, maximise=[False] * dimensions)
    assert found == pytest.approx(covered, abs=1e-12)
    turned = hypervolume(-points, [-1.0] * dimensions, maximise=[True] * dimensions)
    assert turned == pytest.approx(covered, abs=1e-12)


def test_points_beyond_the_reference_add_nothing() -> None:
    assert hypervolume([[1.2, 0.5], [1.0, 0.9]], [1.0, 0.0], maximise=DOWN_UP) == 0.0


def test_the_knee_bulges_most() -> None:
    assert knee([[0.0, 0.2], [0.1, 0.7], [0.6, 0.75], [1.0, 0.8]], maximise=DOWN_UP) == 1
    assert knee([[0.0, 0.0], [0.5, 0.5], [1.0, 1.0]], maximise=DOWN_UP) is None
    assert knee([[0.0, 0.2], [1.0, 0.8]], maximise=DOWN_UP) is None


def test_safety_tax() -> None:
    assert safety_tax(utility_lost=0.02, attack_success_avoided=0.4) == pytest.approx(0.05)
    assert safety_tax(utility_lost=0.02, attack_success_avoided=0.0) is None


def test_methods_are_weighed_together() -> None:
    values = {
        "LoRA": {"attack_success": 0.6, "over_refusal": 0.1, "task_accuracy": 0.9, "cost/fit_seconds": 10.0},
        "Safe": {"attack_success": 0.1, "over_refusal": 0.1, "task_accuracy": 0.88, "cost/fit_seconds": 12.0},
        "Bad": {"attack_success": 0.6, "over_refusal": 0.2, "task_accuracy": 0.7, "cost/fit_seconds": 20.0},
        "Edit": {"attack_success": 0.3, "over_refusal": 0.1, "task_accuracy": 0.8},
    }
    found = analyse_tradeoff(values, reference="LoRA")
    points = {point.name: point for point in found.points}
    assert points["Bad"].dominated_by == ("LoRA", "Safe")
    assert not points["Safe"].is_dominated
    assert points["Safe"].safety_tax == pytest.approx(0.02 / 0.5)
    assert points["LoRA"].safety_tax is None
    assert points["Bad"].safety_tax is None
    assert found.left_out == {"Edit": ("cost/fit_seconds",)}
    assert 0 < found.hypervolume < 1


def test_an_axis_without_spread_does_not_count() -> None:
    axes = (Objective("a", "a", False), Objective("b", "b", False))
    found = analyse_tradeoff({"x": {"a": 1.0, "b": 3.0}, "y": {"a": 2.0, "b": 3.0}}, reference="x", objectives=axes)
    assert found.hypervolume == 1.0
    assert [point.is_dominated for point in found.points] == [False, True]


def test_bad_points_are_refused() -> None:
    with pytest.raises(DataError, match=r"Expected `points` to be \(points, 2\), but got the shape \(1, 3\)"):
        pareto_front([[1, 2, 3]], maximise=DOWN_UP)
    with pytest.raises(DataError, match="Expected every value of `points` to be finite"):
        pareto_front([[1, float("nan")]], maximise=DOWN_UP)
    with pytest.raises(DataError, match="Expected a method with every objective, but got none"):
        analyse_tradeoff({}, reference="x")
