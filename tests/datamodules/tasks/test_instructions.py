import json

import pytest

from datamodules.tasks.instructions import Instructions
from framework.errors import DataError


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "x.jsonl"
    rows = [{"instruction": f"i{n}", "context": "c" if n % 2 else "", "response": f"Reply {n}."} for n in range(30)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_a_seeded_tenth_is_held_out(path):
    task = Instructions(path)
    train, test = task.train_examples(count=27, seed=0), task.test_prompts()
    assert len(test) == 3
    assert {e.prompt for e in train} | {p.text for p in test} == {f"i{n}" + "\n\nc" * (n % 2) for n in range(30)}
    assert [p.text for p in Instructions(path).test_prompts()] == [p.text for p in test]


def test_replies_are_graded_by_words(path):
    task = Instructions(path)
    assert task.is_correct("reply 3", "Reply 3.")
    assert not task.is_correct("reply 4", "Reply 3.")
    assert task.score("reply 4", "Reply 3.") == pytest.approx(0.5)
    assert task.parse("  Yes! ") == "yes"
    assert task.parse(" ") is None


def test_a_row_without_a_reply_is_refused(path):
    path.write_text(path.read_text() + json.dumps({"instruction": "i", "response": " "}) + "\n")
    with pytest.raises(DataError, match=r"Expected row 31 of `.*x\.jsonl` to have a reply in `response`, but got ' '"):
        Instructions(path)


def test_without_a_path_dolly_comes_from_the_hub(monkeypatch, tmp_path):
    monkeypatch.setenv("SEAWALL_DATA", str(tmp_path))
    rows = [{"instruction": f"i{n}", "context": "", "response": "r", "category": "qa"} for n in range(10)]
    monkeypatch.setattr("datamodules.tasks.instructions.load_hub", lambda *args: rows)
    assert len(Instructions().train_examples(count=9, seed=0)) == 9


def test_real_dolly(real_data, monkeypatch):
    monkeypatch.setenv("SEAWALL_DATA", str(real_data))
    task = Instructions()
    assert (len(task.train_examples(count=348, seed=0)), len(task.test_prompts())) == (348, 39)
