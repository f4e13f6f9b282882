from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from framework.config import load_evaluate_config, load_run_config, method_settings
from framework.errors import ConfigError
from framework.registry import validate_methods
from framework.shorthands import (
    escape,
    find_hidden,
    inherit_adapter,
    nested,
    spell_out,
    spell_out_methods,
    tidy,
)
from framework.study import load_study_config


def test_a_layer_unsets_the_schedule_it_does_not_choose() -> None:
    layer = spell_out({"max_epochs": 1, "stages": {"align": {"max_steps": 5}, "repair": None}})
    assert layer == {
        "max_epochs": 1,
        "max_steps": None,
        "stages": {"align": {"max_steps": 5, "max_epochs": None}, "repair": None},
    }


def test_the_given_values_are_not_changed() -> None:
    given = {"model": "x", "stages": {"align": {"max_steps": 5}}}
    spell_out(given)
    assert given == {"model": "x", "stages": {"align": {"max_steps": 5}}}


def test_yaml_habits_are_undone_and_wrong_types_left_for_the_check() -> None:
    assert tidy({"tracking": {"wandb": False}, "adapter": {"targets": "q"}})["tracking"] == {"wandb": "off"}
    assert tidy({"stages": {"align": {"methods": None}}}) == {"stages": {"align": {"methods": {}}}}
    assert tidy({"tracking": 5, "adapter": "x", "stages": [1]}) == {"tracking": 5, "adapter": "x", "stages": [1]}


def test_a_stage_inherits_the_shared_adapter() -> None:
    values = {"adapter": {"rank": 4, "alpha": 1}, "stages": {"align": {"adapter": {"rank": 2}}, "repair": {}}}
    assert inherit_adapter(values)["stages"] == {"align": {"adapter": {"rank": 2, "alpha": 1}}, "repair": {}}


def test_a_key_is_hidden_only_when_every_stage_sets_it() -> None:
    own = {"learning_rate": 1, "adapter": {"rank": 2}, "max_epochs": 2}
    assert find_hidden("learning_rate", {"stages": {"align": own, "repair": None}}) is not None
    assert find_hidden("adapter.rank", {"stages": {"align": own}}) is not None
    assert find_hidden("max_steps", {"stages": {"align": own}}) is not None
    assert find_hidden("adapter.alpha", {"stages": {"align": own}}) is None
    assert find_hidden("learning_rate", {"stages": {"align": own, "finetune": {}}}) is None
    assert find_hidden("learning_rate", {}) is None
    assert find_hidden("seed", {"stages": {"align": own}}) is None


def test_nested_and_escape() -> None:
    assert nested({"a": {"b": {"c": 1}}}, "a", "b") == {"c": 1}
    assert nested({"a": 5}, "a", "b") == {}
    assert escape({"a": ["${x}", 1]}) == {"a": ["\\${x}", 1]}


# ---- method=NAME -------------------------------------------------------------------------------------------------

RECIPE = {"stages": {"finetune": {"methods": {"old": {}}}}}
PATH = "stages.finetune.methods"


def spelt(*overrides: tuple[str, Any], values: dict[str, Any] = RECIPE) -> list[tuple[str, Any]]:
    return spell_out_methods(overrides, values, read=lambda name: {name: {"from": "file"}})


@pytest.mark.parametrize(
    "overrides",
    [
        [("method", "a, b")],
        [("method", ["a", "b"])],
        [("method", "a"), ("seed", 1), ("method", "b")],
        [("method", ["a"]), ("method", "b")],
    ],
)
def test_methods_are_named_by_a_list_or_one_by_one(overrides: list[tuple[str, Any]]) -> None:
    first, *rest = spelt(*overrides)
    assert first == (PATH, {"a": {"from": "file"}, "b": {"from": "file"}})
    assert list(first[1]) == ["a", "b"]
    assert rest == [pair for pair in overrides if pair[0] == "seed"]


def test_other_settings_of_a_method_come_after_it_wherever_they_stand() -> None:
    assert spelt(("methods.a.weight", 2), ("method", "a"), (f"{PATH}.a.base", "x")) == [
        (PATH, {"a": {"from": "file"}}),
        (f"{PATH}.a.weight", 2),
        (f"{PATH}.a.base", "x"),
    ]
    assert spelt(("methods", {}), ("seed", 1)) == [(PATH, {}), ("seed", 1)]
    assert spelt(("methodsx", 1), ("model", "x")) == [("methodsx", 1), ("model", "x")]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            [("method", 5)],
            "Expected `method` to be a method's name or a list of names, but got 5. Write methods={} for",
        ),
        ([("method", None)], "but got None"),
        ([("method", [])], r"but got \[\]"),
        ([("method", "a,,b")], "but got 'a,,b'"),
        ([("method", ["a", 2])], r"but got \['a', 2\]"),
        ([("method", ["a", "b"]), ("method", "a")], "to name every method once, but got 'a' more than once"),
        ([("method", "a"), ("methods", {})], "Expected either `method` or `stages.finetune.methods` to be given, but"),
        ([("stages.finetune", {}), ("method", "a")], "either `method` or `stages.finetune` to be given, but got both"),
        ([("method", "a"), ("stages", {})], "either `method` or `stages` to be given, but got both"),
    ],
)
def test_a_method_that_cannot_be_put_in_is_refused(overrides: list[tuple[str, Any]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        spelt(*overrides)


@pytest.mark.parametrize("values", [{}, {"stages": {"finetune": None}}, {"stages": {"align": {}}}])
def test_a_recipe_without_finetune_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="Expected the recipe to have a `finetune` stage for `method` to fill"):
        spelt(("method", "a"), values=values)


@pytest.mark.parametrize("key", ["methods.b.weight", f"{PATH}.b.weight", "methods.b"])
def test_a_setting_of_a_method_that_is_not_named_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=r"`methods\.b.*` to set a method that `method` names, but got a\. .*a,b"):
        spelt(("method", "a"), (key, 1))
    assert spelt(("method", "a,b"), (key, 1))[1] == (f"{PATH}{key.removeprefix(PATH).removeprefix('methods')}", 1)


def methods_of(*overrides: str) -> dict[str, dict[str, Any]]:
    config = load_run_config("quickstart", overrides, validate_methods=validate_methods)
    assert config.stages.finetune is not None
    return config.stages.finetune.methods


def test_a_run_takes_the_default_settings_and_what_is_overridden() -> None:
    assert methods_of("method=asft") == method_settings("asft") == {"asft": {}}
    assert list(methods_of("method=asft,safety_mix")) == ["asft", "safety_mix"]
    assert list(methods_of("method=safety_mix", "method=asft")) == ["safety_mix", "asft"]
    assert methods_of("methods.asft.weight=0.5", "method=asft") == {"asft": {"weight": 0.5}}
    assert methods_of("method=asft", "stages.finetune.methods.asft.include_scale=false") == {
        "asft": {"include_scale": False}
    }
    assert methods_of("methods.safety_mix.count=3") == {"safety_mix": {"count": 3}}


def test_a_name_that_is_unknown_is_refused_with_the_nearest() -> None:
    with pytest.raises(
        ConfigError, match=r"Expected `method` to be one of asft, .*but got 'asfd'\. Did you mean 'asft'"
    ):
        methods_of("method=asfd")
    with pytest.raises(ConfigError, match=r"but got '\.\./recipe/quickstart'"):
        methods_of("method=../recipe/quickstart")


def test_a_settings_file_of_another_method_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("framework.config.CONFIG_FOLDER", tmp_path)
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "asft.yaml").write_text("weight: 1.0\n")
    with pytest.raises(ConfigError, match=r"to hold the one entry `asft: \{\.\.\.\}`, but got \{'weight': 1\.0\}"):
        method_settings("asft")
    assert method_settings("other") == {"other": {}}


def test_studies_and_evaluations_say_where_methods_belong() -> None:
    with pytest.raises(ConfigError, match=r"Expected `method` to be given to `seawall run`.*grid\.methods\.LABEL="):
        load_study_config("quickstart", ["method=asft"])
    with pytest.raises(ConfigError, match="Expected `method` to be given to `seawall run`"):
        load_evaluate_config("some/model", ["method=asft"])
