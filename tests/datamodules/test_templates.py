"""Jailbreak templates by name or from a file, and requests in some of them."""

from __future__ import annotations

import json
from collections import Counter
from importlib import resources

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
    rows = [{"template": "Answer in verse: {request}", "name": "verse"}, {"template": "{request} Now!"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    found = find_templates(["embedded", str(path)])[8:]
    assert [template.name for template in found] == ["verse", "template-2"]  # the same text once
    assert all(template.id.startswith("own-") for template in found)
    assert found[0].apply(Prompt("p", "Hello", "harmful")).text == "Answer in verse: Hello"


def test_the_id_of_a_template_is_that_of_its_text(tmp_path):
    paths = [tmp_path / folder / "own.jsonl" for folder in ("a", "b")]
    for path in paths:
        path.parent.mkdir()
    paths[0].write_text('{"template": "First: {request}"}\n{"template": "Second: {request}"}\n')
    paths[1].write_text('{"template": "Second: {request}"}\n{"template": "Third: {request}"}\n')
    first, second = (read_templates(str(path)) for path in paths)
    assert first[1].id == second[0].id
    assert len({template.id for template in first + second}) == 3
    assert len(find_templates([str(path) for path in paths])) == 3


def test_a_held_out_template_is_refused_wherever_it_stands(tmp_path):
    copy = tmp_path / "copy.jsonl"
    copy.write_text(json.dumps({"template": load_templates("test")[0].template}) + "\n")
    own = resources.files("datamodules") / "embedded" / "more_jailbreak_templates.jsonl"
    for path in (str(copy), str(own)):
        with pytest.raises(ConfigError, match=r"Expected `templates` to name templates to train with, but got .* with"):
            find_templates([path])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"text": "Answer: {request}"}', r"Expected row 1 of .* to have a text `template`"),
        ('{"template": "no slot"}', r"Row 1 of `.*own.jsonl`: Expected `template` to contain \{request\} exactly once"),
    ],
)
def test_rows_without_a_template_are_refused(tmp_path, row, message):
    path = tmp_path / "own.jsonl"
    path.write_text(row + "\n")
    with pytest.raises(DataError, match=message):
        read_templates(str(path))


def test_a_file_without_templates_is_refused(tmp_path):
    path = tmp_path / "empty.jsonl"
    path.write_text("")
    with pytest.raises(DataError, match=r"empty\.jsonl"):
        find_templates([str(path)])


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


@pytest.mark.parametrize("per_prompt", [0, 3])
def test_more_templates_a_prompt_than_there_are_are_refused(per_prompt):
    with pytest.raises(ConfigError, match=rf"Expected `per_prompt` to be from 1 to 2, .* but got {per_prompt}"):
        in_some_templates([Prompt("p", "x", "harmful")], load_templates("train")[:2], per_prompt=per_prompt)
