"""Multiple choice, question by question: counts, intervals, and models that answer alike."""

from __future__ import annotations

import json

import pytest

from experiments import paired_choices
from experiments.paired_choices import compare_choices, main
from experiments.statistics import mcnemar_exact
from framework.errors import ConfigError, DataError
from framework.model_files import model_fingerprint
from tests.conftest import make_model, make_tokenizer

QUESTIONS = "question,choice0,choice1,choice2,choice3,answer\n" + "".join(
    f"What is {n}?,a,b,c,d,{n % 4}\n" for n in range(12)
)


def test_changed_sides_are_counted_both_ways():
    first, second = [1] * 30 + [0] * 30, [1] * 20 + [0] * 10 + [1] * 4 + [0] * 26
    row = compare_choices({"base": first, "tuned": second}, baseline="base")["rows"][1]
    assert (row["right"], row["questions"], row["only_baseline"], row["only_candidate"]) == (24, 60, 10, 4)
    assert row["difference"] == pytest.approx(-0.1)
    assert row["low"] < row["difference"] < row["high"]
    assert row["p_holm"] == mcnemar_exact(first, second).p_value


def test_one_model_or_other_questions_are_refused():
    with pytest.raises(ConfigError, match="a baseline and at least one other model, but got base"):
        compare_choices({"base": [1, 0]}, baseline="base")
    with pytest.raises(DataError):
        compare_choices({"base": [1, 0], "tuned": [1]}, baseline="base")


@pytest.fixture
def given(tmp_path):
    for name in ("one", "two"):
        make_model().save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    (tmp_path / "q_test.csv").write_text(QUESTIONS)
    return [f"{name}={tmp_path / name}" for name in ("one", "two")]


def test_one_model_and_one_that_is_not_there_are_refused_before_any_is_scored(tmp_path, capsys, monkeypatch, given):
    def score(*args, **options):
        pytest.fail("a model was scored")

    monkeypatch.setattr(paired_choices, "right_answers", score)
    choices = ["--choices", str(tmp_path / "q_test.csv")]
    assert main([given[0], *choices]) == 2
    assert "a baseline and at least one other model, but got one" in capsys.readouterr().err
    assert main([given[0], f"gone={tmp_path / 'gone'}", *choices]) == 2
    assert str(tmp_path / "gone") in capsys.readouterr().err


def test_a_model_and_its_copy_change_no_question(tmp_path, capsys, given):
    output = tmp_path / "found.json"
    assert main([*given, "--choices", str(tmp_path / "q_test.csv"), "--system", "", "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    assert (found["choices"], found["system"], found["baseline"]) == (str(tmp_path / "q_test.csv"), "", "one")
    assert found["fingerprints"] == {name: model_fingerprint(tmp_path / name) for name in ("one", "two")}
    rows = found["rows"]
    assert rows[0]["questions"] == 12
    assert (rows[1]["difference"], rows[1]["low"], rows[1]["high"], rows[1]["p_holm"]) == (0, 0, 0, 1)
    assert "two: " in capsys.readouterr().out
    assert main([given[0], given[0], "--choices", str(tmp_path / "q_test.csv")]) == 2
