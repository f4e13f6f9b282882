"""Sweep files that are wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.sweep_files import load_sweep
from framework.errors import ConfigError
from tests.experiments.test_sweep import WEIGHTS, write


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (WEIGHTS.replace("method: bayes", "method: bayesian"), "`method` to follow W&B's schema, but got: 'bayesian'"),
        (WEIGHTS.replace("run_cap: 7", "run_cup: 7"), "'run_cup' was unexpected"),
        (WEIGHTS.replace("{value: 3}", "{walue: 3}"), "`parameters.seed` to be a parameter as W&B describes them"),
        (
            WEIGHTS.replace("run, quickstart", "train, it"),
            "Expected `command` of mine.yaml to hold `seawall run RECIPE`",
        ),
        (WEIGHTS.replace("metric:", "description: x\n#"), "Expected mine.yaml to name a `metric`, but it has none"),
        ("method: grid\nmetric: {name: x}\n", "Expected mine.yaml to have `parameters`, but it has none"),
        (WEIGHTS.replace("{values: [asft, l2_to_start]}", "{min: 0, max: 1.5}"), "Expected `method` to have `values`"),
        ("a: [", "to be YAML, but got"),
        ("- a", "to hold a W&B sweep, but got list"),
    ],
)
def test_sweep_files_that_are_wrong_are_refused(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_sweep(write(tmp_path, text))
    assert expected in str(caught.value)
