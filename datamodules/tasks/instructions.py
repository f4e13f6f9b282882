"""Instruction files: any set of instructions with outputs, in Alpaca's, Dolly's or a plain prompt-response layout.

Columns: ``instruction`` with ``input`` or ``context`` and ``output`` or ``response``; or ``prompt`` and ``response``,
and the like. A seeded tenth of the rows is held out for testing. Replies to open instructions seldom match word for
word, so ``score`` (word F1) tells more than ``is_correct`` (exact match after normalising).
"""

from __future__ import annotations

from pathlib import Path

from datamodules.layouts import pair_of
from datamodules.readers import data_root, load_hub, read_records
from datamodules.tasks.base import Pair, exact_match, hold_out, normalise, task_examples, task_prompts, token_f1
from framework.examples import Example, Prompt

__all__ = ["Instructions"]

DOLLY_DATASET = "dolly"
DOLLY_FILE = "databricks-dolly-15k-safety-only.jsonl"
DOLLY_HUB_ID = "databricks/databricks-dolly-15k"


class Instructions:
    """Open instructions of one file."""

    max_new_tokens = 128

    def __init__(self, path: Path | None = None, *, name: str = "instructions") -> None:
        """Read the rows.

        Args:
            path: the file; None takes Dolly, below ``SEAWALL_DATA`` or from the hub.
            name: the task's name in ids and errors.

        Raises:
            DataError: nothing found, unreadable, fewer than 2 rows, or a row without prompt or reply.
        """
        self.name = name
        source, records = _dolly() if path is None else (path, read_records(path))
        pairs = []
        for number, record in enumerate(records, start=1):
            conversation = pair_of(record, path=source, number=number)
            pairs.append(Pair(conversation.messages[-1].content, conversation.reply, conversation.reply))
        self._train, self._test = hold_out(pairs, share=0.1)

    def train_examples(self, *, count: int, seed: int) -> list[Example]:
        """Return ``count`` distinct training rows."""
        return task_examples(self._train, task=self.name, count=count, seed=seed)

    def test_prompts(self, *, count: int | None = None) -> list[Prompt]:
        """Return ``count`` held-out prompts, or all."""
        return task_prompts(self._test, task=self.name, count=count)

    def parse(self, reply: str) -> str | None:
        """Return the reply, normalised, or None when it is empty."""
        return normalise(reply) or None

    def is_correct(self, reply: str, answer: str) -> bool:
        """Return whether reply and answer are the same but for case, punctuation and spaces."""
        return exact_match(reply, answer)

    def score(self, reply: str, answer: str) -> float:
        """Return the F1 of the answer's words in the reply, from 0 to 1."""
        return token_f1(reply, answer)


def _dolly() -> tuple[Path, list[dict[str, object]]]:
    root = data_root()
    if root is not None and (root / DOLLY_DATASET / DOLLY_FILE).is_file():
        path = root / DOLLY_DATASET / DOLLY_FILE
        return path, read_records(path)
    return Path(DOLLY_HUB_ID), load_hub(DOLLY_HUB_ID, "train")
