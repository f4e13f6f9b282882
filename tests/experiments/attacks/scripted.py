"""A responder that says what a function tells it to, and may be cut off."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from experiments.attacks.interface import Query
from experiments.attacks.responder import ReplySettings
from framework.evaluation.generation import Reply
from framework.examples import Prompt

REFUSAL = "I'm sorry, but I can't help with that request."
ANSWER = "Here is a plain answer with quite enough ordinary words in it to count as one."
REQUESTS = [Prompt(f"r{i}", f"Please do the forbidden thing number {i} for me", "harmful") for i in range(4)]


class Scripted:
    """Answers by ``say(query, number)``; raises KeyboardInterrupt once it has answered ``stop_after`` queries."""

    tokenizer: Any = None

    def __init__(
        self,
        say: Callable[[Query, int], str] = lambda query, number: REFUSAL,
        *,
        stop_after: int | None = None,
        has_prefill: bool = True,
        name: str = "scripted",
    ) -> None:
        self.say = say
        self.stop_after = stop_after
        self.has_prefill = has_prefill
        self.name = name
        self.asked: list[Query] = []
        self.settings: list[ReplySettings] = []

    def identity(self) -> dict[str, Any]:
        return {"model": self.name}

    def reply(self, queries: Sequence[Query], settings: ReplySettings, *, numbers, progress=None) -> list[Reply]:
        if self.stop_after is not None and len(self.asked) + len(queries) > self.stop_after:
            raise KeyboardInterrupt
        self.asked += queries
        self.settings.append(settings)
        texts = [self.say(query, number) for query, number in zip(queries, numbers, strict=True)]
        return [Reply(q.prompt.prefill + text, len(text.split()), True) for q, text in zip(queries, texts, strict=True)]

    def close(self) -> None:
        """Nothing is open."""
