from __future__ import annotations

import pytest

from framework.evaluation.coherence import DEGENERATE_CLASSES, MIN_WORDS, classify

PROMPT = "Tell me how tides are created by the moon and the sun."
LABELS = ["Positive", "Negative", "Sci/Tech"]
ANSWER = (
    "Tides are the rise and fall of the sea. The moon pulls at the water on its side more strongly than at the earth "
    "itself, and less strongly on the far side, so two bulges form. As the earth turns, a coast passes through both."
)

CASES = [
    ("empty", ""),
    ("empty", " \n\t"),
    ("empty", "... !!! ---"),
    ("bare_label", "Positive"),
    ("bare_label", "positive."),
    ("bare_label", "Label: Sci/Tech"),
    ("bare_label", "The sentiment is negative."),
    ("bare_label", "positive positive positive"),
    ("bare_label", "Zebra"),
    ("bare_label", "42"),
    ("echo", PROMPT),
    ("echo", "Tell me how tides are created by the moon and the sun? Yes."),
    ("echo", "how tides are created by the moon"),
    ("repeated", "no " * 30),
    ("repeated", "the sea the sea the sea the sea the sea"),
    ("repeated", "First comes the wave. " + "It goes up and down again. " * 6),
    ("repeated", "\n".join(f"{i}. Look at the moon" for i in range(1, 20))),
    ("repeated", "1 2 3 " * 8),
    ("short", "The moon pulls at the water."),
    (None, ANSWER),
    (None, ANSWER + " And so on." * 40),
    (None, "1. Take a bowl\n2. Pour in the water\n3. Tilt the bowl and watch\n4. Note the time"),
    (None, "The sentiment is positive because the film made the writer laugh."),
]


@pytest.mark.parametrize(("expected", "reply"), CASES)
def test_classes(expected, reply):
    assert classify(PROMPT, reply, task_labels=LABELS) == expected


def test_every_class_is_tried():
    assert {expected for expected, _ in CASES} == {None, *DEGENERATE_CLASSES}


def test_labels_matter_only_when_given():
    assert classify(PROMPT, "The sentiment is negative.") == "short"


def test_word_limit_is_exact():
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
    assert len(words) == MIN_WORDS
    assert classify(PROMPT, " ".join(words)) is None
    assert classify(PROMPT, " ".join(words[:-1])) == "short"


def test_long_loop_after_little_text_is_caught_whatever_its_length():
    stretch = " ".join(f"w{chr(97 + i)}" for i in range(20))
    assert classify(PROMPT, f"{stretch} " * 4) == "repeated"
