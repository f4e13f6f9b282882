from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from datamodules.tasks.arithmetic import MAX_TRAIN, TEST, TRAIN, Arithmetic
from framework.errors import ConfigError


def test_working_is_right_and_leads_to_the_answer() -> None:
    for example in Arithmetic().train_examples(count=2000, seed=0):
        working, _, final = example.reply.partition(". The answer is ")
        steps = [step.split(" = ") for step in working.split(" and ")]
        assert len(steps) == int(example.category[0])
        results = [int(result) for _, result in steps]
        assert [eval(left) for left, _ in steps] == results
        assert all(1 <= result <= 100 for result in results)
        assert final == f"{results[-1]}."
        for second, first in zip(steps[1:], results, strict=False):
            assert second[0].startswith(f"{first} ")


def test_numbers_of_the_working_are_those_of_the_problem() -> None:
    for example in Arithmetic().train_examples(count=500, seed=1):
        asked = Counter(re.findall(r"\d+", example.prompt))
        operands = [re.split(r" [+*-] ", step.split(" = ")[0]) for step in example.reply.split(". ")[0].split(" and ")]
        used = Counter([operands[0][0], *(pair[1] for pair in operands)])
        assert asked == used
        assert all(int(n) >= 2 for n in asked)


def test_train_examples_are_distinct_and_use_templates_evenly() -> None:
    examples = Arithmetic().train_examples(count=1700, seed=2)
    assert len({e.prompt for e in examples}) == len({e.id for e in examples}) == 1700
    assert examples[12].id == "arithmetic-train-000012"
    assert {e.kind for e in examples} == {"task"}
    one_step = sum(len(t.steps) == 1 for t in TRAIN.templates) / len(TRAIN.templates)
    assert abs(sum(e.category == "1_step" for e in examples) / 1700 - one_step) < 0.05


def test_train_examples_depend_on_the_seed_only() -> None:
    task = Arithmetic()
    assert task.train_examples(count=40, seed=4) == Arithmetic().train_examples(count=40, seed=4)
    assert task.train_examples(count=40, seed=4) != task.train_examples(count=40, seed=5)
    assert task.train_examples(count=10, seed=4) == task.train_examples(count=40, seed=4)[:10]


def test_the_largest_training_set_can_be_drawn() -> None:
    assert len({e.prompt for e in Arithmetic().train_examples(count=MAX_TRAIN, seed=0)}) == MAX_TRAIN


def test_test_prompts_are_fixed_and_distinct() -> None:
    prompts = Arithmetic().test_prompts()
    assert len({p.text for p in prompts}) == len({p.id for p in prompts}) == len(prompts) == 300
    assert all(p.kind == "task" and p.answer is not None and int(p.answer) >= 1 for p in prompts)
    assert Arithmetic().test_prompts(count=25) == prompts[:25]
    most_common = Counter(p.answer for p in prompts).most_common(1)[0][1]
    assert most_common < 0.1 * len(prompts)


def test_train_and_test_share_no_template_name_or_thing() -> None:
    assert set(TRAIN.names).isdisjoint(TEST.names)
    assert set(TRAIN.things).isdisjoint(TEST.things)
    assert {t.text for t in TRAIN.templates}.isdisjoint(t.text for t in TEST.templates)
    assert {t.steps for t in TEST.templates} <= {t.steps for t in TRAIN.templates}


@pytest.mark.parametrize(
    ("reply", "number"),
    [
        ("5 + 7 = 12. The answer is 12.", "12"),
        ("The answer is 3. No, the answer is 4.", "4"),
        ("the ANSWER is: **1,200**", "1200"),
        ("The answer is 12. Check: 12 - 7 = 5", "12"),
        ("The answer is 8.0", "8"),
        ("The answer is 8.5.", "8.5"),
        ("The answer is -3.", "-3"),
        ("The answer is 007", "7"),
        ("She has 17 apples.", "17"),
        ("10-3", "3"),
        ("The answer is twelve.", None),
        ("", None),
    ],
)
def test_parse(reply: str, number: str | None) -> None:
    assert Arithmetic().parse(reply) == number


def test_is_correct_compares_numbers() -> None:
    task = Arithmetic()
    assert task.is_correct("The answer is 12.", "12")
    assert not task.is_correct("The answer is 120.", "12")
    assert not task.is_correct("I do not know.", "12")


@pytest.mark.parametrize("count", [0, MAX_TRAIN + 1])
def test_impossible_train_count_is_refused(count: int) -> None:
    with pytest.raises(
        ConfigError, match="Expected `count` to be between 1 and 20000, the number of training problems"
    ):
        Arithmetic().train_examples(count=count, seed=0)


@pytest.mark.parametrize("count", [0, 301])
def test_impossible_test_count_is_refused(count: int) -> None:
    with pytest.raises(ConfigError, match="Expected `count` to be between 1 and 300, the number of test problems"):
        Arithmetic().test_prompts(count=count)


def test_a_path_is_refused() -> None:
    with pytest.raises(ConfigError, match="embedded task takes no path"):
        Arithmetic(Path("problems.jsonl"))
