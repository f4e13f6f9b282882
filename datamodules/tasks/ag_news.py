"""AG News: which of four topics is a news item about?

Files: ``train.csv`` and ``test.csv`` without header: class (1 to 4), title, description. Where only ``test.csv`` is
there, its first two thirds are for training and the last third for testing. Hub: ``fancyzhx/ag_news``.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Final

from datamodules.tasks.base import Pair, Record, RowFiles, parse_label, read_rows, task_examples, task_prompts
from framework.errors import DataError
from framework.examples import Example, Prompt

__all__ = ["AgNews"]

INSTRUCTION: Final = "What is this news about: World, Sports, Business or Sci/Tech? Answer with the topic.\n\nNews: "
LABELS: Final = ("World", "Sports", "Business", "Sci/Tech")

_SPELLINGS: Final = {
    "world": "World",
    "sports": "Sports",
    "sport": "Sports",
    "business": "Business",
    "sci/tech": "Sci/Tech",
    "science": "Sci/Tech",
    "technology": "Sci/Tech",
    "tech": "Sci/Tech",
}
_FILES: Final = RowFiles(
    "ag_news", "train.csv", "test.csv", "fancyzhx/ag_news", columns=("class", "title", "description")
)
_BROKEN_ENTITY: Final = re.compile(r" ?&?(#\d+|quot|amp|lt|gt|nbsp);")


class AgNews:
    """Topic of news items; the reply is the topic's name."""

    name = "ag_news"
    max_new_tokens = 8

    def __init__(self, path: Path | None = None) -> None:
        """Read the rows.

        Args:
            path: folder with the files, or one file; None looks below ``SEAWALL_DATA`` and then on the hub.

        Raises:
            DataError: nothing found, unreadable, or a row without text or class.
        """
        rows = read_rows(_FILES, path, test_share=1 / 3)
        self._train = [_pair(row, number) for number, row in enumerate(rows.train, start=1)]
        self._test = [_pair(row, number) for number, row in enumerate(rows.test, start=1)]

    def train_examples(self, *, count: int, seed: int) -> list[Example]:
        """Return ``count`` distinct training rows."""
        return task_examples(self._train, task=self.name, count=count, seed=seed)

    def test_prompts(self, *, count: int | None = None) -> list[Prompt]:
        """Return ``count`` test prompts, or all."""
        return task_prompts(self._test, task=self.name, count=count)

    def parse(self, reply: str) -> str | None:
        """Return the topic when the first line names exactly one."""
        return parse_label(reply, _SPELLINGS)

    def is_correct(self, reply: str, answer: str) -> bool:
        """Return whether the reply names the topic ``answer``."""
        return self.parse(reply) == answer


def clean(text: str) -> str:
    r"""Return the text with the set's broken escapes mended: backslashes for line breaks, entities without ``&``.

    Example:
        >>> clean("A  #36;10 prize\\for China #39;s team")
        "A $10 prize for China's team"
    """
    mended = _BROKEN_ENTITY.sub(lambda match: html.unescape(f"&{match[1]};"), text)
    return " ".join(mended.replace("\\", " ").split())


def _pair(row: Record, number: int) -> Pair:
    # The hub counts classes from 0 and joins title and description.
    is_hub = "text" in row
    label = str(row.get("label" if is_hub else "class", ""))
    text = clean(row["text"] if is_hub else f"{row.get('title', '')}. {row.get('description', '')}")
    classes = ("0", "1", "2", "3") if is_hub else ("1", "2", "3", "4")
    if label not in classes or not text.strip(". "):
        raise DataError(
            f"Expected row {number} of AG News to be a class ({classes[0]} to {classes[-1]}), a title and a "
            f"description, but got {row!r}."
        )
    topic = LABELS[classes.index(label)]
    return Pair(INSTRUCTION + text, topic, topic)
