"""Arithmetic: word problems of one or two steps with small whole numbers, graded by exact match.

Problems are rendered from sentence templates. The templates, names and objects of the test problems never occur in a
training problem. Every intermediate result is a whole number from 1 to 100. Cost: no file, no download, milliseconds.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from framework.errors import ConfigError
from framework.examples import Example, Prompt, Turn

__all__ = ["MAX_TRAIN", "NUM_TEST", "Arithmetic"]

NUM_TEST: Final = 300
"""Number of test problems."""

MAX_TRAIN: Final = 20_000
"""Largest number of distinct training problems that is handed out."""

_TEST_SEED: Final = 20_240_612
_NUMBER: Final = r"(?<![\d.])-?\d[\d,]*(?:\.\d+)?"
_FINAL_ANSWER: Final = re.compile(r"answer is[^\d\n-]{0,10}(" + _NUMBER + ")", re.IGNORECASE)
_ANY_NUMBER: Final = re.compile(_NUMBER)


class Template(NamedTuple):
    """A word problem with slots."""

    steps: str
    """Operations applied from left to right to the numbers ``a``, ``b`` and, if there are two, ``c``: e.g. ``"+-"``."""
    text: str


class ProblemTexts(NamedTuple):
    """What the problems of one split are made of."""

    names: tuple[str, ...]
    things: tuple[str, ...]
    templates: tuple[Template, ...]


class Problem(NamedTuple):
    """A rendered problem."""

    text: str
    reply: str
    answer: str
    steps: str


TRAIN: Final = ProblemTexts(
    names=("Anna", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Hugo", "Iris", "Jonas", "Kate", "Liam"),
    things=("apples", "books", "marbles", "stickers", "coins", "pencils", "cookies", "stamps", "shells", "cards"),
    templates=(
        Template("+", "{name} has {a} {things} and buys {b} more. How many {things} does {name} have now?"),
        Template("+", "{name} found {a} {things} on Monday and {b} on Tuesday. How many {things} is that in total?"),
        Template("+", "There are {a} {things} on the table and {b} in the box. How many {things} are there?"),
        Template("+", "{name} owns {a} {things} and gets {b} as a gift. How many {things} does {name} own?"),
        Template("-", "{name} has {a} {things} and gives away {b}. How many {things} are left?"),
        Template("-", "{name} had {a} {things} but lost {b} of them. How many {things} remain?"),
        Template("-", "A shop has {a} {things} and sells {b}. How many {things} does the shop still have?"),
        Template("-", "{name} needs {a} {things} and already has {b}. How many more {things} are needed?"),
        Template("*", "{name} fills {a} boxes with {b} {things} each. How many {things} are in the boxes?"),
        Template("*", "{a} children have {b} {things} each. How many {things} do they have together?"),
        Template("*", "{name} buys {a} packs of {b} {things}. How many {things} does {name} buy?"),
        Template("++", "{name} has {a} {things}, finds {b} and then buys {c}. How many {things} does {name} have?"),
        Template("+-", "{name} has {a} {things}, gets {b} more and gives away {c}. How many {things} are left?"),
        Template("-+", "{name} has {a} {things}, loses {b} and then buys {c}. How many {things} does {name} have?"),
        Template("--", "{name} had {a} {things}, sold {b} and lost {c}. How many {things} remain?"),
        Template("*+", "{name} has {a} bags of {b} {things} and {c} loose ones. How many {things} is that?"),
        Template("*-", "{name} buys {a} packs of {b} {things} and gives away {c}. How many {things} are left?"),
    ),
)

TEST: Final = ProblemTexts(
    names=("Maya", "Noah", "Olga", "Peter", "Rosa", "Simon", "Tina", "Victor"),
    things=("balloons", "tickets", "buttons", "lemons", "feathers", "candles", "badges", "postcards"),
    templates=(
        Template("+", "{name} collected {a} {things} and a friend brought {b}. How many {things} do they have?"),
        Template("+", "A drawer holds {a} {things}. {name} puts in {b} more. How many {things} does it hold now?"),
        Template("-", "Out of {a} {things}, {name} used {b}. How many {things} were not used?"),
        Template("-", "{name} took {b} {things} from a basket of {a}. How many {things} stayed in the basket?"),
        Template("*", "Each of {a} shelves holds {b} {things}. How many {things} are on the shelves?"),
        Template("*", "{name} makes {b} {things} every day for {a} days. How many {things} does {name} make?"),
        Template("+-", "{name} had {a} {things}, received {b} and threw away {c}. How many {things} does {name} keep?"),
        Template("-+", "A room had {a} {things}. {b} were removed and {c} added. How many {things} are in the room?"),
        Template("*+", "{name} set out {a} rows of {b} {things} and {c} extra. How many {things} were set out?"),
        Template("*-", "{name} packed {a} crates of {b} {things}, and {c} broke. How many {things} are whole?"),
    ),
)


def _apply(operation: str, left: int, right: int) -> int:
    if operation == "+":
        return left + right
    return left - right if operation == "-" else left * right


def _numbers(steps: str, rng: random.Random) -> tuple[list[int], list[int]]:
    """Return the numbers of a problem and the running result after each step, every result from 1 up."""
    numbers = [rng.randint(2, 6)] if steps[0] == "*" else [rng.randint(8, 20)]
    results: list[int] = []
    for operation in steps:
        so_far = results[-1] if results else numbers[0]
        # taking at most about half away leaves something for a second subtraction
        highest = {"+": 12, "-": min(so_far // 2 + 1, 12), "*": 9}[operation]
        numbers.append(rng.randint(2, highest))
        results.append(_apply(operation, so_far, numbers[-1]))
    return numbers, results


def _render(template: Template, texts: ProblemTexts, rng: random.Random) -> Problem:
    """Return ``template`` with random numbers, name and object."""
    numbers, results = _numbers(template.steps, rng)
    slots = dict(zip("abc", numbers, strict=False))
    text = template.text.format(name=rng.choice(texts.names), things=rng.choice(texts.things), **slots)
    lefts = [numbers[0], *results]
    working = " and ".join(
        f"{left} {operation} {right} = {result}"
        for left, operation, right, result in zip(lefts, template.steps, numbers[1:], results, strict=False)
    )
    return Problem(text, f"{working}. The answer is {results[-1]}.", str(results[-1]), template.steps)


def _problems(texts: ProblemTexts, rng: random.Random) -> Iterator[Problem]:
    """Yield distinct problems without end, the templates taking turns in random order."""
    seen: set[str] = set()
    while True:
        for template in rng.sample(texts.templates, len(texts.templates)):
            problem = _render(template, texts, rng)
            if problem.text not in seen:
                seen.add(problem.text)
                yield problem


def _require_count(count: int, highest: int, what: str) -> None:
    if not 1 <= count <= highest:
        raise ConfigError(
            f"Expected `count` to be between 1 and {highest}, the number of {what} on offer, but got {count!r}."
        )


class Arithmetic:
    """Word problems; the reply is one line of working and "The answer is N."."""

    name = "arithmetic"
    max_new_tokens = 48
    """A two-step reply has about 30 tokens when every digit is a token."""

    def __init__(self, path: Path | None = None) -> None:
        """Take no data file.

        Raises:
            ConfigError: ``path`` was given.
        """
        if path is not None:
            raise ConfigError(
                f"Expected `path` of task 'arithmetic' to be unset, but got {str(path)!r}. "
                "An embedded task takes no path: remove it."
            )

    def train_examples(self, *, count: int, seed: int) -> list[Example]:
        """Return ``count`` distinct problems with worked replies; the category is the number of steps.

        Raises:
            ConfigError: ``count`` is below 1 or above ``MAX_TRAIN``.
        """
        _require_count(count, MAX_TRAIN, "training problems")
        drawn = zip(range(count), _problems(TRAIN, random.Random(seed)), strict=False)
        return [
            Example(f"arithmetic-train-{i:06d}", (Turn("user", p.text),), p.reply, "task", f"{len(p.steps)}_step")
            for i, p in drawn
        ]

    def test_prompts(self, *, count: int | None = None) -> list[Prompt]:
        """Return the first ``count`` of the 300 test problems, the same ones in every run.

        Raises:
            ConfigError: ``count`` is below 1 or above 300.
        """
        count = NUM_TEST if count is None else count
        _require_count(count, NUM_TEST, "test problems")
        drawn = zip(range(count), _problems(TEST, random.Random(_TEST_SEED)), strict=False)
        return [
            Prompt(f"arithmetic-test-{i:06d}", p.text, "task", f"{len(p.steps)}_step", answer=p.answer)
            for i, p in drawn
        ]

    def parse(self, reply: str) -> str | None:
        """Return the number after the last "answer is", else the last number of the reply, else None.

        Thousands separators and a zero fraction are dropped. The second rule credits a right result in a free wording.

        Example:
            >>> Arithmetic().parse("5 + 7 = 12. The answer is 12.0.")
            '12'
        """
        numbers = _FINAL_ANSWER.findall(reply) or _ANY_NUMBER.findall(reply)
        if not numbers:
            return None
        whole, _, fraction = numbers[-1].replace(",", "").partition(".")
        return f"{whole}.{fraction}" if fraction.strip("0") else str(int(whole))

    def is_correct(self, reply: str, answer: str) -> bool:
        """Return whether the number in ``reply`` equals ``answer``."""
        return self.parse(reply) == answer
