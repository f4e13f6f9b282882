"""Obfuscation: one fixed text transform, drawn anew for every query.

Each query puts the request through the same transforms at the same strength with another seed. A request that was
broken is not asked again, and neither is one for which twenty draws gave no text that was not sent before and is not
too long (a transform without chance in it has one text).

ASR@k = requests broken within their first k queries / all requests.

Reference: the transforms ``random_capitalisation``, ``word_scrambling`` and ``character_noise`` with their strengths
are those of Best-of-N Jailbreaking (Hughes et al., arXiv:2412.03556); the other transforms are common ones, in our own
words.
Deviations: Best-of-N applies its three at once; here each stands alone unless several are named with ``+``.
Cost: at most ``queries`` replies a request. Needs: nothing but replies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from experiments.attacks.interface import Attempt, PromptAttack, Query, register_attack
from experiments.attacks.texts.transforms import compose, parse_steps
from framework.errors import WiringError
from framework.examples import Prompt
from framework.fields import COUNT, SHARE, check_instance, setting

__all__ = ["Obfuscation", "ObfuscationConfig"]

REDRAWS = 20
"""Draws after which a request counts as having no new text."""


@dataclass(frozen=True)
class ObfuscationConfig:
    """Settings of the obfuscation attack."""

    transform: str = "word_scrambling"
    """A transform, or several as ``story+word_scrambling:0.4``, applied first to last."""
    strength: float = setting(0.5, rule=SHARE)
    """Of transforms without a strength of their own."""
    queries: int = setting(10, rule=COUNT)
    """Queries a request, at most."""
    longest: int = setting(2000, rule=COUNT)
    """Bytes of UTF-8 of the longest text that is sent; a longer one is drawn again."""

    def __post_init__(self) -> None:
        """Raise ConfigError listing every field that has the wrong type or breaks its rule."""
        check_instance(self)
        parse_steps(self.transform, self.strength)


@register_attack("obfuscation", config=ObfuscationConfig)
class Obfuscation(PromptAttack):
    """Asks every request in one disguise."""

    config: ObfuscationConfig

    @property
    def budget(self) -> int:
        """Queries a request, at most."""
        return self.config.queries

    def start(self, requests: Sequence[Prompt], *, seed: int) -> None:
        """Begin with these requests."""
        self._seed = seed
        self._steps = parse_steps(self.config.transform, self.config.strength)
        self._open = list(requests)
        self._sent: dict[str, set[str]] = {request.id: set() for request in requests}
        self._round = 0
        self._asked: list[Query] = []

    def ask(self) -> list[Query]:
        """Return one query for each request that is neither broken nor out of new texts."""
        if self._asked:
            return list(self._asked)
        if self._round == self.budget:
            return []
        self._round += 1
        found = [(request, self._new_text(request)) for request in self._open]
        self._open = [request for request, text in found if text is not None]
        self._asked = [self._query(request, text) for request, text in found if text is not None]
        return list(self._asked)

    def tell(self, attempts: Sequence[Attempt]) -> None:
        """Drop the requests that were broken.

        Raises:
            WiringError: these are not the attempts of the queries last asked for.
        """
        if [attempt.query_id for attempt in attempts] != [query.prompt.id for query in self._asked]:
            raise WiringError(
                f"Expected the attempts of the {len(self._asked)} queries last asked for, in their order, but got "
                f"{len(attempts)} others. Tell an attack everything it asked for before asking again."
            )
        broken = {attempt.request_id for attempt in attempts if attempt.is_success}
        self._open = [request for request in self._open if request.id not in broken]
        self._asked = []

    def _new_text(self, request: Prompt) -> str | None:
        for number in range(REDRAWS):
            text = compose(request.text, self._steps, seed=f"{self._seed}/{request.id}/{self._round}/{number}")
            if text not in self._sent[request.id] and len(text.encode()) <= self.config.longest:
                self._sent[request.id].add(text)
                return text
        return None

    def _query(self, request: Prompt, text: str) -> Query:
        prompt = replace(request, id=f"{request.id}/{self._round}", text=text)
        return Query(request, prompt, details={"transforms": "+".join(map(str, self._steps))})
