"""Errors a user can meet, each with the exit code the command line leaves with.

House form: *Expected `x` to be <rule>, but got <value>.* plus one sentence of remedy. Exit codes: 0 done, 2 the
user's input was wrong, 1 anything else.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

__all__ = [
    "ConfigError",
    "DataError",
    "HeldError",
    "ModelError",
    "NoEffectError",
    "SeawallError",
    "StorageError",
    "TrainingError",
    "WiringError",
    "describe_unknown",
]


class SeawallError(Exception):
    """Base of every error raised on purpose."""

    exit_code = 1


class ConfigError(SeawallError, ValueError):
    """Invalid settings; carries every problem found, so that a user repairs them in one go."""

    exit_code = 2

    def __init__(self, problems: str | Sequence[str]) -> None:
        """Join ``problems`` into one message, one line each."""
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class HeldError(ConfigError):
    """A folder that another command works in; it is free again when that one has ended."""


class DataError(SeawallError, ValueError):
    """A data file or row that cannot be used; names the file and line."""

    exit_code = 2


class ModelError(SeawallError, ValueError):
    """A model that cannot be found, read or used (missing file, checksum, no chat template)."""

    exit_code = 2


class WiringError(SeawallError, RuntimeError):
    """A method on an unsuitable module, strategy or model: what was needed, what was found, how to fix it."""

    exit_code = 2


class NoEffectError(SeawallError, RuntimeError):
    """A method that was switched on did nothing."""


class TrainingError(SeawallError, RuntimeError):
    """Training that cannot go on, for example because the loss is not a number."""


class StorageError(SeawallError, OSError):
    """A folder that cannot be written or a disk that is full."""


def describe_unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """Return the sentence for an unknown name, with the nearest known one first.

    Args:
        kind: what the name stands for, e.g. ``"method"``.
        name: the name that was given.
        known: every name that would have been accepted.

    Returns:
        One sentence plus the remedy.

    Example:
        >>> describe_unknown("method", "asfd", ["asft", "none"])
        "Expected `method` to be one of asft, none, but got 'asfd'. Did you mean 'asft'?"
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"Expected `{kind}` to be one of {', '.join(names)}, but got {name!r}.{hint}"
