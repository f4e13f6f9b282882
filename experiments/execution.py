"""How the runs of a study are carried out; light, for the command line reads it before anything is imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from framework.errors import ConfigError

__all__ = ["Execution"]


@dataclass(frozen=True)
class Execution:
    """How the runs of a study are carried out; nothing here changes a number."""

    workers: int = 1
    """Runs at once."""
    executor: str = "local"
    """local, submitit-local or slurm."""
    job: Mapping[str, Any] = field(default_factory=dict)
    """Parameters of submitit."""
    retry_failed: bool = False
    """Run again what failed before."""
    accept_changes: bool = False
    """Go on although the study's settings changed since it was started."""

    def __post_init__(self) -> None:
        """Raise ConfigError for fewer than one worker."""
        if self.workers < 1:
            raise ConfigError(f"Expected `workers` to be a whole number ≥ 1, but got {self.workers!r}.")

    @property
    def is_pooled(self) -> bool:
        """Whether the runs go on in other processes."""
        return self.workers > 1 or self.executor != "local"
