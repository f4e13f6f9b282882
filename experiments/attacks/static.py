"""Prompt attacks that know all their queries before the first one is sent."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from experiments.attacks.interface import PromptAttack, Query
from framework.examples import Prompt

__all__ = ["StaticAttack"]


class StaticAttack(PromptAttack):
    """Sends every variant of every request; nothing is learnt, and nothing stops early, so variants can be compared."""

    @abstractmethod
    def variants(self, request: Prompt, *, seed: int) -> list[Query]:
        """Return the queries of one request, in the order they are sent; none leaves the request out."""

    def start(self, requests: Sequence[Prompt], *, seed: int) -> None:
        """Begin anew with these requests."""
        lists = [self.variants(request, seed=seed) for request in requests]
        longest = max(map(len, lists), default=0)
        # Round by round: the first query of every request, then the second of every request.
        self._rounds = [[queries[k] for queries in lists if k < len(queries)] for k in range(longest)]

    def ask(self) -> list[Query]:
        """Return the next query of every request."""
        return self._rounds.pop(0) if self._rounds else []
