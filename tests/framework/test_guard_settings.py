from __future__ import annotations

import pytest

from framework.config import load_evaluate_config, load_run_config
from framework.errors import ConfigError
from framework.guard_settings import GuardSettings

RECIPE = """
stages:
  align: {data: {safety: embedded}, max_steps: 2}
  finetune: {data: {task: triage, task_count: 8}, methods: {l2_to_start: {}}, max_steps: 2}
  repair: {methods: {wise_ft: {}}, max_steps: 0}
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "guarded.yaml"
    path.write_text(RECIPE)
    return path


def problems(recipe, *overrides):
    with pytest.raises(ConfigError) as caught:
        load_run_config(recipe, overrides)
    return caught.value.problems


def test_without_a_section_there_is_no_guard(recipe):
    assert load_run_config(recipe).trainer.guard is None


def test_a_guard_is_read_from_the_command_line(recipe):
    given = ["trainer.guard.min_refusal_margin=0.5", "trainer.guard.max_kl=1", "trainer.guard.stages=[align]"]
    guard = load_run_config(recipe, given).trainer.guard
    assert [(t.metric, t.bound, t.is_lower) for t in guard.thresholds] == [
        ("refusal_margin", 0.5, True),
        ("kl_to_start", 1.0, False),
    ]
    assert (guard.action, guard.acts, guard.guards("align"), guard.guards("finetune")) == ("stop", True, True, False)
    watched = load_run_config(recipe, ["trainer.guard={action: watch}"]).trainer.guard
    assert (watched.acts, watched.thresholds) == (False, ())


def test_every_field_is_checked_at_once(recipe):
    wrong = {"every_n_steps": 0, "action": "halt", "min_direction_cosine": 2, "rate_factor": 0, "prompts": 3}
    found = problems(recipe, *[f"trainer.guard.{name}={value}" for name, value in wrong.items()])
    assert "Expected `trainer.guard.every_n_steps` to be a whole number ≥ 1, but got 0." in found
    assert "Expected `trainer.guard.min_direction_cosine` to be a number between -1 and 1 or null, but got 2." in found
    assert "Expected `trainer.guard.rate_factor` to be a number above 0 and at most 1, but got 0." in found
    assert sum("trainer.guard" in text for text in found) >= 5


def test_what_must_hold_between_the_guard_and_the_run(recipe):
    found = problems(recipe, "trainer.guard.stages=[finetune, repair]", "trainer.guard.method=ewc")
    assert any("to set a threshold, but got none for the action 'stop'" in text for text in found)
    assert any("stages of this run that train (align, finetune), but got 'repair'" in text for text in found)
    assert any("`trainer.guard.method` to be left out unless the action is raise_weight" in text for text in found)


@pytest.mark.parametrize(
    ("action", "name", "value"),
    [
        ("stop", "after_roll_back", "go_on"),
        ("watch", "max_roll_backs", 9),
        ("raise_weight", "rate_factor", 0.1),
        ("roll_back", "max_weight", 3.0),
        ("stop", "weight_step", 2.0),
        ("roll_back", "min_weight", 1.0),
    ],
)
def test_a_setting_of_another_action_is_refused(recipe, action, name, value):
    found = problems(
        recipe, f"trainer.guard.action={action}", "trainer.guard.max_kl=1", f"trainer.guard.{name}={value}"
    )
    wanted = "roll_back" if "roll" in name or name == "rate_factor" else "raise_weight"
    text = f"Expected `trainer.guard.{name}` to be left out unless the action is {wanted}, but got {value!r} with"
    assert any(text in one for one in found)


def test_a_raised_weight_needs_a_method_of_the_stage(recipe):
    raising = ["trainer.guard.action=raise_weight", "trainer.guard.max_kl=1"]
    assert any("to name the method whose weight is raised, but got None" in text for text in problems(recipe, *raising))
    other = problems(recipe, *raising, "trainer.guard.method=ewc", "trainer.guard.min_weight=20")
    assert any("but got 'ewc', and `finetune` has ['l2_to_start']" in text for text in other)
    assert any("`trainer.guard.min_weight` to be at most `max_weight` (10), but got 20" in text for text in other)
    assert load_run_config(recipe, [*raising, "trainer.guard.method=l2_to_start"]).trainer.guard.method


def test_an_evaluation_has_nothing_to_guard():
    with pytest.raises(ConfigError, match=r"`trainer\.guard` to be null where nothing is trained, but got settings"):
        load_evaluate_config("model", ["trainer.guard.max_kl=1"])


def test_settings_made_in_python_are_checked_too():
    with pytest.raises(ConfigError, match="Expected `max_kl` to be a number ≥ 0 or null, but got -1"):
        GuardSettings(max_kl=-1.0)
