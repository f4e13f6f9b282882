# ruff: noqa: RUF009 - `setting` is dataclasses.field with a rule, which ruff does not know.

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pytest

from framework.errors import ConfigError
from framework.fields import COUNT, NOT_EMPTY, SHARE, build_instance, check_instance, check_mapping, setting


@dataclass(frozen=True)
class Inner:
    share: float = setting(0.5, rule=SHARE)
    mode: Literal["fast", "slow"] = "fast"


@dataclass(frozen=True)
class Outer:
    name: str = setting(rule=NOT_EMPTY)
    count: int | None = setting(None, rule=COUNT)
    flag: bool = False
    inner: Inner = setting(factory=Inner)
    maybe: Inner | None = None
    names: list[str] = setting(factory=list, rule=NOT_EMPTY)
    options: dict[str, dict[str, Any]] = setting(factory=dict)


def texts(raw: Any) -> list[str]:
    return [problem.text for problem in check_mapping(Outer, raw)]


def test_correct_values_have_no_problem() -> None:
    raw = {"name": "a", "count": None, "inner": {"share": 1}, "maybe": None, "names": ["x"], "options": {"m": {"k": 1}}}
    assert texts(raw) == []


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({}, "Expected `name` to be given, but it is missing."),
        ({"name": ""}, "Expected `name` to be a text that is not empty, but got ''."),
        ({"name": 5}, "Expected `name` to be a text that is not empty, but got 5. Put it in quotes"),
        ({"name": "a", "count": 0}, "Expected `count` to be a whole number ≥ 1 or null, but got 0."),
        ({"name": "a", "count": 2.0}, "Expected `count` to be a whole number ≥ 1 or null, but got 2.0."),
        ({"name": "a", "count": True}, "Expected `count` to be a whole number ≥ 1 or null, but got True."),
        ({"name": "a", "flag": "yes"}, "Expected `flag` to be true or false, but got 'yes'."),
        ({"name": "a", "flag": 1}, "Expected `flag` to be true or false, but got 1."),
        ({"name": "a", "inner": 3}, "Expected `inner` to be a mapping of keys to values, but got 3."),
        ({"name": "a", "inner": {"share": 1.5}}, "Expected `inner.share` to be a share between 0 and 1, but got 1.5."),
        ({"name": "a", "inner": {"share": float("nan")}}, "Expected `inner.share` to be a share between 0 and 1"),
        ({"name": "a", "inner": {"mode": "fsat"}}, "to be one of fast, slow, but got 'fsat'. Did you mean 'fast'?"),
        ({"name": "a", "names": "x"}, "Expected `names` to be a list, each item a text, but got 'x'. Write [x]."),
        ({"name": "a", "names": [1]}, r"Expected `names[0]` to be a text, but got 1."),
        ({"name": "a", "names": []}, "Expected `names` to be not empty, but got []."),
        (
            {"name": "a", "options": {"m": None}},
            "Expected `options.m` to be a mapping of names to values, but got None.",
        ),
        ({"name": "a", "options": {1: {}}}, "Expected `options` to be a mapping of names to values"),
    ],
)
def test_every_kind_of_problem_is_named(raw: dict[str, Any], expected: str) -> None:
    (text,) = texts(raw)
    assert expected in text


def test_all_problems_are_returned_at_once_at_every_level() -> None:
    raw = {"nam": "a", "inner": {"shar": 1, "mode": 2}, "maybe": {"shar": 1}, "count": -1}
    found = texts(raw)
    assert len(found) == 6
    assert "Expected the configuration to hold known keys only, but got 'nam'. Did you mean `name`?" in found
    assert "Expected `inner` to hold known keys only, but got 'shar'. Did you mean `share`?" in found
    assert "Expected `maybe` to hold known keys only, but got 'shar'. Did you mean `share`?" in found


def test_a_key_at_the_wrong_level_is_shown_its_places() -> None:
    (text,) = texts({"name": "a", "share": 0.1})
    assert text.endswith("Did you mean `inner.share` or `maybe.share`?")


def test_a_key_like_no_other_lists_the_known_ones() -> None:
    (text,) = texts({"name": "a", "qqq": 0.1})
    assert text.endswith("Known keys: name, count, flag, inner, maybe, names, options.")


def test_an_instance_is_held_to_the_same_rules() -> None:
    check_instance(Outer(name="a", names=["x"]))
    with pytest.raises(ConfigError, match="`share` to be a share between 0 and 1, but got 2") as caught:
        check_instance(Inner(share=2, mode="x"))  # type: ignore[arg-type]
    assert len(caught.value.problems) == 2


def test_values_become_an_instance() -> None:
    values = {"name": "a", "inner": {"share": 1}, "maybe": None, "names": ["x"], "options": {"m": {"k": [1]}}}
    built = build_instance(Outer, values)
    assert built == Outer(name="a", inner=Inner(share=1.0), names=["x"], options={"m": {"k": [1]}})
    assert isinstance(built.inner.share, float)
    assert built.options["m"] is not values["options"]["m"]  # type: ignore[index]
    assert built.inner is not values["inner"]
