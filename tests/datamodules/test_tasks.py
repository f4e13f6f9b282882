import json

import pytest

from datamodules.tasks import create_task, known_tasks
from framework.errors import ConfigError, DataError


def test_every_module_of_the_package_is_a_known_task():
    from pathlib import Path

    import datamodules.tasks

    modules = {path.stem for path in Path(datamodules.tasks.__file__).parent.glob("*.py")} - {"__init__", "base"}
    assert set(known_tasks()) == modules


@pytest.mark.parametrize("name", ["triage", "arithmetic"])
def test_embedded_tasks_need_no_files(name, monkeypatch):
    monkeypatch.delenv("SEAWALL_DATA", raising=False)
    task = create_task(name)
    assert task.name == name
    assert len(task.train_examples(count=7, seed=0)) == 7


def test_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(
        ConfigError, match=r"Expected `task` to be one of ag_news, .*, but got 'sts2'\. Did you mean 'sst2'"
    ):
        create_task("sts2")


def test_a_missing_path_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"Expected `.*/gone` to be a file, but found nothing"):
        create_task("sst2", tmp_path / "gone")


def test_a_file_of_instructions_is_a_task(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps([{"instruction": f"i{n}", "output": f"o{n}"} for n in range(20)]))
    task = create_task(str(path))
    assert task.name == "mine"
    assert len(task.train_examples(count=18, seed=0)) == 18
    assert len(task.test_prompts()) == 2


def test_a_file_of_chats_is_a_task(tmp_path):
    path = tmp_path / "mine.v2.jsonl"
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path.write_text((json.dumps({"messages": turns}) + "\n") * 5)
    task = create_task(str(path))
    assert task.name == "mine.v2"
    assert [example.reply for example in task.train_examples(count=4, seed=0)] == ["a"] * 4


def test_a_file_and_a_path_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="Expected `path` to be unset when `task` is a file, but got 'x'"):
        create_task(str(tmp_path / "a.jsonl"), "x")


def test_a_missing_file_is_refused():
    with pytest.raises(DataError, match=r"Expected `gone\.jsonl` to be a file, but found nothing"):
        create_task("gone.jsonl")


@pytest.mark.parametrize("name", ["sst2", "ag_news", "gsm8k", "instructions", "text_to_sql"])
def test_real_tasks_grade_their_own_answers_as_right(real_data, monkeypatch, name):
    monkeypatch.setenv("SEAWALL_DATA", str(real_data))
    task = create_task(name)
    prompts = task.test_prompts(count=30)
    assert all(task.is_correct(prompt.answer, prompt.answer) for prompt in prompts)
    assert len({task.is_correct(prompts[0].answer, prompt.answer) for prompt in prompts}) == 2
    assert not any(task.is_correct("", prompt.answer) for prompt in prompts)
    train = task.train_examples(count=50, seed=0)
    assert len({example.id for example in train}) == 50
    assert not {example.prompt for example in train} & {prompt.text for prompt in task.test_prompts()}
    assert train == task.train_examples(count=50, seed=0) != task.train_examples(count=50, seed=1)
