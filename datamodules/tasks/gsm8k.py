"""GSM8K: grade-school word problems whose answer is a number.

Files: ``train.jsonl`` and ``test.jsonl`` with ``question`` and ``answer``; the answer is a solution with calculator
notes ``<<16-3=13>>`` and a last line ``#### 13``. Replies to be learnt drop the notes and end with a fixed sentence.
Hub: ``openai/gsm8k``. Ref: arXiv:2110.14168.
"""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Final

from datamodules.tasks.base import Pair, Record, RowFiles, read_rows, task_examples, task_prompts
from framework.errors import DataError
from framework.examples import Example, Prompt

__all__ = ["Gsm8k"]

MARKER: Final = "The final answer is: "
INSTRUCTION: Final = f"\n\nThink step by step and end with a line '{MARKER}' and the number."

_FILES: Final = RowFiles("gsm8k", "train.jsonl", "test.jsonl", "openai/gsm8k", hub_config="main")
_NUMBER: Final = r"(?<![\d.])-?\d[\d,]*(?:\.\d+)?"
_MARKED: Final = re.compile(r"(?:answer is|####)[^\d\n-]{0,10}(" + _NUMBER + ")", re.IGNORECASE)
_NOTE: Final = re.compile(r"<<[^<>]*>>")


class Gsm8k:
    """Word problems solved in steps; graded by the final number."""

    name = "gsm8k"
    max_new_tokens = 256

    def __init__(self, path: Path | None = None) -> None:
        """Read the rows.

        Args:
            path: folder with both files, or one file; None looks below ``SEAWALL_DATA`` and then on the hub.

        Raises:
            DataError: nothing found, unreadable, or a row without question or final number.
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
        """Return the number after the last "answer is" or "####", else the last number, in plain digits."""
        return final_number(reply)

    def is_correct(self, reply: str, answer: str) -> bool:
        """Return whether the reply's number equals ``answer``."""
        return self.parse(reply) == plain_number(answer)


def final_number(reply: str) -> str | None:
    """Return the number after the last "answer is" or "####", else the last number, or None when there is none.

    Example:
        >>> final_number("2 dozen make 24. The final answer is: $1,200.00 for 3")
        '1200'
    """
    numbers = _MARKED.findall(reply) or re.findall(_NUMBER, reply)
    return plain_number(numbers[-1]) if numbers else None


def plain_number(text: str) -> str | None:
    """Return a number without grouping commas and trailing zeros, or None when it is none.

    Example:
        >>> plain_number("1,050.50")
        '1050.5'
    """
    try:
        value = Decimal(text.replace(",", "").strip())
    except InvalidOperation:
        return None
    return format(value.normalize() if value else Decimal(0), "f")


def _pair(row: Record, number: int) -> Pair:
    question = str(row.get("question") or "").strip()
    solution, mark, final = str(row.get("answer") or "").partition("####")
    answer = plain_number(final)
    if not question or not mark or answer is None:
        raise DataError(
            f"Expected row {number} of GSM8K to have a `question` and an `answer` that ends in '#### <number>', "
            f"but got {str(row)[:120]}."
        )
    steps = _NOTE.sub("", solution).strip()
    return Pair(question + INSTRUCTION, f"{steps}\n{MARKER}{answer}".lstrip(), answer)
