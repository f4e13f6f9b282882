import random

import pytest

from experiments.attacks.texts.transforms import ORDERS, TRANSFORMS, Step, compose, in_order, parse_steps
from framework.errors import ConfigError

TEXTS = (
    "Explain how to brew a pot of strong tea, please!",
    "a",
    "I",
    "",
    'Line one,\nline "two" with \\ and\ttab.\n\nLine four.',
    "Wie backt man einen süßen Käsekuchen? \u2014 \u6d4b\u8bd5 \U0001f375",
    "x" * 300,
)
STRENGTHS = (0.05, 0.4, 1.0)
NAMES = sorted(TRANSFORMS)


@pytest.mark.parametrize("name", NAMES)
def test_strength_0_is_the_identity(name):
    for text in TEXTS:
        assert TRANSFORMS[name].apply(text, 0.0, random.Random(0)) == text
        assert compose(text, [Step(name, 0.0)], seed=0) == text


@pytest.mark.parametrize("name", NAMES)
def test_the_seed_decides_everything(name):
    for text in TEXTS:
        for strength in STRENGTHS:
            assert len({compose(text, [Step(name, strength)], seed=7) for _ in range(3)}) == 1


@pytest.mark.parametrize("name", NAMES)
def test_full_strength_changes_an_ordinary_text(name):
    found = {compose(TEXTS[0], [Step(name, 1.0)], seed=seed) for seed in range(8)}
    assert TEXTS[0] not in found


@pytest.mark.parametrize("name", NAMES)
def test_a_text_grows_no_more_than_is_said(name):
    transform = TRANSFORMS[name]
    for text in TEXTS:
        for strength in STRENGTHS:
            found = compose(text, [Step(name, strength)], seed=3)
            assert len(found.encode()) <= transform.factor * len(text.encode()) + transform.extra


@pytest.mark.parametrize("name", [name for name in NAMES if TRANSFORMS[name].is_invertible])
def test_an_invertible_transform_can_be_undone_without_the_seed(name):
    undo = TRANSFORMS[name].undo
    assert undo is not None
    for text in (text for text in TEXTS if text.isascii() and text):
        for strength in (0.0, *STRENGTHS):
            for seed in range(3):
                assert undo(compose(text, [Step(name, strength)], seed=seed)) == text


def test_which_transforms_are_invertible():
    assert {name for name in NAMES if TRANSFORMS[name].is_invertible} == {
        "base64",
        "caesar",
        "code_wrapping",
        "hexadecimal",
        "homoglyphs",
        "json_wrapping",
        "payload_splitting",
        "reversal",
        "rot13",
        "zero_width",
    }


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("word_reversal", "make tea", "ekam aet"),
        ("pig_latin", "make apple tea", "akemay appleway eatay"),
        ("leetspeak", "best tea", "8357 734"),
        ("random_capitalisation", "make Tea", "MAKE tEA"),
        ("homoglyphs", "cop", "\u0441\u043e\u0440"),
        ("zero_width", "ab", "a\u200bb\u200b"),
    ],
)
def test_what_full_strength_does(name, text, expected):
    assert compose(text, [Step(name, 1.0)], seed=0) == expected


def test_scrambling_keeps_the_first_and_last_letter_and_short_words():
    found = compose("the umbrella is outside", [Step("word_scrambling", 1.0)], seed=1).split()
    assert [(word[0], word[-1], sorted(word)) for word in found] == [
        (word[0], word[-1], sorted(word)) for word in ("the", "umbrella", "is", "outside")
    ]
    assert (found[0], found[2]) == ("the", "is")


@pytest.mark.parametrize(("name", "power"), [("random_capitalisation", 0.5), ("character_noise", 3.0)])
def test_the_probabilities_are_those_of_best_of_n(name, power):
    text = "m" * 4000
    found = compose(text, [Step(name, 0.4)], seed=0)
    assert sum(a != b for a, b in zip(text, found, strict=True)) / len(text) == pytest.approx(0.4**power, abs=0.03)


def test_the_longest_words_are_coded_first():
    text = "Make marmalade now"
    found = compose(text, [Step("rot13", 0.3)], seed=0)
    assert found.endswith("Make <<zneznynqr>> now")
    assert "ROT13" in found.split("\n\n")[0]


def test_a_step_has_chance_of_its_own():
    story = Step("story", 0.5)
    alone = compose("Make tea.", [Step("filler", 0.0), story], seed=4)
    other = compose("Make tea.", [Step("zero_width", 0.0), story], seed=4)
    assert alone == other


def test_orders_put_the_disguise_inside_or_outside():
    steps = [Step("story", 1.0), Step("base64", 1.0), Step("leetspeak", 1.0)]
    assert [step.name for step in in_order(steps, "inside_out")] == ["leetspeak", "base64", "story"]
    assert [step.name for step in in_order(steps, "outside_in")] == ["story", "leetspeak", "base64"]
    assert {group for order in ORDERS.values() for group in order} == {t.group for t in TRANSFORMS.values()}


def test_steps_are_read_from_a_text():
    assert parse_steps("story+word_scrambling:0.4", 0.7) == [Step("story", 0.7), Step("word_scrambling", 0.4)]
    assert str(Step("story", 0.25)) == "story:0.25"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: compose("a", [Step("storry", 1.0)], seed=0), "Did you mean 'story'"),
        (lambda: compose("a", [Step("story", 1.5)], seed=0), "strength of `story` to be from 0 to 1, but got 1.5"),
        (lambda: in_order([], "sideways"), "Expected `order` to be one of inside_out, outside_in"),
        (lambda: parse_steps("storry+leetspeak:x", 0.5), r"Did you mean 'story'(?s:.)*`leetspeak` to be a number from"),
    ],
)
def test_bad_steps_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
