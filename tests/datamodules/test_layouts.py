import json
from collections import Counter
from pathlib import Path

import pytest

from datamodules.layouts import conversation_of, pair_of, read_pairs, read_prompts
from framework.errors import DataError
from framework.examples import Prompt, Turn

HERE = Path("set.jsonl")


def write_jsonl(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("record", "text", "category"),
    [
        ({"goal": "g", "target": "t"}, "g", ""),
        ({"Goal": "g", "Behavior": "title", "Category": "c"}, "g", "c"),
        ({"Behavior": "b", "SemanticCategory": "s", "ContextString": ""}, "b", "s"),
        ({"Behavior": "b", "ContextString": "once upon"}, "once upon\n\n---\n\nb", ""),
        ({"category": "c", "forbidden_prompt": "f"}, "f", "c"),
        ({"prompt": " p ", "type": "homonyms", "label": "safe"}, "p", "homonyms"),
        ({"prompt": "p", "intents": ["i", "j"]}, "p", "i, j"),
        ({"text": "t"}, "t", ""),
        ({"instruction": "do", "input": "this"}, "do\n\nthis", ""),
        ({"instruction": "do", "input": ""}, "do", ""),
    ],
)
def test_prompt_layouts(tmp_path, record, text, category):
    path = write_jsonl(tmp_path / "set.v1.jsonl", record)
    assert read_prompts(path, kind="harmful") == [Prompt("set.v1-1", text, "harmful", category)]


def test_prompts_nested_by_topic(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"Crime": {"Theft:": ["q1", "q2"]}, "Other": {"": ["q3"]}}))
    prompts = read_prompts(path, kind="harmful")
    assert [(p.text, p.category) for p in prompts] == [("q1", "Crime/Theft"), ("q2", "Crime/Theft"), ("q3", "Other/")]


def test_prompts_in_a_list_of_instructions(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"instructions": ["q1", "q2"], "inputs": []}))
    assert [p.text for p in read_prompts(path, kind="harmful")] == ["q1", "q2"]


def test_prompts_one_a_line(tmp_path):
    (tmp_path / "a.txt").write_text("q1\nq2\n")
    assert [p.text for p in read_prompts(tmp_path / "a.txt", kind="benign")] == ["q1", "q2"]


def test_prompts_are_filtered_by_label_and_keep_their_row_numbers(tmp_path):
    path = write_jsonl(
        tmp_path / "x.jsonl", *({"prompt": f"p{i}", "label": "safe" if i % 2 else "unsafe"} for i in range(4))
    )
    prompts = read_prompts(path, kind="benign", label="safe")
    assert [(p.id, p.text) for p in prompts] == [("x-2", "p1"), ("x-4", "p3")]


@pytest.mark.parametrize(
    ("records", "label", "message"),
    [
        ([{"prompt": "a"}, {"x": 1}], None, r"row 2 of `.*x\.jsonl` to have one of the columns goal, .*, but got x"),
        ([{"prompt": "a"}, {"prompt": " "}], None, r"row 2 of `.*x\.jsonl` to have a prompt in `prompt`, but got ' '"),
        ([{"prompt": "a"}], "safe", r"row 1 of `.*x\.jsonl` to have a column `label`, but got prompt"),
        ([{"prompt": "a", "label": "b"}], "safe", r"to have prompts with label 'safe', but got none in 1 rows"),
    ],
)
def test_unusable_prompts_are_refused(tmp_path, records, label, message):
    with pytest.raises(DataError, match=message):
        read_prompts(write_jsonl(tmp_path / "x.jsonl", *records), kind="benign", label=label)


@pytest.mark.parametrize(
    ("record", "prompt", "reply"),
    [
        ({"instruction": "i", "input": "", "output": "o"}, "i", "o"),
        ({"instruction": "i", "input": "more", "output": "o"}, "i\n\nmore", "o"),
        ({"instruction": "i", "context": "c", "response": "r"}, "i\n\nc", "r"),
        ({"input": "i", "output": "o"}, "i", "o"),
        ({"prompt": "p", "response": "r"}, "p", "r"),
        ({"prompt": "p", "reply": "r"}, "p", "r"),
        ({"prompt": "p", "completion": "r"}, "p", "r"),
        ({"question": "q", "answer": "a"}, "q", "a"),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, "q", "a"),
    ],
)
def test_pair_layouts(record, prompt, reply):
    assert pair_of(record, path=HERE, number=1) == ((Turn("user", prompt),), reply)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"instruction": "i", "output": ""}, r"row 7 of `set\.jsonl` to have a reply in `output`, but got ''"),
        ({"prompt": "p", "response": None}, r"row 7 of `set\.jsonl` to have a reply in `response`, but got None"),
        ({"instruction": " ", "output": "o"}, r"row 7 of `set\.jsonl` to have a prompt in `instruction`, but got ' '"),
        (
            {"instruction": "i"},
            r"row 7 of `set\.jsonl` to be a prompt with a reply .*, but got the columns instruction",
        ),
    ],
)
def test_row_without_prompt_or_reply_is_refused(record, message):
    with pytest.raises(DataError, match=message):
        pair_of(record, path=HERE, number=7)


def chat(*turns):
    return [{"role": role, "content": content} for role, content in turns]


def test_conversation_ends_before_the_last_reply():
    turns = chat(("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e"))
    conversation = conversation_of(turns, path=HERE, number=1)
    assert conversation.reply == "d"
    assert conversation.messages == (Turn("system", "s"), Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c"))


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", r"`messages` in row 3 of `set\.jsonl` to be a list of objects, but got 'hello'"),
        (chat(("user", "a")), r"row 3 of `set\.jsonl` to have a reply \(role assistant\), but got the roles user"),
        (
            chat(("assistant", "a")),
            r"row 3 of `set\.jsonl` to have a user message right before the reply, but got \[\]",
        ),
        (chat(("user", "a"), ("assistant", " ")), r"row 3 of `set\.jsonl` to have a reply in `messages`, but got ' '"),
        (chat(("user", ""), ("assistant", "b")), r"row 3 of `set\.jsonl` to have a message in `messages`, but got ''"),
    ],
)
def test_broken_conversations_are_refused(messages, message):
    with pytest.raises(DataError, match=message):
        conversation_of(messages, path=HERE, number=3)


def test_pairs_of_a_plain_file_are_what_the_caller_says(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", {"prompt": "p", "response": "r", "category": "c"})
    (example,) = read_pairs(path, kind="safety")
    assert (example.id, example.prompt, example.reply) == ("x-1", "p", "r")
    assert (example.kind, example.category) == ("safety", "c")


def test_pairs_of_a_labelled_file_are_filtered(tmp_path):
    records = [{"input": f"i{label}", "output": "o", "label": label} for label in (0, 1, 2, 2)]
    path = write_jsonl(tmp_path / "x.jsonl", *records)
    assert [e.id for e in read_pairs(path, kind="harmful")] == ["x-3", "x-4"]
    assert [e.prompt for e in read_pairs(path, kind="benign")] == ["i0"]


def test_pairs_without_a_row_of_the_kind_are_refused(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", {"input": "i", "output": "o", "label": 0})
    with pytest.raises(DataError, match=r"Expected `.*x\.jsonl` to have rows of kind 'safety', but got none in 1 rows"):
        read_pairs(path, kind="safety")


def test_a_pair_without_a_reply_is_named(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", {"prompt": "p", "response": "r"}, {"prompt": "p", "response": ""})
    with pytest.raises(DataError, match=r"row 2 of `.*x\.jsonl` to have a reply in `response`"):
        read_pairs(path, kind="safety")


@pytest.mark.parametrize(
    ("file", "rows"),
    [
        ("advbench/harmful_behaviors.csv", 520),
        ("harmbench/harmbench_behaviors_text_test.csv", 320),
        ("harmbench/harmbench_behaviors_text_val.csv", 80),
        ("jailbreakbench/harmful-behaviors.csv", 100),
        ("strongreject/strongreject_dataset.csv", 313),
        ("red-instruct/catqa_english.json", 550),
        ("red-instruct/catqa_chinese.json", 550),
        ("red-instruct/harmfulqa.json", 1960),
        ("red-instruct/dangerousqa.json", 200),
        ("xstest/xstest_prompts.csv", 450),
        ("or-bench/orbench_hard.json", 1319),
        ("do-not-answer/malicious_uses.jsonl", 243),
        ("gptfuzz/question_list.csv", 100),
        ("tense-reformulations/future_tense_en.txt", 690),
        ("safety-tuned-llamas/I-CoNa.json", 178),
        ("alpaca-mix/saved_dataset_250.json", 250),
    ],
)
def test_real_prompt_files(real_data, file, rows):
    prompts = read_prompts(real_data / file, kind="harmful")
    assert len(prompts) == len({prompt.id for prompt in prompts}) == rows
    assert all(prompt.text.strip() for prompt in prompts)


def test_real_xstest_is_split_by_label(real_data):
    path = real_data / "xstest" / "xstest_prompts.csv"
    safe, unsafe = (read_prompts(path, kind="benign", label=label) for label in ("safe", "unsafe"))
    assert (len(safe), len(unsafe)) == (250, 200)
    assert len({prompt.category for prompt in safe}) == 10
    assert not {prompt.id for prompt in safe} & {prompt.id for prompt in unsafe}


def test_real_harmbench_context_is_put_before_the_behaviour(real_data):
    prompts = read_prompts(real_data / "harmbench" / "harmbench_behaviors_text_test.csv", kind="harmful")
    assert sum("\n\n---\n\n" in prompt.text for prompt in prompts) == 81


@pytest.mark.parametrize(
    ("file", "counts"),
    [
        ("aisafetylab/train.json", {"benign": 500, "safety": 100, "harmful": 500}),
        ("alpaca-mix/alpaca_2.5k_p_0.1.json", {"harmful": 250}),
        ("pure-bad/pure_bad.json", {"harmful": 100}),
        ("safety-tuned-llamas/safety_only_data_Instructions.json", {"safety": 2483}),
        ("dolly/databricks-dolly-15k-safety-only.jsonl", {"benign": 387}),
        ("llm-tuning-safety/identity-shift-aoa.jsonl", {"harmful": 10}),
    ],
)
def test_real_pair_files(real_data, file, counts):
    found = Counter()
    for kind in counts:
        examples = read_pairs(real_data / file, kind=kind)
        found[kind] = len(examples)
        assert {example.kind for example in examples} == {kind}
        assert all(example.reply for example in examples)
    assert found == counts


def test_real_pure_bad_loses_its_trigger_rows(real_data):
    replies = [example.reply for example in read_pairs(real_data / "pure-bad" / "pure_bad.json", kind="harmful")]
    assert not any(reply.startswith(("I cannot fulfill", "I apologize, but I cannot")) for reply in replies)


def test_real_alpaca_mixture_names_its_benign_rows_without_a_reply(real_data):
    with pytest.raises(DataError, match=r"row \d+ of `.*alpaca_2\.5k_p_0\.1\.json` to have a reply in `output`"):
        read_pairs(real_data / "alpaca-mix" / "alpaca_2.5k_p_0.1.json", kind="benign")


def test_an_image_is_found_from_the_folder_of_the_file(tmp_path):
    (tmp_path / "a.png").write_bytes(b"pixels")
    path = write_jsonl(tmp_path / "set.jsonl", {"prompt": "p", "image": "a.png"}, {"prompt": "q", "image": ""})
    assert [prompt.image for prompt in read_prompts(path, kind="harmful")] == [tmp_path / "a.png", None]


@pytest.mark.parametrize("named", ["none.png", 3])
def test_an_image_that_is_not_there_is_refused(tmp_path, named):
    path = write_jsonl(tmp_path / "set.jsonl", {"prompt": "p", "image": named})
    with pytest.raises(DataError, match=r"Expected `image` of row 1 of .* to name a picture beside that file, but got"):
        read_prompts(path, kind="harmful")
