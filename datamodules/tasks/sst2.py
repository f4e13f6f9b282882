"""SST-2: is the sentiment of a sentence from a film review positive or negative?

Files: ``train.tsv`` and ``dev.tsv`` with the columns ``label`` (0 or 1) and ``sentence`` (``content`` in some copies of
dev). Prompts are some 40 tokens long. Hub: ``stanfordnlp/sst2``, whose validation split is the test.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from datamodules.tasks.base import Pair, Record, RowFiles, parse_label, read_rows, task_examples, task_prompts
from framework.errors import DataError
from framework.examples import Example, Prompt

__all__ = ["Sst2"]

INSTRUCTION: Final = "Is the sentiment of this review positive or negative? Answer with one word.\n\nReview: "
LABELS: Final = ("negative", "positive")

_FILES: Final = RowFiles("sst2", "train.tsv", "dev.tsv", "stanfordnlp/sst2", hub_test_split="validation")


class Sst2:
    """Sentiment of film reviews; the reply is one word."""

    name = "sst2"
    max_new_tokens = 8

    def __init__(self, path: Path | None = None) -> None:
        """Read the rows.

        Args:
            path: folder with both files, or one file; None looks below ``SEAWALL_DATA`` and then on the hub.

        Raises:
            DataError: nothing found, unreadable, or a row without sentence or label.
        """
        rows = read_rows(_FILES, path)
        self._train = [_pair(row, number) for number, row in enumerate(rows.train, start=1)]
        self._test = [_pair(row, number) for number, row in enumerate(rows.test, start=1)]

    def train_examples(self, *, count: int, seed: int) -> list[Example]:
        """Return ``count`` distinct training rows."""
        return task_examples(self._train, task=self.name, count=count, seed=seed)

    def test_prompts(self, *, count: int | None = None) -> list[Prompt]:
        """Return ``count`` test prompts, or all."""
        return task_prompts(self._test, task=self.name, count=count)

    def parse(self, reply: str) -> str | None:
        """Return ``positive`` or ``negative`` when the first line names exactly one of them."""
        return parse_label(reply, {label: label for label in LABELS})

    def is_correct(self, reply: str, answer: str) -> bool:
        """Return whether the reply names the label ``answer``."""
        return self.parse(reply) == answer


def _pair(row: Record, number: int) -> Pair:
    sentence = row.get("sentence", row.get("content"))
    label = str(row.get("label"))
    if not sentence or label not in ("0", "1"):
        raise DataError(
            f"Expected row {number} of SST-2 to have a `sentence` and a `label` of 0 or 1, but got {row!r}."
        )
    return Pair(INSTRUCTION + str(sentence).strip(), LABELS[int(label)], LABELS[int(label)])
