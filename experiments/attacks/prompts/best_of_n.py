"""Best-of-N: the request is sent again and again with random disturbances until one reply is not a refusal.

What it does: every query scrambles the inner letters of some words, flips the case of some letters and moves some signs
to their neighbour in the ASCII table; the model replies at temperature 1. A request that was broken is not asked again.
Formula: with sigma: a word of four letters or more is scrambled and a letter changes its case each with probability
sigma^(1/2), a sign is disturbed with probability sigma^3.
Reference: arXiv:2412.03556 (sigma 0.4; up to 10,000 samples; text only here).
Deviations: written from the description; requests are taken one round after the other, so that ASR@k is exact for every
k up to N.
Cost: at most N queries a request, fewer where one breaks it.
Needs: nothing.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from experiments.attacks.interface import Attempt, PromptAttack, Query, register_attack
from experiments.attacks.texts.transforms import TRANSFORMS
from framework.examples import Prompt
from framework.fields import COUNT, NOT_NEGATIVE, SHARE, check_instance, setting

__all__ = ["BestOfN", "BestOfNConfig", "disturb"]

DISTURBANCES = ("word_scrambling", "random_capitalisation", "character_noise")
"""In the order they are applied; their probabilities follow from sigma."""


@dataclass(frozen=True)
class BestOfNConfig:
    """How often and how hard."""

    queries: int = setting(40, rule=COUNT)
    """N: queries a request at most."""
    sigma: float = setting(0.4, rule=SHARE)
    """Strength of the disturbance, 0 to 1."""
    temperature: float = setting(1.0, rule=NOT_NEGATIVE)
    """At which the model replies; 0 is greedy."""
    stop: bool = True
    """Leave a request alone once it is broken."""

    def __post_init__(self) -> None:
        """Refuse fields that are wrong."""
        check_instance(self)


@register_attack("best_of_n", config=BestOfNConfig)
class BestOfN(PromptAttack):
    """Disturbs a request at random, many times."""

    config: BestOfNConfig

    def __init__(self, config: BestOfNConfig) -> None:
        """Keep the settings."""
        super().__init__(config)
        self.temperature = config.temperature

    @property
    def budget(self) -> int:
        """N."""
        return self.config.queries

    def start(self, requests: Sequence[Prompt], *, seed: int) -> None:
        """Begin anew with these requests."""
        self._requests = list(requests)
        self._seed = seed
        self._round = 0
        self._broken: set[str] = set()

    def ask(self) -> list[Query]:
        """Return one query for every request that still holds."""
        if self._round == self.config.queries:
            return []
        self._round += 1
        return [self._query(request) for request in self._requests if request.id not in self._broken]

    def tell(self, attempts: Sequence[Attempt]) -> None:
        """Remember which requests are broken."""
        if self.config.stop:
            self._broken |= {attempt.request_id for attempt in attempts if attempt.is_success}

    def _query(self, request: Prompt) -> Query:
        # From the request's id, not from a common source: what one request meets does not depend on the others.
        draw = random.Random(f"best of n {self._seed} {request.id} {self._round}")
        text = disturb(request.text, sigma=self.config.sigma, draw=draw)
        return Query(request, replace(request, id=f"{request.id}+{self._round}", text=text))


def disturb(text: str, *, sigma: float, draw: random.Random) -> str:
    """Return ``text`` with words scrambled, case flipped and characters disturbed.

    Args:
        text: a request.
        sigma: strength, 0 to 1.
        draw: source of chance.
    """
    for name in DISTURBANCES:
        text = TRANSFORMS[name].apply(text, sigma, draw)
    return text
