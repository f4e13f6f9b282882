import json

import pytest

from datamodules.tasks.gsm8k import INSTRUCTION, Gsm8k, plain_number
from framework.errors import DataError


def write(folder, **answers):
    for name, answer in answers.items():
        (folder / f"{name}.jsonl").write_text(json.dumps({"question": f"{name}?", "answer": answer}) + "\n")
    return folder


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path, train="He has 5*200=$<<5*200=1000>>1000.\n#### 1,000", test="#### -3")


def test_notes_are_dropped_and_the_end_is_fixed(folder):
    task = Gsm8k(folder)
    (example,) = task.train_examples(count=1, seed=0)
    assert example.prompt == "train?" + INSTRUCTION
    assert example.reply == "He has 5*200=$1000.\nThe final answer is: 1000"
    assert task.is_correct(example.reply, "1000")
    assert task.test_prompts()[0].answer == "-3"


@pytest.mark.parametrize(
    ("reply", "number"),
    [
        ("The final answer is: 42", "42"),
        ("The answer is $1,234.50. There were 3 steps.", "1234.5"),
        ("First answer is 3. The final answer is: **7**", "7"),
        ("so 5\n#### 6\n", "6"),
        ("12 and then 13.", "13"),
        ("it costs -4 dollars", "-4"),
        ("10-4", "4"),
        ("0.00", "0"),
        ("none", None),
        ("", None),
    ],
)
def test_numbers_are_parsed(folder, reply, number):
    assert Gsm8k(folder).parse(reply) == number


def test_numbers_are_compared_by_value(folder):
    task = Gsm8k(folder)
    assert task.is_correct("The final answer is: 1,000.00", "1000")
    assert not task.is_correct("The final answer is: 100", "1000")
    assert not task.is_correct("", "1000")


@pytest.mark.parametrize(("text", "number"), [("1e3", "1000"), ("100", "100"), ("x", None), ("", None)])
def test_plain_numbers(text, number):
    assert plain_number(text) == number


@pytest.mark.parametrize("answer", ["no number", "so #### many", ""])
def test_a_row_without_a_final_number_is_refused(tmp_path, answer):
    with pytest.raises(DataError, match=r"Expected row 1 of GSM8K to have a `question` and an `answer` that ends in"):
        Gsm8k(write(tmp_path, train="#### 1", test=answer))


def test_real_rows(real_data):
    task = Gsm8k(real_data / "gsm8k")
    train, test = task.train_examples(count=2500, seed=0), task.test_prompts()
    assert (len(train), len(test)) == (2500, 1319)
    assert not any("<<" in example.reply or "####" in example.reply for example in train)
    assert all(task.is_correct(f"The final answer is: {prompt.answer}", prompt.answer) for prompt in test)
    assert {task.parse(example.reply) == example.reply.rsplit(": ", 1)[1] for example in train} == {True}
