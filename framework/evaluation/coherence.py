"""Named classes of incoherent replies: what is neither a refusal nor an answer, and what stops in the middle.

Thresholds are ours, chosen so that ordinary replies of instruction-tuned models are not caught. Words are runs of
letters and digits, so the word counts mean little for scripts without spaces. A text is told from a heap of words by
the function words (the, of, und, de ...) of seven languages in the Latin alphabet; other scripts are not tried.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

__all__ = [
    "COHERENCE_CLASSES",
    "DEGENERATE_CLASSES",
    "MIN_WORDS",
    "classify",
    "is_bare_label",
    "is_echo",
    "is_random_words",
    "is_repeated",
    "is_truncated",
    "name_classes",
    "split_words",
]

DEGENERATE_CLASSES = ("empty", "bare_label", "echo", "repeated", "random_words", "short")
"""empty: no word; bare_label: a task label or a single word, off the topic of any other request; echo: copies the
prompt; repeated: goes round in a loop; random_words: words without grammar; short: under ``MIN_WORDS`` words. The first
that fits, in this order."""

COHERENCE_CLASSES = (*DEGENERATE_CLASSES, "truncated")
"""The degenerate classes and truncated: stops in the middle of a sentence. A truncated reply is still an answer."""

MIN_WORDS = 8
"""A reply with fewer words is too short to carry out a request."""

_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")
_LABEL_FRAME = frozenset(
    {"the", "a", "is", "it", "this", "label", "class", "category", "sentiment", "topic", "answer", "output", "final"}
)
_FUNCTION_WORDS_TEXT = (
    "the of to and a an in is it you that was for on are as with his they at be this from i have or by one had "
    "not but what all were when we there can your which their if will each how them then she her my who its our "
    "me he so no do does has been would could should more these those may into about any some also out up just "
    "than only other must le la les un une des du de et est en que qui dans pour pas sur au avec ce il elle je "
    "vous nous se ne par plus der die das und ist ein eine nicht zu den mit von sie ich auf dem es im auch wie el "
    "los las y por con para una del lo su di che e per non sono della o os da em um uma com na het een van dat ik "
    "te niet zijn op voor met "
)
_FUNCTION_WORDS = frozenset(_FUNCTION_WORDS_TEXT.split())
_MIN_WORDS_FOR_GRAMMAR = 12
_MIN_FUNCTION_SHARE = 0.08
_MIN_WORDS_A_LINE = 6
_MAX_SYMBOL_SHARE = 0.04
_LATIN = re.compile(r"[a-z\u00c0-\u024f'\u2019-]+")
_SYMBOL = re.compile(r"[^\w\s.!?'\u2019-]|[.:/](?=\w)")
_STOPS = frozenset(".!?\u2026\"'\u201d\u2019)]}*`|>:;~\u3002\uff01\uff1f")
_HEADING_WORDS = 3
_MIN_LOOPS = 3
_MIN_LOOP_SHARE = 0.5
_MIN_DISTINCT_SHARE = 0.5
_MIN_WORDS_FOR_SHARE = 20
_NGRAM = 4
_ENOUGH_DISTINCT = 40
_MIN_ECHO_BLOCK = 3
_ECHO_SHARE = 0.8


def split_words(text: str) -> list[str]:
    """Return the words of ``text`` in lower case.

    Example:
        >>> split_words("It's **fine**, really!")
        ["it's", 'fine', 'really']
    """
    return [word.lower() for word in _WORD.findall(text)]


def is_repeated(words: Sequence[str]) -> bool:
    """Return whether ``words`` go round in a loop.

    True if one stretch of any length said at least three times in a row makes up half of the words, or if fewer than
    half of the runs of four words are distinct (20 words or more). A reply with 40 distinct runs has said something
    before it went round, and is no loop. Numbers are left out first, so that a counted list of one sentence is one.

    Example:
        >>> is_repeated("you should do it and you should do it and you should do it and".split())
        True
    """
    spoken = [word for word in words if not word.isdigit()]
    total = len(spoken)
    if total < MIN_WORDS:
        return len(words) >= 2 * MIN_WORDS and len(set(words)) <= len(words) // _MIN_LOOPS
    grams = [tuple(spoken[i : i + _NGRAM]) for i in range(total - _NGRAM + 1)]
    num_distinct = len(set(grams))
    if num_distinct >= _ENOUGH_DISTINCT:
        return False
    if total >= _MIN_WORDS_FOR_SHARE and num_distinct < _MIN_DISTINCT_SHARE * len(grams):
        return True
    return any(_loop_length(spoken, period) >= _MIN_LOOP_SHARE * total for period in range(1, total // _MIN_LOOPS + 1))


def _loop_length(words: Sequence[str], period: int) -> int:
    """Return how many words the longest loop of ``period`` words covers; 0 if it goes round fewer than three times."""
    longest = run = 0
    for i in range(period, len(words)):
        run = run + 1 if words[i] == words[i - period] else 0
        longest = max(longest, run)
    return longest + period if longest + period >= _MIN_LOOPS * period else 0


def is_echo(prompt_words: Sequence[str], reply_words: Sequence[str]) -> bool:
    """Return whether at least 80 % of the reply are stretches of three words or more copied from the prompt in order.

    Example:
        >>> is_echo("how do i bake bread".split(), "how do i bake bread".split())
        True
    """
    if not reply_words:
        return False
    asked = set(prompt_words)
    # A word the prompt lacks cannot be copied: this settles nearly every reply without the slow comparison.
    if len([word for word in reply_words if word in asked]) < _ECHO_SHARE * len(reply_words):
        return False
    matcher = difflib.SequenceMatcher(None, prompt_words, reply_words, autojunk=False)
    copied = sum(block.size for block in matcher.get_matching_blocks() if block.size >= _MIN_ECHO_BLOCK)
    return copied >= _ECHO_SHARE * len(reply_words)


def is_bare_label(reply_words: Sequence[str], task_labels: Sequence[str] = ()) -> bool:
    """Return whether the reply is a single word, or only task labels with words such as "the answer is".

    Example:
        >>> is_bare_label(["the", "sentiment", "is", "positive"], ["positive", "negative"])
        True
    """
    if len(reply_words) == 1 or not task_labels:
        return len(reply_words) == 1
    label_words = {word for label in task_labels for word in split_words(label)}
    said = set(reply_words)
    return bool(said & label_words) and said <= label_words | _LABEL_FRAME


def is_random_words(reply: str, words: Sequence[str] | None = None) -> bool:
    """Return whether the reply is a heap of words without grammar.

    True for 12 words or more in the Latin alphabet, six or more to a line and hardly any other sign among them, of
    which fewer than 8 % are function words. Lists, tables and code have few of these too, but many signs and short
    lines. A shuffled sentence keeps its function words and is not found.

    Args:
        reply: what the model said.
        words: its words, if they are split already.

    Example:
        >>> is_random_words("copper lantern quickly river ninth basket orange wander steel proud chimney elbow")
        True
    """
    words = split_words(reply) if words is None else words
    # The cheapest condition first: it settles nearly every reply.
    if len([word for word in words if word in _FUNCTION_WORDS]) >= _MIN_FUNCTION_SHARE * len(words):
        return False
    if len(words) < _MIN_WORDS_FOR_GRAMMAR or not all(map(_LATIN.fullmatch, words)):
        return False
    lines = [line for line in reply.splitlines() if line.strip()]
    return len(words) >= _MIN_WORDS_A_LINE * len(lines) and len(_SYMBOL.findall(reply)) <= _MAX_SYMBOL_SHARE * len(
        words
    )


def is_truncated(reply: str) -> bool:
    """Return whether the reply stops in the middle: its last sign ends no sentence, quotation, block or list.

    A last line that is an entry of a list, or a heading of at most three words, may end without a full stop.

    Example:
        >>> is_truncated("First you mix the flour with"), is_truncated("Mix it.")
        (True, False)
    """
    text = reply.rstrip()
    if not text or text[-1] in _STOPS or (not text[-1].isalnum() and text[-1] not in ",-("):
        return False
    last = text.splitlines()[-1].strip()
    is_entry = re.match(r"(?:\d+[.)]|[-*\u2022])\s", last) is not None
    return not (is_entry or len(split_words(last)) <= _HEADING_WORDS)


def name_classes(prompt_text: str, reply: str, *, task_labels: Sequence[str] = ()) -> tuple[str, ...]:
    """Return every one of ``COHERENCE_CLASSES`` that the reply is in: at most one degenerate class, and truncated.

    Example:
        >>> name_classes("Tell me about tides.", "The moon pulls at the water of the sea and so it will")
        ('truncated',)
    """
    degenerate = classify(prompt_text, reply, task_labels=task_labels)
    truncated = degenerate not in ("empty", "bare_label") and is_truncated(reply)
    return tuple(name for name, holds in ((degenerate, True), ("truncated", truncated)) if name and holds)


def classify(prompt_text: str, reply: str, *, task_labels: Sequence[str] = ()) -> str | None:
    """Return the degenerate class of ``reply``, or None.

    A short refusal is "short" too; whoever counts decides which matters first.

    Args:
        prompt_text: what the user asked.
        reply: what the model said, without a forced opening.
        task_labels: labels of the task the model was tuned on, if it is a classification task.

    Returns:
        One of ``DEGENERATE_CLASSES``, or None.

    Example:
        >>> classify("Tell me about tides.", "Positive", task_labels=["positive"])
        'bare_label'
    """
    words = split_words(reply)
    if not words:
        return "empty"
    if is_bare_label(words, task_labels):
        return "bare_label"
    if is_echo(split_words(prompt_text), words):
        return "echo"
    if is_repeated(words):
        return "repeated"
    if is_random_words(reply, words):
        return "random_words"
    return "short" if len(words) < MIN_WORDS else None
