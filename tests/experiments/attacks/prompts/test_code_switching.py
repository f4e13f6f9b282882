"""Code-switching: words and whole requests in other languages."""

from __future__ import annotations

import json
import random

import pytest

from experiments.attacks.prompts.code_switching import CodeSwitching, CodeSwitchingConfig
from experiments.attacks.translators import Translation, WordDictionary, load_translator, read_dictionary
from experiments.attacks.word_translations import WORDS
from framework.errors import ConfigError, DataError
from framework.examples import Prompt
from tests.experiments.attacks.scripted import REQUESTS

REQUEST = Prompt("x", "How do people open a school with the money?", "harmful")


class Loud:
    """A translator of one's own."""

    languages = ("loud",)

    def translate(self, request, languages, *, draw):
        return Translation(request.text.upper(), 1.0)


class Mute:
    """No translator."""


def asked(attack: CodeSwitching, requests=(REQUEST,)) -> dict[str, str]:
    attack.start(list(requests), seed=0)
    return {query.details["variant"]: query.prompt.text for _ in range(attack.budget) for query in attack.ask()}


def test_dictionary_has_a_few_dozen_words_in_three_languages():
    assert set(WORDS) == {"es", "fr", "de"}
    assert {len(words) for words in WORDS.values()} == {len(WORDS["es"])}
    assert len(WORDS["es"]) >= 60
    assert all(text.strip() for words in WORDS.values() for text in words.values())


def test_known_words_are_replaced_and_others_stay():
    found = asked(CodeSwitching(CodeSwitchingConfig(languages=["de"])))
    assert found == {"de": "Wie do Leute öffnen ein Schule mit der Geld?"}


def test_languages_are_tried_one_by_one_and_mixed():
    found = asked(CodeSwitching(CodeSwitchingConfig()))
    assert list(found) == ["es", "fr", "de", "mixed"]
    mixed = set(found["mixed"].strip("?").split())
    used = [name for name in ("es", "fr", "de") if mixed & (set(found[name].strip("?").split()) - {"do"})]
    assert len(used) > 1


def test_share_of_the_words_that_is_replaced():
    text = Prompt("x", "people " * 2000, "harmful")
    half = WordDictionary(WORDS, share=0.5).translate(text, ["fr"], draw=random.Random(0))
    assert half.share == pytest.approx(0.5, abs=0.05)
    assert WordDictionary(WORDS, share=0.0).translate(text, ["fr"], draw=random.Random(0)).text == text.text


def test_dictionary_of_a_file(tmp_path):
    path = tmp_path / "words.json"
    path.write_text('{"xx": {"People": "popoloj"}}')
    assert asked(CodeSwitching(CodeSwitchingConfig(dictionary=str(path))))["xx"].startswith("How do popoloj open")
    for wrong in ("[]", "{}", '{"xx": {}}', '{"xx": {"people": 3}}'):
        path.write_text(wrong)
        with pytest.raises(DataError, match="to hold"):
            read_dictionary(str(path))


def test_whole_requests_of_a_file(tmp_path):
    path = tmp_path / "requests.jsonl"
    rows = [{"prompt": one.text, "language": "zu", "translation": f"zu {one.id}"} for one in REQUESTS[:2]]
    rows.append({"prompt": REQUESTS[2].id, "language": "zu", "translation": "zu by id"})
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    attack = CodeSwitching(CodeSwitchingConfig(requests=str(path)))
    attack.start(REQUESTS, seed=0)
    assert [query.prompt.text for query in attack.ask()] == ["zu r0", "zu r1", "zu by id"]
    path.write_text(json.dumps(rows[0]) + "\n")
    attack = CodeSwitching(CodeSwitchingConfig(requests=str(path)))
    with pytest.raises(DataError, match="Expected translations of at least half of 4 requests, but got 1"):
        attack.start(REQUESTS, seed=0)
    path.write_text('{"prompt": "a", "language": "zu"}\n')
    with pytest.raises(DataError, match="to have the texts `prompt`, `language` and `translation`"):
        CodeSwitching(CodeSwitchingConfig(requests=str(path)))


def test_translator_of_ones_own(monkeypatch):
    import sys

    module = type(sys)("own_translators")
    module.Loud, module.Mute = Loud, Mute
    monkeypatch.setitem(sys.modules, "own_translators", module)
    attack = CodeSwitching(CodeSwitchingConfig(translator="own_translators:Loud"))
    assert asked(attack) == {"loud": REQUEST.text.upper()}
    with pytest.raises(ConfigError, match="Expected `translator` to make an object with `languages`"):
        load_translator("own_translators:Mute")
    for name in ("own_translators:None", "no_such_module:Loud", ""):
        with pytest.raises(ConfigError, match=r"Expected `translator` to be package.module:name"):
            load_translator(name)


def test_unknown_language_and_two_sources_are_refused():
    with pytest.raises(ConfigError, match="Expected `languages` to be one of de, es, fr, but got 'xx'"):
        CodeSwitching(CodeSwitchingConfig(languages=["xx"]))
    with pytest.raises(ConfigError, match="Expected one of `dictionary`, `requests` and `translator`, but got"):
        CodeSwitchingConfig(dictionary="a.json", translator="b:c")
