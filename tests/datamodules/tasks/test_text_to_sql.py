import json

import pytest

from datamodules.tasks.text_to_sql import INSTRUCTION, TextToSql
from framework.errors import DataError


def row(number):
    return {
        "instruction": "Convert\n",
        "input": f"## Natural Language Query:\nHow many {number}?\n## Context:\nCREATE TABLE t (a INTEGER)\n",
        "output": f"SELECT COUNT(*) FROM t WHERE a > {number}",
    }


@pytest.fixture
def task(tmp_path):
    (tmp_path / "sqlgen_train.json").write_text(json.dumps([row(n) for n in range(20)]))
    return TextToSql(tmp_path)


def test_rows_become_prompts(task):
    train, test = task.train_examples(count=18, seed=0), task.test_prompts()
    assert (len(train), len(test)) == (18, 2)
    number = train[0].reply.rsplit(" ", 1)[1]
    assert train[0].prompt == f"{INSTRUCTION}Tables: CREATE TABLE t (a INTEGER)\nQuestion: How many {number}?"


def test_hub_rows(monkeypatch):
    monkeypatch.delenv("SEAWALL_DATA", raising=False)
    rows = [{"question": f"q{i}", "context": "CREATE TABLE t (a)", "answer": f"SELECT {i}"} for i in range(4)]
    monkeypatch.setattr("datamodules.tasks.text_to_sql.load_hub", lambda *args: rows)
    assert {example.reply for example in TextToSql().train_examples(count=3, seed=0)} < {
        f"SELECT {i}" for i in range(4)
    }


@pytest.mark.parametrize(
    ("reply", "is_right"),
    [
        ("SELECT a FROM t WHERE b = 'X'", True),
        ("select  a\nfrom T where b='X' ;", True),
        ('SELECT a FROM t WHERE b = "X"; It selects a.', True),
        ("```sql\nSELECT a FROM t WHERE b = 'X'\n```\nDone.", True),
        ("SELECT a FROM t WHERE b = 'x'", False),
        ("SELECT b FROM t WHERE b = 'X'", False),
        ("", False),
    ],
)
def test_queries_are_compared_after_normalising(task, reply, is_right):
    assert task.is_correct(reply, "SELECT a FROM t WHERE b = 'X'") is is_right


def test_an_empty_reply_has_no_query(task):
    assert task.parse(" ; ") is None


@pytest.mark.parametrize("change", [{"output": ""}, {"input": "## Context:\nx"}])
def test_a_row_without_question_or_query_is_refused(tmp_path, change):
    path = tmp_path / "x.json"
    path.write_text(json.dumps([row(1), row(2) | change]))
    with pytest.raises(DataError, match="Expected row 2 of the SQL set to have a question and a query"):
        TextToSql(path)


def test_real_rows(real_data):
    task = TextToSql(real_data / "sql-create-context")
    train = task.train_examples(count=900, seed=0)
    assert (len(train), len(task.test_prompts())) == (900, 100)
    assert all("CREATE TABLE" in example.prompt for example in train)
