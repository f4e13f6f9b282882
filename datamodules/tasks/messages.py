"""Chat files: JSON Lines with ``messages`` in OpenAI's format; the last assistant message is the reply.

Earlier turns, system messages included, are the prompt. A seeded tenth of the conversations is held out for testing,
graded as open instructions are.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from datamodules.layouts import Conversation, conversation_of
from datamodules.readers import read_records
from datamodules.tasks.base import draw, exact_match, hold_out, normalise, token_f1
from framework.errors import ConfigError
from framework.examples import Example, Prompt, Turn

__all__ = ["ConversationPrompt", "Messages"]


@dataclass(frozen=True)
class ConversationPrompt(Prompt):
    """A prompt with the turns that come before it."""

    history: tuple[Turn, ...] = ()
    """Turns before ``text``."""

    @property
    def messages(self) -> tuple[Turn, ...]:
        """The whole conversation, the user's last turn at its end."""
        return (*self.history, Turn("user", self.text))


class Messages:
    """Conversations of one file."""

    max_new_tokens = 128

    def __init__(self, path: Path | None = None, *, name: str = "messages") -> None:
        """Read the conversations.

        Args:
            path: the file.
            name: the task's name in ids and errors.

        Raises:
            ConfigError: there is no path.
            DataError: unreadable, fewer than 2 rows, or a conversation without reply.
        """
        if path is None:
            raise ConfigError(
                "Expected `path` of task 'messages' to be a file, but got None. Name a JSON Lines file of chats."
            )
        self.name = name
        records = read_records(path)
        numbered = [
            (number, conversation_of(record.get("messages"), path=path, number=number))
            for number, record in enumerate(records, start=1)
        ]
        self._train, self._test = hold_out(numbered, share=0.1)

    def train_examples(self, *, count: int, seed: int) -> list[Example]:
        """Return ``count`` distinct training conversations."""
        drawn: list[tuple[int, Conversation]] = draw(
            self._train, count, seed=seed, what=f"training rows of task {self.name!r}"
        )
        return [Example(f"{self.name}-{number}", chat.messages, chat.reply) for number, chat in drawn]

    def test_prompts(self, *, count: int | None = None) -> list[Prompt]:
        """Return ``count`` held-out prompts, or all; each carries the turns before it."""
        drawn = draw(self._test, count, seed=0, what=f"test prompts of task {self.name!r}")
        return [
            ConversationPrompt(
                f"{self.name}-{number}",
                chat.messages[-1].content,
                "task",
                answer=chat.reply,
                history=chat.messages[:-1],
            )
            for number, chat in drawn
        ]

    def parse(self, reply: str) -> str | None:
        """Return the reply, normalised, or None when it is empty."""
        return normalise(reply) or None

    def is_correct(self, reply: str, answer: str) -> bool:
        """Return whether reply and answer are the same but for case, punctuation and spaces."""
        return exact_match(reply, answer)

    def score(self, reply: str, answer: str) -> float:
        """Return the F1 of the answer's words in the reply, from 0 to 1."""
        return token_f1(reply, answer)
