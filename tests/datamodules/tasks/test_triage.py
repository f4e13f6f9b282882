from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from datamodules.tasks import triage
from datamodules.tasks.triage import INSTRUCTION, LABELS, TEST, TRAIN, Triage
from framework.errors import ConfigError


def test_train_examples_are_distinct_and_balanced() -> None:
    examples = Triage().train_examples(count=503, seed=1)
    assert len({e.prompt for e in examples}) == len({e.id for e in examples}) == len(examples) == 503
    assert examples[12].id == "triage-train-000012"
    assert {e.kind for e in examples} == {"task"}
    counts = Counter(e.reply for e in examples)
    assert set(counts) == set(LABELS)
    assert max(counts.values()) - min(counts.values()) <= 1


def test_train_examples_depend_on_the_seed_only() -> None:
    task = Triage()
    assert task.train_examples(count=50, seed=4) == Triage().train_examples(count=50, seed=4)
    assert task.train_examples(count=50, seed=4) != task.train_examples(count=50, seed=5)
    assert task.train_examples(count=20, seed=4) == task.train_examples(count=50, seed=4)[:20]


def test_few_rows_cover_many_templates() -> None:
    tickets = [e.prompt.removeprefix(INSTRUCTION) for e in Triage().train_examples(count=90, seed=0)]
    endings = {ticket.rstrip("?!.").split()[-1] for ticket in tickets}
    assert len(endings) > 40


def test_test_prompts_are_fixed_distinct_and_balanced() -> None:
    prompts = Triage().test_prompts()
    assert len({p.text for p in prompts}) == len({p.id for p in prompts}) == len(prompts) == 300
    assert Counter(p.answer for p in prompts) == dict.fromkeys(LABELS, 60)
    assert {p.kind for p in prompts} == {"task"}
    assert Triage().test_prompts(count=30) == prompts[:30]
    assert Counter(p.answer for p in prompts[:100]) == dict.fromkeys(LABELS, 20)


def test_train_and_test_share_no_template_filler_or_ticket() -> None:
    for slot, words in TRAIN.fillers.items():
        assert set(words).isdisjoint(TEST.fillers[slot])
    assert set(TRAIN.greetings) & set(TEST.greetings) == {""}
    for label in LABELS:
        assert set(TRAIN.templates[label]).isdisjoint(TEST.templates[label])
    train = {e.prompt for e in Triage().train_examples(count=1500, seed=0)}
    assert train.isdisjoint(p.text for p in Triage().test_prompts())


def test_every_ticket_is_short_and_names_the_labels() -> None:
    assert all(label in INSTRUCTION for label in LABELS)
    for texts in (TRAIN, TEST):
        for label in LABELS:
            for ticket in triage._tickets(label, texts, random.Random(0)):
                assert len((INSTRUCTION + ticket).split()) <= 35
                assert "{" not in ticket


@pytest.mark.parametrize(
    ("reply", "label"),
    [
        ("billing", "billing"),
        ("  \n Billing.\nmore", "billing"),
        ("**Shipping**", "shipping"),
        ("account issue", "account"),
        ("FEEDBACK!", "feedback"),
        ("feedback: good feedback", "feedback"),
        ("The label is technical", None),
        ("billing, technical, account, shipping or feedback", None),
        ("accounting", None),
        ("technically", None),
        ("", None),
        (" \n ", None),
        ("...", None),
    ],
)
def test_parse(reply: str, label: str | None) -> None:
    assert Triage().parse(reply) == label


def test_is_correct_compares_labels() -> None:
    assert Triage().is_correct("Billing.", "billing")
    assert not Triage().is_correct("shipping", "billing")
    assert not Triage().is_correct("", "billing")


def test_training_replies_are_correct_answers() -> None:
    task = Triage()
    assert all(task.is_correct(e.reply, e.category) for e in task.train_examples(count=100, seed=0))


@pytest.mark.parametrize("count", [0, -1, 100_000])
def test_impossible_train_count_is_refused(count: int) -> None:
    with pytest.raises(ConfigError, match=r"Expected `count` to be between 1 and \d+, the number of distinct tickets"):
        Triage().train_examples(count=count, seed=0)


@pytest.mark.parametrize("count", [0, 301])
def test_impossible_test_count_is_refused(count: int) -> None:
    with pytest.raises(ConfigError, match="Expected `count` to be between 1 and 300, the number of test prompts"):
        Triage().test_prompts(count=count)


def test_a_path_is_refused() -> None:
    with pytest.raises(ConfigError, match="embedded task takes no path"):
        Triage(Path("tickets.jsonl"))
