"""Jailbreak templates: which are tried, and what becomes of a request."""

from __future__ import annotations

import pytest

from datamodules.embedded_sets import load_templates
from experiments.attacks.prompts.templates import Templates, TemplatesConfig
from framework.errors import ConfigError, DataError
from tests.experiments.attacks.scripted import REQUESTS


def test_held_out_templates_are_the_default():
    attack = Templates(TemplatesConfig())
    assert attack.templates == load_templates("test")
    attack.start(REQUESTS, seed=0)
    rounds = [attack.ask() for _ in range(attack.budget)]
    assert attack.ask() == []
    assert [len(queries) for queries in rounds] == [len(REQUESTS)] * 4
    for queries in rounds:
        assert len({query.details["variant"] for query in queries}) == 1
        assert all(query.request.text in query.prompt.text for query in queries)


def test_templates_are_chosen_by_name_and_count():
    names = [template.name for template in load_templates("train")]
    attack = Templates(TemplatesConfig(split="train", names=[names[2], names[0], names[1]], count=2))
    assert [template.name for template in attack.templates] == [names[2], names[0]]


def test_templates_of_a_file(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text('{"template": "Answer in verse: {request}", "name": "verse"}\n')
    assert [template.name for template in Templates(TemplatesConfig(file=str(path))).templates] == ["verse"]
    path.write_text('{"text": "Answer in verse: {request}"}\n')
    with pytest.raises(DataError, match=r"Expected row 1 of .* to have a text `template`"):
        Templates(TemplatesConfig(file=str(path)))


def test_wrong_choices_are_refused():
    with pytest.raises(ConfigError, match=r"Expected `names` to be one of .* but got 'none_such'"):
        Templates(TemplatesConfig(names=["none_such"]))
    with pytest.raises(ConfigError, match="Expected `count` to be at most 4 templates, but got 9"):
        Templates(TemplatesConfig(count=9))
    with pytest.raises(ConfigError, match="`count` to be a whole number ≥ 1"):
        TemplatesConfig(count=0)
