from collections import Counter

import pytest

from datamodules.tasks import ag_news
from datamodules.tasks.ag_news import INSTRUCTION, AgNews
from framework.errors import DataError


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "train.csv").write_text('"1","T  #39;one","A\\b"\n"4","Two","C"\n')
    (tmp_path / "test.csv").write_text('"2","Three","D"\n')
    return tmp_path


def test_rows_become_prompts_with_topics(folder):
    task = AgNews(folder)
    train = {example.prompt: example.reply for example in task.train_examples(count=2, seed=0)}
    assert train == {INSTRUCTION + "T 'one. A b": "World", INSTRUCTION + "Two. C": "Sci/Tech"}
    (prompt,) = task.test_prompts()
    assert (prompt.text, prompt.answer) == (INSTRUCTION + "Three. D", "Sports")


def test_hub_rows_count_classes_from_zero(monkeypatch):
    monkeypatch.delenv("SEAWALL_DATA", raising=False)
    monkeypatch.setattr("datamodules.tasks.base.load_hub", lambda *args, **named: [{"text": "t", "label": 3}])
    assert AgNews().test_prompts()[0].answer == "Sci/Tech"


@pytest.mark.parametrize(
    ("reply", "topic"),
    [("World", "World"), ("sport", "Sports"), ("Technology", "Sci/Tech"), ("World, Sports, Business", None)],
)
def test_replies_are_parsed(folder, reply, topic):
    task = AgNews(folder)
    assert task.parse(reply) == topic
    assert task.is_correct(reply, "Sports") == (topic == "Sports")


@pytest.mark.parametrize("row", ['"5","a","b"', '"0","a","b"', '"1","",""'])
def test_a_row_without_class_or_text_is_refused(folder, row):
    (folder / "test.csv").write_text(row + "\n")
    with pytest.raises(
        DataError, match=r"Expected row 1 of AG News to be a class \(1 to 4\), a title and a description"
    ):
        AgNews(folder)


def test_real_rows_split_at_two_thousand(real_data):
    task = AgNews(real_data / "ag_news")
    train, test = task.train_examples(count=2000, seed=0), task.test_prompts()
    assert (len(train), len(test)) == (2000, 1000)
    assert set(Counter(prompt.answer for prompt in test)) == set(ag_news.LABELS)
    texts = [example.prompt for example in train] + [prompt.text for prompt in test]
    assert not any("#39;" in text or "quot;" in text or "\\" in text for text in texts)
