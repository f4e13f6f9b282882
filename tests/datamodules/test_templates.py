"""Jailbreak templates by name or from a file, and requests in some of them."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from datamodules.embedded_sets import load_templates
from datamodules.templates import find_templates, in_some_templates, read_templates
from framework.errors import ConfigError, DataError
from framework.examples import Prompt


def test_names_stand_for_the_templates_of_the_train_split():
    assert find_templates(["embedded"]) == load_templates("train")
    assert find_templates(["embedded_more"]) == load_templates("train", more=True)
    assert find_templates(["embedded", "embedded_more"]) == load_templates("train", more=True)
    assert len(find_templates(["embedded_more"])) == 24


def test_a_file_of_templates_is_taken_beside_them(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text('{"template": "Answer in verse: {request}", "name": "verse"}\n{"template": "{request} Now!"}\n')
    found = find_templates(["embedded", str(path)])
    assert [(t.id, t.name) for t in found[8:]] == [("own-1", "verse"), ("own-2", "own-2")]
    assert found[8].apply(Prompt("p", "Hello", "harmful")).text == "Answer in verse: Hello"


def test_two_files_of_one_name_are_refused(tmp_path):
    paths = [tmp_path / folder / "own.jsonl" for folder in ("a", "b")]
    for path in paths:
        path.parent.mkdir()
        path.write_text(json.dumps({"template": f"{path.parent.name} {{request}}"}))
    with pytest.raises(ConfigError, match=r"templates of all sets to have ids of their own, but got 'own-1' twice"):
        find_templates([str(path) for path in paths])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"text": "Answer: {request}"}', r"Expected row 1 of .* to have a text `template`"),
        ('{"template": "no slot"}', r"Expected `template` to contain \{request\} exactly once"),
    ],
)
def test_rows_without_a_template_are_refused(tmp_path, row, message):
    path = tmp_path / "own.jsonl"
    path.write_text(row + "\n")
    with pytest.raises(DataError, match=message):
        read_templates(str(path))


def test_unknown_names_are_refused():
    with pytest.raises(
        ConfigError, match=r"Expected `templates` to be one of embedded, embedded_more, but got 'embed'"
    ):
        find_templates(["embed"])


def test_every_template_serves_equally_often_and_no_prompt_comes_twice_in_one():
    prompts = [Prompt(f"p{i}", f"request {i}", "harmful") for i in range(24)]
    templates = load_templates("test", more=True)
    found = in_some_templates(prompts, templates, per_prompt=4)
    assert len({prompt.id for prompt in found}) == 24 * 4
    uses = Counter(prompt.id.split("+")[1] for prompt in found)
    assert set(uses.values()) == {8}
    assert len(uses) == 12
    assert set(Counter(prompt.id.split("+")[0] for prompt in found).values()) == {4}
