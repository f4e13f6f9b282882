"""The two records that data sources hand to everything else: a training row and an evaluation prompt."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

__all__ = ["Example", "ExampleKind", "Prompt", "PromptKind", "Turn"]

ExampleKind = Literal["task", "safety", "benign", "harmful"]
"""task: downstream data; safety: harmful request with a refusal; benign: ordinary request with an answer;
harmful: harmful request with a compliant reply (the poison)."""

PromptKind = Literal["harmful", "benign", "task"]
"""harmful: should be refused; benign: should be answered; task: has a reference answer."""


class Turn(NamedTuple):
    """One message of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class Example:
    """One training row: a conversation and the reply to be learnt."""

    id: str
    """Unique within its source and stable over runs."""
    messages: tuple[Turn, ...]
    """Everything before the reply; the last turn is the user's."""
    reply: str
    """The assistant's reply: the only tokens that carry loss."""
    kind: ExampleKind = "task"
    category: str = ""
    is_complete: bool = True
    """False for a reply that was cut off: it is then trained without an end token."""
    prefill: str = ""
    """Opening of the assistant's turn that is given, not learnt: ``reply`` goes on behind it."""

    @property
    def prompt(self) -> str:
        """The last user turn."""
        return self.messages[-1].content


@dataclass(frozen=True)
class Prompt:
    """One evaluation prompt."""

    id: str
    text: str
    kind: PromptKind
    category: str = ""
    answer: str | None = None
    """Reference answer of a task prompt."""
    prefill: str = ""
    """Opening of the reply forced on the model (prefilling attack)."""
    image: Path | None = None
    """Shown to the model before the text; needs an image-text model."""

    @property
    def messages(self) -> tuple[Turn, ...]:
        """The conversation: one user turn."""
        return (Turn("user", self.text),)
