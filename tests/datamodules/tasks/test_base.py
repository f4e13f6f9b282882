import json

import pytest

from datamodules.tasks import base
from datamodules.tasks.base import (
    Pair,
    RowFiles,
    draw,
    exact_match,
    hold_out,
    parse_label,
    read_rows,
    task_examples,
    task_prompts,
    token_f1,
)
from framework.errors import ConfigError, DataError

FILES = RowFiles("toy", "train.jsonl", "test.jsonl", "owner/toy", hub_config="main", hub_test_split="validation")
PAIRS = [Pair(f"q{i}", f"r{i}", f"a{i}") for i in range(10)]


def write(path, name, count):
    path.mkdir(exist_ok=True)
    (path / name).write_text("".join(json.dumps({"n": i}) + "\n" for i in range(count)))
    return path


def test_rows_of_a_folder_with_both_files(tmp_path):
    write(tmp_path / "toy", "train.jsonl", 5)
    rows = read_rows(FILES, write(tmp_path / "toy", "test.jsonl", 3))
    assert (len(rows.train), len(rows.test)) == (5, 3)


def test_a_lone_file_is_cut_at_its_end(tmp_path):
    folder = write(tmp_path / "toy", "test.jsonl", 9)
    for path in (folder, folder / "test.jsonl"):
        rows = read_rows(FILES, path, test_share=1 / 3)
        assert [row["n"] for row in rows.train] == list(range(6))
        assert [row["n"] for row in rows.test] == [6, 7, 8]


def test_rows_below_the_data_folder(tmp_path, monkeypatch):
    write(tmp_path / "toy", "train.jsonl", 10)
    monkeypatch.setenv("SEAWALL_DATA", str(tmp_path))
    assert len(read_rows(FILES, None).train) == 9


def test_rows_from_the_hub(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(base, "load_hub", lambda *args, **named: calls.append((args, named)) or [{"n": 0}])
    monkeypatch.setenv("SEAWALL_DATA", str(tmp_path))
    assert read_rows(FILES, None) == ([{"n": 0}], [{"n": 0}])
    assert calls == [
        (("owner/toy", "train"), {"config": "main"}),
        (("owner/toy", "validation"), {"config": "main"}),
    ]


def test_a_folder_without_the_files_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"to hold train\.jsonl and test\.jsonl, but found neither"):
        read_rows(FILES, tmp_path)


def test_a_lone_file_that_is_too_short_is_refused(tmp_path):
    with pytest.raises(DataError, match="enough rows to hold out 10% of them, but got 3"):
        read_rows(FILES, write(tmp_path / "toy", "train.jsonl", 3))


def test_held_out_rows_are_a_seeded_share():
    train, test = hold_out(PAIRS, share=0.2)
    assert len(test) == 2
    assert sorted(train + test) == PAIRS
    assert hold_out(PAIRS, share=0.2) == (train, test)
    assert hold_out(PAIRS, share=0.2, seed=5) != (train, test)
    assert [len(part) for part in hold_out(PAIRS[:2], share=0.1)] == [1, 1]


def test_one_row_cannot_be_held_out():
    with pytest.raises(DataError, match="Expected at least 2 rows, so that one can be held out, but got 1"):
        hold_out(PAIRS[:1], share=0.1)


def test_drawing_is_without_replacement_and_nested():
    four, six = draw(PAIRS, 4, seed=0, what="rows"), draw(PAIRS, 6, seed=0, what="rows")
    assert six[:4] == four
    assert len(set(six)) == 6
    assert draw(PAIRS, None, seed=0, what="rows") == PAIRS


@pytest.mark.parametrize("count", [0, 11])
def test_drawing_more_than_there_are_is_refused(count):
    message = f"Expected `count` to be from 1 to 10, the number of training rows of task 'toy', but got {count}"
    with pytest.raises(ConfigError, match=message):
        task_examples(PAIRS, task="toy", count=count, seed=0)
    with pytest.raises(ConfigError, match="from 1 to 10, the number of test prompts of task 'toy'"):
        task_prompts(PAIRS, task="toy", count=count)


def test_examples_and_prompts_name_their_place():
    for example in task_examples(PAIRS, task="toy", count=10, seed=0):
        number = int(example.id.removeprefix("toy-train-"))
        assert (example.prompt, example.reply, example.kind) == (f"q{number - 1}", f"r{number - 1}", "task")
    (first, *_) = task_prompts(PAIRS, task="toy", count=None)
    assert (first.id, first.text, first.answer, first.kind) == ("toy-test-1", "q0", "a0", "task")


LABELS = {"positive": "pos", "good": "pos", "sci/tech": "tech", "negative": "neg"}


@pytest.mark.parametrize(
    ("reply", "label"),
    [
        ("positive", "pos"),
        ("\n  **Positive**.\nnegative", "pos"),
        ("It is good, so positive", "pos"),
        ("Sci/Tech", "tech"),
        ("positive or negative", None),
        ("positively", None),
        ("", None),
        ("neutral", None),
    ],
)
def test_labels_are_parsed(reply, label):
    assert parse_label(reply, LABELS) == label


@pytest.mark.parametrize(
    ("reply", "answer", "same"),
    [
        ("The  Cat!", "the cat", True),
        ("a cat", "the cat", False),
        ("", "x", False),
        ("?", "!", False),
        ("?", "?", True),
    ],
)
def test_exact_match(reply, answer, same):
    assert exact_match(reply, answer) is same


@pytest.mark.parametrize(
    ("reply", "answer", "score"),
    [
        ("the cat sat", "The cat, sat.", 1.0),
        ("the the cat", "the cat", 0.8),
        ("dog", "cat", 0.0),
        ("", "cat", 0.0),
        ("!", "!", 1.0),
    ],
)
def test_token_f1(reply, answer, score):
    assert token_f1(reply, answer) == pytest.approx(score)
