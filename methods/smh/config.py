"""Settings of Self-Mined Hardness."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from framework.errors import ConfigError
from framework.fields import (
    COUNT,
    COUNT_OR_ZERO,
    NOT_NEGATIVE,
    SHARE,
    Rule,
    check_instance,
    setting,
)
from framework.mining_settings import MiningSettings

__all__ = ["MAX_RATIO", "SMHConfig"]

MAX_RATIO = 16.0
"""Harmless rows for each harmful one; beyond it a run hardly sees a harmful row."""
RATIO = Rule(f"a number from 0 to {MAX_RATIO:g} (harmless rows for each harmful one)", lambda v: 0 <= v <= MAX_RATIO)
_PART = Rule("a share above 0 and up to 1", lambda value: 0 < value <= 1)


@dataclass(frozen=True)
class SMHConfig(MiningSettings):
    """Settings of Self-Mined Hardness, those of mining first."""

    UNDECISIVE: ClassVar[frozenset[str]] = frozenset({"store"})
    """Fields that never change a result: where rollouts are kept decides nothing."""

    mined: str | None = None
    """File that ``seawall mine`` wrote; null mines the model before training, or finds what was mined."""
    target: Literal["safe", "refusal"] = "safe"
    """What a harmful prompt is taught: safe, any coherent reply that is not harmful; refusal, one that refuses."""
    select: Literal["hard", "random", "top_share"] = "hard"
    """hard: highest harmful rate, hardest first; random: any that break sometimes; top_share: as hard, shuffled."""
    count: int | None = setting(None, rule=COUNT_OR_ZERO)
    """Harmful rows; null takes ``share``, 0 adds nothing."""
    share: float = setting(0.5, rule=_PART)
    """Share of the prompts that break sometimes, where ``count`` is null."""
    ratio: float = setting(1.0, rule=RATIO)
    """Harmless rows for each harmful one; 0 leaves them out. With ``balance`` controlled: to begin with."""
    other_rows: Literal["keep", "leave_out"] = "keep"
    """keep: the stage's other rows are spread evenly among these; leave_out: only mined rows are trained on."""

    balance: Literal["fixed", "controlled"] = "fixed"
    """fixed: one ratio throughout, as published; controlled: measured and adjusted between blocks of steps."""
    ratio_low: float = setting(0.25, rule=RATIO)
    """Lowest ratio that is set."""
    ratio_high: float = setting(4.0, rule=RATIO)
    """Highest ratio that is set."""
    block_steps: int = setting(20, rule=COUNT)
    """Optimizer steps between two measurements."""
    target_refusal: float = setting(0.95, rule=SHARE)
    """Share of harmful prompts that should be refused."""
    target_compliance: float = setting(0.9, rule=SHARE)
    """Share of harmless look-alikes that should be answered."""
    gain: float = setting(2.0, rule=NOT_NEGATIVE)
    """Change of the ratio's logarithm for each 1.0 that one side falls short of its target more than the other."""
    probe: Literal["replies", "margin"] = "replies"
    """replies: short replies are generated and read; margin: a prompt counts as refused where refusals are likelier
    openings than answers, which costs less and may not tell the two sides apart (a warning says so)."""
    probe_prompts: int = setting(20, rule=COUNT)
    """Prompts of each side that are looked at."""
    probe_tokens: int = setting(24, rule=COUNT)
    """Length of the replies, in tokens."""

    def __post_init__(self) -> None:
        """Check every field and what must hold between them.

        Raises:
            ConfigError: lists every problem.
        """
        check_instance(self)
        problems = list(self._between())
        if problems:
            raise ConfigError(problems)

    @property
    def mines(self) -> bool:
        """Whether the model is mined, and no file of mined prompts read."""
        return self.mined is None

    @property
    def needs_benign(self) -> bool:
        """Whether harmless rows are mixed in at all."""
        return self.ratio > 0 or self.balance == "controlled"

    def _between(self) -> Iterator[str]:
        if self.mined is None and self.count is not None and self.count > self.prompts:
            yield f"Expected `count` to be at most `prompts`, {self.prompts}, but got {self.count}. Raise `prompts`."
        if self.balance != "controlled":
            return
        if not 0 < self.ratio_low <= self.ratio <= self.ratio_high:
            yield (
                f"Expected 0 < `ratio_low` <= `ratio` <= `ratio_high`, but got {self.ratio_low!r}, {self.ratio!r} and "
                f"{self.ratio_high!r}. A controlled ratio begins within its bounds."
            )
