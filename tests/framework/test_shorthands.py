from __future__ import annotations

from framework.shorthands import escape, find_hidden, inherit_adapter, nested, spell_out, tidy


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
