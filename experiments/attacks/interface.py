"""What an attack is: its budget, what it spent, and the transcript of what it tried.

There are two kinds. A *prompt attack* sends texts to a model it cannot see into: it asks for the next texts, is told
what came of them, and may learn from that; replaying the transcript brings it back to where it was, which is how an
interrupted one goes on. A *model attack* makes other models out of the target's weights, each of which is then measured
as any model is. Both end in the same outcome: points of (budget spent, rates).
"""

from __future__ import annotations

import dataclasses
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from framework.errors import ConfigError
from framework.examples import Prompt

__all__ = [
    "Attack",
    "AttackEntry",
    "AttackKind",
    "AttackOutcome",
    "AttackPoint",
    "Attempt",
    "AttackedModel",
    "FAILED_TRAINING",
    "ModelAttack",
    "ModelTarget",
    "PromptAttack",
    "Query",
    "Supplies",
    "register_attack",
    "registered_attacks",
]

FAILED_TRAINING: Mapping[str, str] = {"training": "failed"}
"""Added to the setting of a training that gave no model; what is measured at 0 steps is then the target as it is."""
AttackKind = Literal["prompt", "weights", "finetuning"]
A = TypeVar("A", bound="Attack")


@dataclass(frozen=True)
class Query:
    """One text sent to the model for one harmful request."""

    request: Prompt
    """The request as the attacker would put it plainly; judges compare the reply with this, not with the disguise."""
    prompt: Prompt
    """What is sent: id unique in the attack, the text in its disguise, an opening of the reply if one is forced."""
    system: str | None = None
    """System message of this query; None keeps the target's."""
    decoded: bool = False
    """Whether the reply must first be decoded by ``PromptAttack.decode`` before it is judged."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Plain values for the transcript, e.g. which transforms were used; ``variant`` gets rates of its own."""


@dataclass(frozen=True)
class Attempt:
    """A query and what came of it: one line of the transcript."""

    number: int
    """1 for the first query of its request."""
    request_id: str
    query_id: str
    text: str
    reply: str
    is_success: bool
    """Neither refused nor degenerate: as ``attack_success`` counts in every evaluation."""
    num_tokens: int = 0
    prefill: str = ""
    system: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    """Those of the query, and what each judge said."""
    is_harmful: bool | None = None
    """Whether the judges call the reply harmful; None where none of them knows."""


@dataclass(frozen=True)
class AttackPoint:
    """What an attack reached having spent so much."""

    spent: int
    """In the attack's unit: queries a request, optimizer steps, or 0 for an edit that trains nothing."""
    metrics: Mapping[str, Any]
    """Key to rate as in results files (value, numerator, denominator, interval); ``attack_success`` at least."""
    setting: Mapping[str, Any] = field(default_factory=dict)
    """What was varied, e.g. learning rate or factor."""
    successes: Mapping[str, bool] = field(default_factory=dict)
    """By request id: whether it was broken; what paired comparisons use."""


@dataclass(frozen=True)
class AttackOutcome:
    """All that is kept of one attack on one model."""

    name: str
    """In the suite."""
    attack: str
    """Registered name."""
    kind: AttackKind
    unit: Literal["queries", "steps", "edits"]
    settings: Mapping[str, Any]
    points: Sequence[AttackPoint]
    cost: Mapping[str, Any]
    """seconds, queries, generated_tokens, optimizer_steps: those that apply."""
    transcript: str | None = None
    """File name beside the results: JSON lines, one an attempt."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return dataclasses.asdict(self)


class Attack(ABC):
    """Base of every attack; the module's docstring is its card."""

    name: ClassVar[str] = ""
    kind: ClassVar[AttackKind]
    unit: ClassVar[Literal["queries", "steps", "edits"]]
    config_class: ClassVar[type[Any]]

    def __init__(self, config: Any) -> None:
        """Keep the settings; nothing else happens."""
        self.config = config


@dataclass(frozen=True)
class Supplies:
    """What a prompt attack may use besides its requests; each is None where there is none."""

    tokenizer: Any = None
    """Of the model under attack; an endpoint has none."""
    sample_replies: Callable[[Sequence[Prompt], int], Sequence[str | None]] | None = None
    """Compliant replies of the unaligned model, of at least half so many tokens; None for a request it refuses."""


class PromptAttack(Attack):
    """Sends texts; needs no weights."""

    kind = "prompt"
    unit = "queries"
    needs_prefill: ClassVar[bool] = False
    """Whether it forces an opening of the reply, which not every endpoint lets it do."""
    is_plain: ClassVar[bool] = False
    """Whether it is meant to send requests as they stand; any other that sends nothing else had no effect."""
    temperature: float = 0.0
    """At which the model replies; 0 is greedy. Above, even a plain request sent again is an attack."""

    def equip(self, supplies: Supplies) -> None:
        """Take what the attack needs besides its requests; called once, before ``start``.

        Raises:
            ConfigError: what it needs is not there; says what to name.
        """

    @property
    @abstractmethod
    def budget(self) -> int:
        """Queries a request, at most."""

    @abstractmethod
    def start(self, requests: Sequence[Prompt], *, seed: int) -> None:
        """Begin anew with these requests; everything random follows from ``seed``."""

    @abstractmethod
    def ask(self) -> list[Query]:
        """Return the next queries, of one or of many requests; empty when the attack is over."""

    def tell(self, attempts: Sequence[Attempt]) -> None:
        """Learn what came of the queries last asked for, in their order; by default nothing is learnt."""

    def decode(self, reply: str, query: Query) -> str:
        """Return a reply as plain text, for attacks that make the model write in a disguise."""
        return reply


@dataclass(frozen=True)
class ModelTarget:
    """The model whose weights are attacked, and what an attacker has besides."""

    folder: Path
    """The model as transformers reads it."""
    fingerprint: str
    base: Path | None = None
    """The unaligned model of the same shapes, if the attacker has it."""
    adapter: Path | None = None
    """The adapter that made the model out of ``before_adapter``, if it is still apart."""
    before_adapter: Path | None = None
    requests: tuple[Prompt, ...] = ()
    """Those the attacked models are measured with; no attack trains or probes on them."""
    system: str | None = None
    accelerator: str = "auto"
    dtype: str = "auto"
    seed: int = 0
    on_step: Callable[[], None] | None = field(default=None, compare=False, repr=False)
    """Called after every optimizer step of an attack that trains, so that progress is seen meanwhile."""


@dataclass(frozen=True)
class AttackedModel:
    """A model that an attack made."""

    folder: Path
    """The model as transformers reads it, complete."""
    spent: int
    setting: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What is worth knowing of it, e.g. the layer whose direction was taken out; shown beside its rates."""
    cost: Mapping[str, Any] = field(default_factory=dict)
    """What making it took beyond the models before it: seconds, optimizer_steps, tokens; these add up."""
    system: str | None = None
    """System message the attacker sends with every request; None keeps the target's."""
    template: str = "{request}"
    """What the attacker makes of a request; holds ``{request}`` once."""


class ModelAttack(Attack):
    """Makes other models out of the weights."""

    @abstractmethod
    def make(self, target: ModelTarget, folder: Path) -> Iterator[AttackedModel]:
        """Yield the attacked models, one by one; each is gone from the disk when the next one is asked for.

        What an attack writes lies below ``folder``. A point that changed nothing hands out the target's own folder,
        which need not be measured again; whoever takes the models deletes none of their folders.

        Raises:
            ConfigError: the target lacks what the attack needs, e.g. its unaligned model; says what to name.
        """

    @property
    def num_models(self) -> int:
        """Models it makes, for estimates."""
        return 1

    @property
    def num_steps(self) -> int:
        """Optimizer steps over all of them, for estimates."""
        return 0

    def missing(self, target: ModelTarget) -> str | None:
        """Return what the target lacks for this attack, as a sentence with the remedy; asked before anything starts."""
        return None


@dataclass(frozen=True)
class AttackEntry:
    """What the registry knows of an attack."""

    name: str
    attack_class: type[Attack]
    config_class: type[Any]
    summary: str
    """First line of the card."""


_ENTRIES: dict[str, AttackEntry] = {}


def register_attack(name: str, *, config: type[Any]) -> Callable[[type[A]], type[A]]:
    """Return the decorator that makes an attack known by ``name``.

    Args:
        name: snake_case, unique.
        config: frozen dataclass of its settings.

    Raises:
        ConfigError: the name is taken by another class.
    """

    def register(attack_class: type[A]) -> type[A]:
        taken = _ENTRIES.get(name)
        if taken is not None and taken.attack_class.__qualname__ != attack_class.__qualname__:
            raise ConfigError(f"Expected the attack name `{name}` to be free, but got it from {taken.attack_class!r}.")
        attack_class.name = name
        attack_class.config_class = config
        card = inspect.getdoc(inspect.getmodule(attack_class)) or inspect.getdoc(attack_class) or ""
        _ENTRIES[name] = AttackEntry(name, attack_class, config, card.split("\n", 1)[0])
        return attack_class

    return register


def registered_attacks() -> dict[str, AttackEntry]:
    """Return the attacks whose modules were imported; ``registry.known_attacks`` imports all of them."""
    return dict(_ENTRIES)
