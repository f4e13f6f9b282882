"""Who translates requests: a dictionary of words, a file of whole requests, or a translator of your own."""

from __future__ import annotations

import importlib
import random
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from datamodules.readers import find_file, read_json_value, read_records
from experiments.attacks.word_translations import WORDS
from framework.errors import ConfigError, DataError
from framework.examples import Prompt

__all__ = ["RequestFile", "Translation", "Translator", "WordDictionary", "load_translator", "read_dictionary"]

_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?")


class Translation(NamedTuple):
    """A request in other words."""

    text: str
    share: float
    """Share of its words that were replaced."""


class Translator(Protocol):
    """Puts requests into other languages."""

    @property
    def languages(self) -> Sequence[str]:
        """It knows."""

    def translate(self, request: Prompt, languages: Sequence[str], *, draw: random.Random) -> Translation | None:
        """Return the request in one language, or word by word in several; None where there is no translation.

        Args:
            request: in English.
            languages: one or several of ``languages``.
            draw: source of chance.
        """


class WordDictionary:
    """Replaces single words and leaves the others as they are."""

    def __init__(self, words: Mapping[str, Mapping[str, str]], *, share: float = 1.0) -> None:
        """Take a dictionary.

        Args:
            words: language to English word, in lower case, to its translation.
            share: of the words it knows, how many are replaced, by chance.
        """
        self._words = words
        self._share = share
        self.languages = tuple(words)

    def translate(self, request: Prompt, languages: Sequence[str], *, draw: random.Random) -> Translation | None:
        """Return the request with words replaced, each in one of the languages; never None.

        Args:
            request: in English.
            languages: known ones.
            draw: decides which words are replaced, and by which language.
        """
        num_words = num_replaced = 0

        def replaced(match: re.Match[str]) -> str:
            nonlocal num_words, num_replaced
            word = match.group()
            num_words += 1
            # Chance is drawn for every word, so that a longer dictionary changes only the words it adds.
            language, keep = draw.choice(list(languages)), draw.random() >= self._share
            other = self._words[language].get(word.lower())
            if other is None or keep:
                return word
            num_replaced += 1
            return other.capitalize() if word[0].isupper() and len(word) > 1 else other

        text = _WORD.sub(replaced, request.text)
        return Translation(text, num_replaced / max(1, num_words))


class RequestFile:
    """Whole requests, translated beforehand."""

    def __init__(self, path: str) -> None:
        """Read JSON lines with ``prompt`` (the English request or its id), ``language`` and ``translation``.

        Raises:
            DataError: the file cannot be read, or a row lacks one of these.
        """
        self.path = path
        found: dict[str, dict[str, str]] = {}
        file = find_file(path)
        for number, row in enumerate(read_records(file), start=1):
            texts = [row.get(key) for key in ("prompt", "language", "translation")]
            if not all(isinstance(text, str) and text.strip() for text in texts):
                raise DataError(
                    f"Expected row {number} of `{file}` to have the texts `prompt`, `language` and `translation`, but "
                    f"got {list(row)!r}."
                )
            prompt, language, translation = map(str, texts)
            found.setdefault(language, {})[prompt] = translation
        self._found = found
        self.languages = tuple(found)

    def translate(self, request: Prompt, languages: Sequence[str], *, draw: random.Random) -> Translation | None:
        """Return the request in one of the languages, or None where the file has none.

        Args:
            request: looked up by its text, then by its id.
            languages: with several, chance chooses one.
            draw: source of chance.
        """
        known = self._found[draw.choice(list(languages))]
        text = known.get(request.text) or known.get(request.id)
        return None if text is None else Translation(text, 1.0)


def load_translator(name: str) -> Translator:
    """Return the translator that ``package.module:name`` stands for, called without arguments.

    Raises:
        ConfigError: there is none of that name, or it is no translator.
    """
    module, _, attribute = name.partition(":")
    try:
        translator = getattr(importlib.import_module(module), attribute)()
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ConfigError(
            f"Expected `translator` to be package.module:name of something that makes a translator, but got {name!r} "
            f"({type(error).__name__}: {error})."
        ) from error
    if not callable(getattr(translator, "translate", None)) or not getattr(translator, "languages", None):
        raise ConfigError(
            f"Expected `translator` to make an object with `languages` and `translate`, but got {translator!r}."
        )
    found: Translator = translator
    return found


def read_dictionary(name: str | None) -> Mapping[str, Mapping[str, str]]:
    """Return language to word to translation: of a JSON file, or the small one that comes with the project.

    Raises:
        DataError: the file cannot be read or is laid out in another way.
    """
    if name is None:
        return WORDS
    path = find_file(name)
    value = read_json_value(path)
    is_right = isinstance(value, dict) and bool(value)
    is_right = is_right and all(isinstance(words, dict) and words for words in value.values())
    if not is_right or not all(isinstance(text, str) for words in value.values() for text in words.values()):
        raise DataError(f'Expected `{path}` to hold {{"LANGUAGE": {{"word": "translation"}}}}, but got something else.')
    return {language: {word.lower(): text for word, text in words.items()} for language, words in value.items()}
