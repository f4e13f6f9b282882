"""Transforms of words and of the characters in them.

The first three are those of Best-of-N (Hughes et al., arXiv:2412.03556) with its exponents: with strength s, a word is
scrambled and a letter's case flipped with probability s^(1/2), and a sign replaced by a neighbour with probability s^3.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable

from experiments.attacks.texts.transform import Transform

__all__ = ["CHARACTER_TRANSFORMS"]

_WORD = re.compile(r"[^\W\d_]+")
_LEET = dict(zip("abegilostzABEGILOSTZ", "48391105724839110572", strict=True))
# Cyrillic letters that look like Latin ones, by code point for the eyes of whoever reads this file.
_ALIKE = {
    latin: chr(code)
    for latin, code in {
        "a": 0x430,
        "c": 0x441,
        "e": 0x435,
        "i": 0x456,
        "j": 0x458,
        "o": 0x43E,
        "p": 0x440,
        "s": 0x455,
        "x": 0x445,
        "y": 0x443,
        "A": 0x410,
        "B": 0x412,
        "C": 0x421,
        "E": 0x415,
        "H": 0x41D,
        "I": 0x406,
        "K": 0x41A,
        "M": 0x41C,
        "O": 0x41E,
        "P": 0x420,
        "T": 0x422,
        "X": 0x425,
    }.items()
}
_PLAIN = {alike: latin for latin, alike in _ALIKE.items()}
_ZERO_WIDTH = chr(0x200B)
_SEPARATORS = (" ", "-", ".", "_")


def _each_letter(text: str, probability: float, chance: random.Random, change: Callable[[str], str]) -> str:
    return "".join(change(sign) if chance.random() < probability else sign for sign in text)


def _each_word(text: str, probability: float, chance: random.Random, change: Callable[[str], str]) -> str:
    return _WORD.sub(lambda found: change(found[0]) if chance.random() < probability else found[0], text)


def _capitalise(text: str, strength: float, chance: random.Random) -> str:
    return _each_letter(text, strength**0.5, chance, lambda sign: sign.swapcase() if sign.isascii() else sign)


def _scramble(text: str, strength: float, chance: random.Random) -> str:
    def mixed(word: str) -> str:
        if len(word) <= 3:
            return word
        middle = list(word[1:-1])
        chance.shuffle(middle)
        return word[0] + "".join(middle) + word[-1]

    return _each_word(text, strength**0.5, chance, mixed)


def _noise(text: str, strength: float, chance: random.Random) -> str:
    def moved(sign: str) -> str:
        if not 32 < ord(sign) < 126:
            return sign
        return chr(ord(sign) + chance.choice((-1, 1)))

    return _each_letter(text, strength**3, chance, moved)


def _leet(text: str, strength: float, chance: random.Random) -> str:
    return _each_letter(text, strength, chance, lambda sign: _LEET.get(sign, sign))


def _homoglyphs(text: str, strength: float, chance: random.Random) -> str:
    return _each_letter(text, strength, chance, lambda sign: _ALIKE.get(sign, sign))


def _zero_width(text: str, strength: float, chance: random.Random) -> str:
    return _each_letter(text, strength, chance, lambda sign: sign + _ZERO_WIDTH)


def _spacing(text: str, strength: float, chance: random.Random) -> str:
    separator = chance.choice(_SEPARATORS)
    return _each_word(text, strength, chance, separator.join)


def _reverse_words(text: str, strength: float, chance: random.Random) -> str:
    return _each_word(text, strength, chance, lambda word: word[::-1])


def _pig_latin(text: str, strength: float, chance: random.Random) -> str:
    def moved(word: str) -> str:
        head = re.match(r"[^aeiouAEIOU]*", word)
        length = head.end() if head else 0
        return f"{word[length:]}{word[:length]}{'ay' if length else 'way'}"

    return _each_word(text, strength, chance, moved)


CHARACTER_TRANSFORMS = (
    Transform(
        "random_capitalisation",
        "characters",
        "flips the case of letters, each with probability sqrt(strength); Best-of-N's",
        _capitalise,
        1,
        0,
    ),
    Transform(
        "word_scrambling",
        "characters",
        "shuffles the inside of words longer than 3 letters, each with probability sqrt(strength); Best-of-N's",
        _scramble,
        1,
        0,
    ),
    Transform(
        "character_noise",
        "characters",
        "replaces ASCII signs by a neighbour, each with probability strength^3; Best-of-N's",
        _noise,
        1,
        0,
    ),
    Transform("leetspeak", "characters", "writes letters as digits, each with probability strength", _leet, 1, 0),
    Transform(
        "homoglyphs",
        "characters",
        "writes Latin letters as Cyrillic ones of the same look, each with probability strength",
        _homoglyphs,
        2,
        0,
        lambda text: "".join(_PLAIN.get(sign, sign) for sign in text),
    ),
    Transform(
        "zero_width",
        "characters",
        "puts a space of no width behind signs, each with probability strength",
        _zero_width,
        4,
        0,
        lambda text: text.replace(_ZERO_WIDTH, ""),
    ),
    Transform(
        "letter_spacing",
        "characters",
        "spells words with a separator between the letters, each with probability strength",
        _spacing,
        2,
        0,
    ),
    Transform("word_reversal", "words", "writes words backwards, each with probability strength", _reverse_words, 1, 0),
    Transform("pig_latin", "words", "puts words into pig latin, each with probability strength", _pig_latin, 4, 0),
)
