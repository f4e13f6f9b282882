"""Text to SQL: write the query that answers a question about given tables.

Files: ``sqlgen_train.json`` in Alpaca columns (``instruction``, ``input`` with question and CREATE statement,
``output``); a seeded tenth is held out for testing. Hub: ``b-mc2/sql-create-context``. Graded by exact match after
normalising spaces, case outside of quotes, and the final semicolon: another query with the same result counts as wrong.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from datamodules.readers import data_root, load_hub, read_records
from datamodules.tasks.base import Pair, Record, hold_out, task_examples, task_prompts
from framework.errors import DataError
from framework.examples import Example, Prompt

__all__ = ["TextToSql", "normalise_sql"]

INSTRUCTION: Final = "Write the SQL query that answers the question. Answer with the query alone.\n\n"
FILE: Final = "sqlgen_train.json"
DATASET: Final = "sql-create-context"
HUB_ID: Final = "b-mc2/sql-create-context"

_SECTIONS: Final = re.compile(
    r"## Natural Language Query:\s*(?P<question>.*?)\s*## Context:\s*(?P<context>.*)", re.DOTALL
)
_PIECE: Final = re.compile(r"'[^']*'|\"[^\"]*\"|\w+(?:\.\w+)*|[<>!]=|<>|\S")
_FENCE: Final = re.compile(r"```(?:sql)?\s*(.*?)(?:```|$)", re.DOTALL | re.IGNORECASE)


class TextToSql:
    """Questions about tables; the reply is a SQL query."""

    name = "text_to_sql"
    max_new_tokens = 96

    def __init__(self, path: Path | None = None) -> None:
        """Read the rows.

        Args:
            path: the file or its folder; None looks below ``SEAWALL_DATA`` and then on the hub.

        Raises:
            DataError: nothing found, unreadable, or a row without question or query.
        """
        pairs = [_pair(row, number) for number, row in enumerate(_records(path), start=1)]
        self._train, self._test = hold_out(pairs, share=0.1)

    def train_examples(self, *, count: int, seed: int) -> list[Example]:
        """Return ``count`` distinct training rows."""
        return task_examples(self._train, task=self.name, count=count, seed=seed)

    def test_prompts(self, *, count: int | None = None) -> list[Prompt]:
        """Return ``count`` test prompts, or all."""
        return task_prompts(self._test, task=self.name, count=count)

    def parse(self, reply: str) -> str | None:
        """Return the query, normalised: the first code block or else the whole reply, up to the first semicolon."""
        fenced = _FENCE.search(reply)
        return normalise_sql(fenced[1] if fenced else reply) or None

    def is_correct(self, reply: str, answer: str) -> bool:
        """Return whether the reply is the query ``answer``, but for spaces, case and kind of quotes."""
        return self.parse(reply) == normalise_sql(answer)


def normalise_sql(query: str) -> str:
    r"""Return the query up to its first semicolon: lower case outside of quotes, double quotes, single spaces.

    Example:
        >>> normalise_sql("SELECT  a FROM T\nWHERE b='X y';")
        'select a from t where b = "X y"'
    """
    pieces = []
    for piece in _PIECE.findall(query):
        if piece == ";":
            break
        pieces.append(f'"{piece[1:-1]}"' if len(piece) > 1 and piece[0] in "'\"" else piece.lower())
    return " ".join(pieces)


def _records(path: Path | None) -> list[Record]:
    root = data_root()
    if path is None and root is not None and (root / DATASET / FILE).is_file():
        path = root / DATASET / FILE
    if path is None:
        return load_hub(HUB_ID, "train")
    return read_records(path / FILE if path.is_dir() else path)


def _pair(row: Record, number: int) -> Pair:
    if "output" in row:
        found = _SECTIONS.search(str(row.get("input") or ""))
        question, context = (found["question"], found["context"].strip()) if found else ("", "")
        query = str(row["output"] or "").strip()
    else:
        question, context = str(row.get("question") or ""), str(row.get("context") or "")
        query = str(row.get("answer") or "").strip()
    if not question or not query:
        raise DataError(
            f"Expected row {number} of the SQL set to have a question and a query, but got {str(row)[:120]}."
        )
    return Pair(f"{INSTRUCTION}Tables: {context}\nQuestion: {question}", query, query)
