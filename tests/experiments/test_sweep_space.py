"""The distributions of W&B's sweep files."""

from __future__ import annotations

import math
from typing import Any

import optuna
import pytest

from experiments.sweep_files import grid_points
from experiments.sweep_space import read_parameters
from framework.errors import ConfigError


def test_every_distribution_of_wandb_has_its_meaning() -> None:
    given = {
        "whole": {"min": 1, "max": 3},
        "real": {"min": 0.0, "max": 1.0},
        "step": {"distribution": "q_uniform", "min": 0, "max": 1, "q": 0.25},
        "exponents": {"distribution": "log_uniform", "min": -2, "max": 2},
        "log": {"distribution": "log_uniform_values", "min": 0.01, "max": 100},
        "inverse": {"distribution": "inv_log_uniform", "min": 0, "max": 2},
        "normal": {"distribution": "normal", "mu": 5, "sigma": 0.001},
        "log_normal": {"distribution": "log_normal", "mu": 0, "sigma": 0.001},
        "beta": {"distribution": "beta", "a": 2, "b": 2},
        "round": {"distribution": "q_normal", "mu": 10, "sigma": 5, "q": 5},
        "weighted": {"values": ["a", "b"], "probabilities": [0.0, 1.0]},
        "lists": {"values": [[1, 2], [3]]},
        "deep": {"parameters": {"er": {"value": 7}}},
    }
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    draws = [
        {p.key: p.suggest(trial, p.key) for p in read_parameters(given)} for trial in (study.ask() for _ in range(30))
    ]
    column = {key: [draw[key] for draw in draws] for key in draws[0]}
    assert set(column["whole"]) == {1, 2, 3}
    assert all(0 <= value <= 1 for value in column["real"])
    assert set(column["step"]) <= {0.0, 0.25, 0.5, 0.75, 1.0}
    assert all(math.exp(-2) <= value <= math.exp(2) for value in column["exponents"])
    assert min(column["log"]) < 0.5 < 2 < max(column["log"])
    assert all(math.exp(-2) <= value <= 1 for value in column["inverse"])
    assert all(abs(value - 5) < 0.01 for value in column["normal"])
    assert all(abs(value - 1) < 0.01 for value in column["log_normal"])
    assert all(0 < value < 1 for value in column["beta"])
    assert all(value % 5 == 0 for value in column["round"])
    assert set(column["weighted"]) == {"b"}
    assert [1, 2] in column["lists"]
    assert set(column["deep.er"]) == {7}
    assert len(grid_points([p for p in read_parameters(given) if p.key in ("whole", "step")])) == 15


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"min": 2.0, "max": 1.0}, "Expected `x` to have `min` <= `max`, but got 2.0 and 1.0"),
        ({"distribution": "log_uniform_values", "min": 0, "max": 1}, "both above 0, but got 0 and 1"),
        (
            {"values": [1, 2], "probabilities": [0.5, 0.1]},
            "Expected `x.probabilities` to be one per value with the sum 1",
        ),
        ({"distribution": "cauchy"}, "Expected `x.distribution` to be one of W&B's, but got 'cauchy'"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(spec: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_parameters({"x": spec})
    assert expected in str(caught.value)
