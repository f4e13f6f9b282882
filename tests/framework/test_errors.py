from __future__ import annotations

import pytest

from framework import errors
from framework.errors import ConfigError, SeawallError, StorageError, describe_unknown


def test_a_config_error_carries_every_problem():
    error = ConfigError(["first", "second"])
    assert error.problems == ["first", "second"]
    assert str(error) == "first\nsecond"
    assert ConfigError("only").problems == ["only"]


@pytest.mark.parametrize(
    ("name", "builtin", "code"),
    [
        ("ConfigError", ValueError, 2),
        ("DataError", ValueError, 2),
        ("ModelError", ValueError, 2),
        ("WiringError", RuntimeError, 2),
        ("NoEffectError", RuntimeError, 1),
        ("TrainingError", RuntimeError, 1),
        ("StorageError", OSError, 1),
    ],
)
def test_exit_codes_and_builtin_parents(name, builtin, code):
    kind = getattr(errors, name)
    assert issubclass(kind, SeawallError)
    assert issubclass(kind, builtin)
    assert kind.exit_code == code


def test_a_storage_error_shows_its_message():
    assert str(StorageError("Expected `x` to be writable.")) == "Expected `x` to be writable."


def test_the_nearest_known_name_is_suggested():
    text = describe_unknown("method", "saftey_mix", ["safety_mix", "asft"])
    assert text == ("Expected `method` to be one of asft, safety_mix, but got 'saftey_mix'. Did you mean 'safety_mix'?")


def test_nothing_is_suggested_when_nothing_is_near():
    assert "Did you mean" not in describe_unknown("method", "zzzz", ["asft"])
