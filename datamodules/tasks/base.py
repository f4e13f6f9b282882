"""What a downstream task is, and what the tasks that read files share: finding splits, drawing rows, grading text."""

from __future__ import annotations

import random
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from datamodules.readers import SUFFIXES, data_root, load_hub, read_records
from framework.errors import ConfigError, DataError
from framework.examples import Example, Prompt, Turn

__all__ = [
    "Pair",
    "RowFiles",
    "Rows",
    "Task",
    "draw",
    "exact_match",
    "hold_out",
    "normalise",
    "parse_label",
    "read_rows",
    "task_examples",
    "task_prompts",
    "token_f1",
]

T = TypeVar("T")
Record = dict[str, Any]


class Task(Protocol):
    """A downstream task: rows to train on, prompts to test on, and a grader."""

    name: str
    max_new_tokens: int
    """Tokens a reply may have."""

    def train_examples(self, *, count: int, seed: int) -> list[Example]:
        """Return ``count`` distinct training rows, drawn by ``seed``; ConfigError when there are fewer."""

    def test_prompts(self, *, count: int | None = None) -> list[Prompt]:
        """Return ``count`` test prompts, the same in every run; None returns all, ConfigError when there are fewer."""

    def parse(self, reply: str) -> str | None:
        """Return the answer in a reply, or None when it has none."""

    def is_correct(self, reply: str, answer: str) -> bool:
        """Return whether the reply gives the reference answer."""


class Pair(NamedTuple):
    """A task's prompt with the reply to be learnt and the answer a reply is graded against."""

    prompt: str
    reply: str
    answer: str


class RowFiles(NamedTuple):
    """Where the rows of a task are found."""

    dataset: str
    """Folder below ``SEAWALL_DATA``."""
    train: str
    """Name of the training file in that folder."""
    test: str
    """Name of the test file in that folder."""
    hub_id: str
    hub_config: str | None = None
    hub_test_split: str = "test"
    columns: tuple[str, ...] | None = None
    """Names of the columns when the files have no header."""


class Rows(NamedTuple):
    """The records of a task."""

    train: list[Record]
    test: list[Record]


def read_rows(files: RowFiles, path: Path | None, *, test_share: float = 0.1) -> Rows:
    """Return a task's training and test records.

    A folder must hold at least one of the two files. When there is one file alone, its last ``test_share`` is the
    test split. Without ``path`` the folder below ``SEAWALL_DATA`` is used, and if there is none, the hub.

    Args:
        files: names of the files, folder and hub data set.
        path: the data set's folder or one file; None looks for it.
        test_share: share of a lone file that is held out, from its end.

    Raises:
        DataError: nothing was found, or a file cannot be read.
    """
    if path is None:
        root = data_root()
        path = root / files.dataset if root is not None and (root / files.dataset).is_dir() else None
    if path is None:
        return Rows(
            load_hub(files.hub_id, "train", config=files.hub_config),
            load_hub(files.hub_id, files.hub_test_split, config=files.hub_config),
        )
    if not path.is_dir():
        return _cut(read_records(path, columns=files.columns), test_share, path=path)
    present = [name for name in dict.fromkeys((files.train, files.test)) if (path / name).is_file()]
    if not present:
        raise DataError(
            f"Expected folder `{path}` to hold {files.train} and {files.test}, but found neither. "
            f"Files end in one of {', '.join(SUFFIXES)}."
        )
    records = [read_records(path / name, columns=files.columns) for name in present]
    if len(records) == 1:
        return _cut(records[0], test_share, path=path / present[0])
    return Rows(*records)


def _cut(records: list[Record], test_share: float, *, path: Path) -> Rows:
    num_test = round(test_share * len(records))
    if not 0 < num_test < len(records):
        raise DataError(
            f"Expected `{path}` to have enough rows to hold out {test_share:.0%} of them, but got {len(records)}."
        )
    return Rows(records[:-num_test], records[-num_test:])


def hold_out(rows: Sequence[T], *, share: float, seed: int = 0) -> tuple[list[T], list[T]]:
    """Return rows for training and rows held out, drawn by ``seed``, each in the order given.

    Raises:
        DataError: there are too few rows to hold out one and keep one.
    """
    num_test = max(1, round(share * len(rows)))
    if num_test >= len(rows):
        raise DataError(f"Expected at least 2 rows, so that one can be held out, but got {len(rows)}.")
    chosen = set(random.Random(f"hold out {seed}").sample(range(len(rows)), num_test))
    return [row for i, row in enumerate(rows) if i not in chosen], [row for i, row in enumerate(rows) if i in chosen]


def draw(rows: Sequence[T], count: int | None, *, seed: int, what: str) -> list[T]:
    """Return ``count`` rows drawn without replacement; a smaller count is a prefix of a larger one.

    Args:
        rows: what to draw from.
        count: how many; None returns all rows in the order given.
        seed: decides the draw.
        what: the rows' name in the error, e.g. ``"training rows of task 'sst2'"``.

    Raises:
        ConfigError: ``count`` is below 1 or above the number of rows.
    """
    if count is None:
        return list(rows)
    if not 1 <= count <= len(rows):
        raise ConfigError(f"Expected `count` to be from 1 to {len(rows)}, the number of {what}, but got {count!r}.")
    order = list(range(len(rows)))
    random.Random(f"rows {seed}").shuffle(order)
    return [rows[i] for i in order[:count]]


def task_examples(pairs: Sequence[Pair], *, task: str, count: int, seed: int) -> list[Example]:
    """Return ``count`` training rows drawn from ``pairs``; ids tell their place in ``pairs``, from 1."""
    numbered = list(enumerate(pairs, start=1))
    drawn = draw(numbered, count, seed=seed, what=f"training rows of task {task!r}")
    return [Example(f"{task}-train-{number}", (Turn("user", pair.prompt),), pair.reply) for number, pair in drawn]


def task_prompts(pairs: Sequence[Pair], *, task: str, count: int | None) -> list[Prompt]:
    """Return test prompts drawn from ``pairs``, the same in every run; ids tell their place, from 1."""
    numbered = list(enumerate(pairs, start=1))
    drawn = draw(numbered, count, seed=0, what=f"test prompts of task {task!r}")
    return [Prompt(f"{task}-test-{number}", pair.prompt, "task", answer=pair.answer) for number, pair in drawn]


def parse_label(reply: str, labels: Mapping[str, str]) -> str | None:
    """Return the label that the first non-empty line of ``reply`` names, or None when it names none or several.

    Args:
        reply: the model's reply.
        labels: spelling in lower case -> label; several spellings may mean one label.

    Example:
        >>> parse_label("It is Positive.", {"positive": "positive", "negative": "negative"})
        'positive'
    """
    line = next((line for line in reply.splitlines() if line.strip()), "").lower()
    named = {label for word, label in labels.items() if re.search(rf"(?<!\w){re.escape(word)}(?!\w)", line)}
    return named.pop() if len(named) == 1 else None


def normalise(text: str) -> str:
    r"""Return the text in lower case, without punctuation, with single spaces.

    Example:
        >>> normalise("  The answer,\nis: Yes! ")
        'the answer is yes'
    """
    return " ".join(text.lower().translate(_PUNCTUATION_TO_SPACE).split())


_PUNCTUATION_TO_SPACE = str.maketrans(dict.fromkeys(string.punctuation, " "))


def exact_match(reply: str, answer: str) -> bool:
    """Return whether reply and answer are the same but for case, punctuation and spaces.

    Of texts that are nothing but punctuation, the spaces alone are disregarded.
    """
    if not normalise(answer):
        return reply.split() == answer.split()
    return normalise(reply) == normalise(answer)


def token_f1(reply: str, answer: str) -> float:
    """Return the harmonic mean of precision and recall of the answer's words in the reply, from 0 to 1.

    Ref: arXiv:1606.05250 (SQuAD), without dropping articles.

    Example:
        >>> round(token_f1("a red fox", "the red fox runs"), 4)
        0.5714
    """
    given, wanted = normalise(reply).split(), normalise(answer).split()
    if not given or not wanted:
        return float(exact_match(reply, answer))
    common = sum((Counter(given) & Counter(wanted)).values())
    return 2 * common / (len(given) + len(wanted))
