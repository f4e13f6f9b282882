"""Settings of mining: which prompts, how many rollouts, who judges, and when a prompt has been sampled enough."""

# ruff: noqa: RUF009 - `setting` is dataclasses.field with a rule, which ruff does not know.

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from framework.fields import COUNT, COUNT_OR_ZERO, NOT_EMPTY, POSITIVE, SHARE, Rule, check_instance, setting

__all__ = ["MiningSettings"]

_AT_LEAST_TWO = Rule("a whole number ≥ 2", lambda value: value >= 2)
_INNER = Rule("a share above 0 and below 1", lambda value: 0 < value < 1)


@dataclass(frozen=True)
class MiningSettings:
    """How prompts are mined; a method that mines derives its settings from these."""

    harmful: list[str] = setting(factory=lambda: ["embedded"], rule=NOT_EMPTY)
    """Sets of harmful requests: ``embedded`` (those of the align split), ``embedded_more``, ``embedded_poison``, other
    sets or files."""
    prompts: int = setting(240, rule=COUNT)
    """Harmful prompts mined, over all sets, each a request in a jailbreak template."""
    wrapped: float = setting(1.0, rule=SHARE)
    """Share of the harmful prompts that stand in a template; the others are the bare requests."""
    templates: list[str] = setting(factory=lambda: ["embedded"], rule=NOT_EMPTY)
    """Jailbreak templates, of both sides: ``embedded`` (8), ``embedded_more`` (24) or files; none is ever measured."""
    rollouts: int = setting(16, rule=_AT_LEAST_TWO)
    """Rollouts of a harmful prompt; the most of them with ``adaptive``."""
    adaptive: bool = False
    """Stop sampling a harmful prompt once it is clear what fixed ``rollouts`` would make of it."""
    hard_rate: float = setting(0.25, rule=_INNER)
    """Harmful rate from which a prompt counts as hard; decides when ``adaptive`` may stop."""
    benign: list[str] = setting(factory=lambda: ["embedded_more", "embedded"], rule=NOT_EMPTY)
    """Sets of harmless requests: ``embedded``, ``embedded_look_alikes``, ``embedded_more``, other sets or files."""
    benign_prompts: int = setting(240, rule=COUNT)
    """Harmless prompts sampled, over all sets."""
    benign_wrapped: float = setting(0.5, rule=SHARE)
    """Share of the harmless prompts that stand in a jailbreak template."""
    benign_rollouts: int = setting(4, rule=COUNT)
    """Rollouts of a harmless prompt."""
    max_new_tokens: int = setting(64, rule=COUNT)
    """Longest rollout, in tokens."""
    temperature: float = setting(1.0, rule=POSITIVE)
    """Divides the logits of the rollouts."""
    judges: list[str] = setting(factory=lambda: ["rules", "harm"], rule=NOT_EMPTY)
    """Judges of the rollouts, by registered name; the majority counts."""
    rows: int = setting(32, rule=COUNT)
    """Rollouts decoded together."""
    mining_seed: int = setting(0, rule=COUNT_OR_ZERO)
    """Decides prompts, templates and rollouts; apart from the run's seed, so that seeds of a study share rollouts."""
    store: str | None = None
    """Folder of the rollout files; null keeps them in the cache."""

    def __post_init__(self) -> None:
        """Raise ConfigError listing every field that has the wrong type or breaks its rule."""
        check_instance(self)

    @property
    def mines(self) -> bool:
        """Whether the model is mined; a method that can read what was mined before says otherwise."""
        return True

    @property
    def needs_benign(self) -> bool:
        """Whether harmless prompts are mined as well."""
        return True

    @classmethod
    def of(cls, config: Any) -> MiningSettings:
        """Return the mining settings among the fields of ``config``, e.g. of a method's settings."""
        return cls(**{field.name: getattr(config, field.name) for field in fields(cls)})
