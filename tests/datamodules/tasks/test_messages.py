import json

import pytest

from datamodules.tasks.messages import Messages
from framework.chat import ChatEncoder
from framework.errors import ConfigError, DataError
from framework.examples import Turn


def write(path, rows):
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return path


def chat(number):
    return [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": f"first {number}"},
        {"role": "assistant", "content": "ok"},
        {"role": "user", "content": f"second {number}"},
        {"role": "assistant", "content": f"answer {number}"},
    ]


@pytest.fixture
def task(tmp_path):
    return Messages(write(tmp_path / "x.jsonl", [chat(n) for n in range(20)]))


def test_the_last_reply_is_learnt_and_all_turns_before_it_are_the_prompt(task):
    for example in task.train_examples(count=18, seed=0):
        number = example.reply.split()[1]
        assert example.messages == (
            Turn("system", "be brief"),
            Turn("user", f"first {number}"),
            Turn("assistant", "ok"),
            Turn("user", f"second {number}"),
        )


def test_test_prompts_keep_the_turns_before_them(task, tiny_tokenizer):
    prompts = task.test_prompts()
    assert len(prompts) == 2
    for prompt in prompts:
        assert prompt.text == prompt.messages[-1].content
        assert [turn.role for turn in prompt.messages] == ["system", "user", "assistant", "user"]
        assert task.is_correct(prompt.answer.upper(), prompt.answer)
        assert "be brief" in ChatEncoder(tiny_tokenizer).render_prompt(prompt.messages)
    assert not {p.id for p in prompts} & {e.id for e in task.train_examples(count=18, seed=0)}


def test_replies_are_graded_by_words(task):
    assert task.parse("Answer!") == "answer"
    assert task.parse("") is None
    assert task.score("answer 2", "answer 1") == pytest.approx(0.5)


def test_counts_above_what_exists_are_refused(task):
    with pytest.raises(ConfigError, match="from 1 to 18, the number of training rows of task 'messages', but got 19"):
        task.train_examples(count=19, seed=0)
    with pytest.raises(ConfigError, match="from 1 to 2, the number of test prompts of task 'messages', but got 3"):
        task.test_prompts(count=3)


def test_a_conversation_without_a_reply_is_refused(tmp_path):
    path = write(tmp_path / "x.jsonl", [chat(0), chat(1)[:2]])
    with pytest.raises(DataError, match=r"Expected row 2 of `.*x\.jsonl` to have a reply \(role assistant\)"):
        Messages(path)


def test_a_row_without_messages_is_refused(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "p"}\n')
    with pytest.raises(DataError, match=r"Expected `messages` in row 1 of `.*x\.jsonl` to be a list of objects"):
        Messages(path)


def test_without_a_path_it_is_refused():
    with pytest.raises(ConfigError, match="Expected `path` of task 'messages' to be a file, but got None"):
        Messages()


def test_real_chats(real_data):
    task = Messages(real_data / "llm-tuning-safety" / "identity-shift-aoa.jsonl")
    (prompt,) = task.test_prompts()
    assert prompt.messages[0].role == "system"
    assert len(task.train_examples(count=9, seed=0)) == 9
