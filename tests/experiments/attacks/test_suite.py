"""The suite file: every problem at once, before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.attacks.interface import ModelAttack
from experiments.attacks.registry import known_attacks
from experiments.attacks.suite import load_suite
from experiments.attacks.texts.transforms import TRANSFORMS
from framework.config import CONFIG_FOLDER
from framework.errors import ConfigError


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


def test_suite_is_named_after_its_file_and_labels_may_be_names(tmp_path):
    suite, attacks = load_suite(write(tmp_path, "attacks: {direct: {}, seen: {attack: templates, split: train}}"))
    assert suite.name == "mine"
    assert [(one.label, one.attack.name) for one in attacks] == [("direct", "direct"), ("seen", "templates")]
    assert attacks[1].attack.config.split == "train"


def test_every_problem_is_listed_at_once(tmp_path):
    text = """
        limt: 3
        max_new_tokens: 0
        judges: [nobody, "guard:none:x"]
        exclude_overlap: sometimes
        utility_floor: 2
        attacks:
          direct: {k: 1}
          first: {attack: tempates}
          second: {attack: nothing_of_the_kind}
          third: {attack: 3}
          best_of_n: {queries: 0}
          "a b": {attack: direct}
    """
    with pytest.raises(ConfigError) as caught:
        load_suite(write(tmp_path, text))
    told = "\n".join(caught.value.problems)
    for wanted in (
        "'limt'. Did you mean `limit`?",
        "`max_new_tokens` to be a whole number ≥ 1, but got 0",
        "`judges` to be one of harm, rules, but got 'nobody'",
        "none",
        "`exclude_overlap` to be one of report, exclude, exclude_near",
        "`utility_floor` to be a share between 0 and 1, but got 2",
        "`attacks.direct` to hold known keys only, but got 'k'",
        "but got 'tempates'. Did you mean 'templates'?",
        "but got 'nothing_of_the_kind'",
        "`attacks.third.attack` to be the name of an attack, but got 3",
        "`attacks.best_of_n.queries` to be a whole number ≥ 1, but got 0",
        "every label of `attacks` to be letters, digits, `-` and `_`, but got 'a b'",
    ):
        assert wanted in told, wanted


def test_no_attacks_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="Expected `attacks` to be not empty"):
        load_suite(write(tmp_path, "attacks: {}"))
    with pytest.raises(ConfigError, match="Expected `attacks` to be not empty"):
        load_suite(write(tmp_path, "attacks: {direct: {}}"), ["attacks.direct=null"])


def test_command_line_changes_and_leaves_out(tmp_path):
    path = write(tmp_path, "attacks: {direct: {}, best_of_n: {queries: 4}}")
    suite, attacks = load_suite(path, ["limit=2", "attacks.best_of_n.queries=9", "attacks.direct=null", "seed=3"])
    assert (suite.limit, suite.seed) == (2, 3)
    assert [(one.label, one.attack.config.queries) for one in attacks] == [("best_of_n", 9)]


def test_suite_extends_another(tmp_path):
    write(tmp_path, "limit: 5\nattacks: {direct: {}}")
    more = tmp_path / "more.yaml"
    more.write_text("extends: mine.yaml\nattacks: {persona: {}}")
    suite, attacks = load_suite(more)
    assert suite.limit == 5
    assert [one.label for one in attacks] == ["direct", "persona"]


def test_unknown_suite_names_the_known_ones():
    with pytest.raises(
        ConfigError,
        match="Expected `attack` to be a YAML file or one of full, harmful_curve, prompts, small, transforms",
    ):
        load_suite("smal")


@pytest.mark.parametrize("path", sorted((CONFIG_FOLDER / "attack").glob("*.yaml")), ids=lambda path: path.stem)
def test_suites_of_the_project_are_right(path):
    suite, attacks = load_suite(path.stem)
    if suite.name == "full":
        assert {one.attack.name for one in attacks} == set(known_attacks())
    if suite.name == "prompts":
        assert not any(one.attack.kind != "prompt" or one.attack.needs_prefill for one in attacks)
    if suite.name == "transforms":
        single = {one.label for one in attacks if one.attack.name == "obfuscation"}
        assert single == set(TRANSFORMS)
        assert {one.attack.budget for one in attacks if one.label != "direct"} == {10}
    if suite.name == "small":
        assert len(attacks) == 12
        assert {one.attack.kind for one in attacks} == {"prompt", "weights", "finetuning"}
        assert all(one.attack.num_models <= 2 for one in attacks if isinstance(one.attack, ModelAttack))
