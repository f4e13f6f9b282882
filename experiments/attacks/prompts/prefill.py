"""Prefilling: the first tokens of a compliant reply are forced on the model, which goes on from there.

What it does: for each request a compliant reply is taken (sampled once from the unaligned model, read from a file, or
one fixed affirmative opening), its first k tokens open the model's reply, and what the model adds is judged.
Formula: reply = greedy continuation of (prompt, first k tokens of the compliant reply).
Reference: arXiv:2406.05946 (k = 5, 10, 20, 40).
Deviations: the replies are sampled by the model the target was made from, not written by another one. Where there is no
tokenizer at hand (an endpoint), a token is taken for three quarters of a word.
Cost: as many queries a request as there are numbers k: 4 by default. Sampling the replies comes once, on top.
Needs: the unaligned model (``target.base``) for sampled replies; a model whose reply can be opened.
"""

# ruff: noqa: RUF009 - `setting` is dataclasses.field with a rule, which ruff does not know.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from datamodules.readers import find_file, read_records
from experiments.attacks.interface import PromptAttack, Query, Supplies, register_attack
from experiments.compliant_replies import enough_replies
from experiments.prefill import OPENING, first_tokens
from framework.errors import ConfigError, DataError
from framework.examples import Prompt
from framework.fields import COUNT, NOT_EMPTY, check_instance, setting

__all__ = ["Prefill", "PrefillConfig"]

SHORTEST = 48
"""Tokens sampled at least; half of them must be there."""
WORDS_PER_TOKEN = 0.75


@dataclass(frozen=True)
class PrefillConfig:
    """How much is forced, and where it comes from."""

    tokens: list[int] = setting(factory=lambda: [5, 10, 20, 40], rule=COUNT)
    """First tokens of the reply that are forced; each number is a query of its own."""
    replies: str = setting("sampled", rule=NOT_EMPTY)
    """``sampled`` from the unaligned model, ``opening`` for one fixed affirmative opening, or a file of JSON lines with
    ``prompt`` and ``reply``."""

    def __post_init__(self) -> None:
        """Refuse fields that are wrong."""
        check_instance(self)


@register_attack("prefill", config=PrefillConfig)
class Prefill(PromptAttack):
    """Opens the reply with compliance."""

    needs_prefill = True
    config: PrefillConfig

    def __init__(self, config: PrefillConfig) -> None:
        """Keep the settings."""
        super().__init__(config)
        self._supplies = Supplies()
        self._rounds: list[list[Query]] = []

    @property
    def budget(self) -> int:
        """One query for each number of tokens."""
        return len(self.config.tokens)

    def equip(self, supplies: Supplies) -> None:
        """Take the tokenizer and whoever samples replies.

        Raises:
            ConfigError: replies are to be sampled, but there is no unaligned model.
        """
        if self.config.replies == "sampled" and supplies.sample_replies is None:
            raise ConfigError(
                "Expected `target.base` to name the unaligned model that samples compliant replies for the attack "
                "`prefill`, but got none. Name it, or write `replies: opening` for one fixed opening."
            )
        self._supplies = supplies

    def start(self, requests: Sequence[Prompt], *, seed: int) -> None:
        """Begin anew with these requests; those without a compliant reply are left out.

        Raises:
            DataError: fewer than half of the requests have a reply, or one is shorter than what is to be forced.
        """
        pairs = list(zip(requests, self._replies(requests), strict=True))
        self._rounds = [
            [_opened(request, self._first(reply, count), count) for request, reply in pairs if reply is not None]
            for count in self.config.tokens
        ]

    def ask(self) -> list[Query]:
        """Return the queries with the next number of tokens."""
        return self._rounds.pop(0) if self._rounds else []

    def _replies(self, requests: Sequence[Prompt]) -> Sequence[str | None]:
        if self.config.replies == "opening":
            return [OPENING] * len(requests)
        if self.config.replies == "sampled" and self._supplies.sample_replies is not None:
            sampled = max(SHORTEST, -(-max(self.config.tokens) // 8) * 16)
            return enough_replies(self._supplies.sample_replies(requests, sampled))
        known = _read(self.config.replies)
        found = [known.get(request.text) for request in requests]
        if 2 * sum(reply is not None for reply in found) < len(found):
            raise DataError(
                f"Expected `{self.config.replies}` to have replies to at least half of {len(found)} requests, but got "
                f"{sum(reply is not None for reply in found)}. `prompt` must be the request, word for word."
            )
        return found

    def _first(self, reply: str, count: int) -> str:
        if self._supplies.tokenizer is not None:
            return first_tokens(reply, count, self._supplies.tokenizer)
        return " ".join(reply.split()[: max(1, round(WORDS_PER_TOKEN * count))])


def _opened(request: Prompt, opening: str, count: int) -> Query:
    prompt = replace(request, id=f"{request.id}+prefill-{count}", prefill=opening)
    return Query(request, prompt, details={"variant": f"{count} tokens"})


def _read(name: str) -> dict[str, str]:
    path = find_file(name)
    found: dict[str, str] = {}
    for number, row in enumerate(read_records(path), start=1):
        if not isinstance(row.get("prompt"), str) or not isinstance(row.get("reply"), str):
            raise DataError(
                f"Expected row {number} of `{path}` to have the texts `prompt` and `reply`, but got {list(row)!r}."
            )
        found[row["prompt"]] = row["reply"]
    return found
