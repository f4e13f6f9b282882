import pytest

from datamodules.tasks.sst2 import INSTRUCTION, Sst2
from framework.errors import ConfigError, DataError


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "train.tsv").write_text('label\tsentence\n1\ta fine `` film\n0\t"dull\n')
    (tmp_path / "dev.tsv").write_text("label\tcontent\n0\tslow\n")
    return tmp_path


def test_rows_become_prompts_with_one_word_replies(folder):
    task = Sst2(folder)
    train = {example.prompt: example.reply for example in task.train_examples(count=2, seed=0)}
    assert train == {INSTRUCTION + "a fine `` film": "positive", INSTRUCTION + '"dull': "negative"}
    (prompt,) = task.test_prompts()
    assert (prompt.text, prompt.answer) == (INSTRUCTION + "slow", "negative")


@pytest.mark.parametrize(
    ("reply", "label"), [("Positive.", "positive"), ("it is negative", "negative"), ("positive/negative", None)]
)
def test_replies_are_parsed(folder, reply, label):
    task = Sst2(folder)
    assert task.parse(reply) == label
    assert task.is_correct(reply, "positive") == (label == "positive")


@pytest.mark.parametrize("row", ["2\tx", "x\ty", "1\t"])
def test_a_row_without_label_or_sentence_is_refused(folder, row):
    (folder / "dev.tsv").write_text(f"label\tsentence\n1\tok\n{row}\n")
    with pytest.raises(DataError, match="Expected row 2 of SST-2 to have a `sentence` and a `label` of 0 or 1"):
        Sst2(folder)


def test_real_rows(real_data):
    task = Sst2(real_data / "sst2")
    assert len(task.test_prompts()) == 872
    assert len(task.train_examples(count=3000, seed=0)) == 3000
    with pytest.raises(ConfigError, match="Expected `count` to be from 1 to 3000"):
        task.train_examples(count=3001, seed=0)
