from __future__ import annotations

import dataclasses

import pytest

from framework.errors import ConfigError
from framework.schema import (
    AdapterConfig,
    DataConfig,
    RunConfig,
    StageConfig,
    StagesConfig,
    TrackingConfig,
    TrainingConfig,
)


def test_a_configuration_made_in_python_is_checked_too() -> None:
    with pytest.raises(ConfigError, match=r"Expected `harmful_share` to be a share between 0 and 1, but got -0\.1"):
        DataConfig(harmful_share=-0.1)
    with pytest.raises(
        ConfigError, match=r"Expected `dropout` to be a share between 0 and 1, 1 left out, but got 1\.0"
    ):
        AdapterConfig(dropout=1.0)
    with pytest.raises(ConfigError, match="`wandb` to be one of offline, online, off, but got 'ofline'"):
        TrackingConfig(wandb="ofline")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"Expected `name` to be a folder name .* but got '/abs'"):
        RunConfig(name="/abs")


def test_configurations_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunConfig(name="a").seed = 2  # type: ignore[misc]


def test_a_stage_takes_the_runs_settings_and_replaces_some() -> None:
    stages = StagesConfig(finetune=StageConfig(learning_rate=1e-4, adapter=AdapterConfig(kind="full")))
    config = RunConfig(name="a", batch_size=4, gradient_clip=None, stages=stages)
    training = config.training("finetune")
    assert training == TrainingConfig(
        learning_rate=1e-4, batch_size=4, gradient_clip=None, adapter=AdapterConfig(kind="full")
    )


@pytest.mark.parametrize(("steps", "expected"), [(0, False), (1, True), (None, True)])
def test_zero_steps_mean_no_training(steps: int | None, expected: bool) -> None:
    assert TrainingConfig(max_steps=steps).has_training is expected


def test_the_last_stage_that_names_a_task_decides() -> None:
    def stage(task: str | None) -> StageConfig:
        return StageConfig(data=DataConfig(task=task))

    assert RunConfig(name="a").task() is None
    both = StagesConfig(align=stage("x"), finetune=stage("y"), repair=stage(None))
    found = RunConfig(name="a", stages=both).task()
    assert found is not None
    assert found[0] == "y"
    assert [name for name, _ in RunConfig(name="a", stages=both).active_stages()] == ["align", "finetune", "repair"]
