from __future__ import annotations

import json

import pytest

from datamodules.mining import MinedPrompt, MinedSets, read_mined, write_mined
from datamodules.mining.hardness import Hardness
from datamodules.mining.selection import MinedReply
from framework.errors import DataError
from framework.examples import Prompt

TARGETS = (MinedReply(0, "No.\u2028I won't — ever", True), MinedReply(3, "cut o", False))
SETS = MinedSets(
    (MinedPrompt(Prompt("a", "do harm", "harmful", "fraud"), Hardness(2, 2, 5), TARGETS),),
    (MinedPrompt(Prompt("b", "be kind", "benign"), Hardness(0, 1, 1), TARGETS[:1]),),
    "abcd",
    "chat",
)
LINE = {"id": "a", "kind": "harmful", "prompt": "text", "counts": [1, 1, 2], "targets": [[0, "No.", True]]}

MINING = {"target": "safe", "judges": ["rules", "harm"]}


def read(path, *, model_key="abcd", **given):
    return read_mined(path, model_key=model_key, **{"template": "chat", **MINING, **given})


def test_what_was_written_is_read(tmp_path):
    write_mined(tmp_path / "mined.jsonl", SETS, **MINING)
    assert read(tmp_path / "mined.jsonl") == SETS


def test_another_model_is_refused(tmp_path):
    write_mined(tmp_path / "mined.jsonl", SETS, **MINING)
    with pytest.raises(DataError, match=r"mined from the model that is trained \(other\), but got .* another \(abcd\)"):
        read(tmp_path / "mined.jsonl", model_key="other")


def test_another_chat_template_or_system_message_is_refused(tmp_path):
    write_mined(tmp_path / "mined.jsonl", SETS, **MINING)
    with pytest.raises(DataError, match=r"under the system message and chat template of the training, but got others"):
        read(tmp_path / "mined.jsonl", template="other")


def test_a_file_that_names_no_model_is_taken_as_it_is(tmp_path):
    path = tmp_path / "hand.jsonl"
    path.write_text(json.dumps(LINE) + "\n")
    (mined,) = read(path, model_key="any").harmful
    assert mined.counts == (1, 1, 2)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"id": 3}, "line 1 of .* a text in `id`, but got 3"),
        ({"prompt": ""}, "a text in `prompt`, but got ''"),
        ({"kind": "task"}, "`kind` harmful or benign, but got 'task'"),
        ({"counts": [1, 2]}, r"`counts` of harmful, safe and all rollouts, but got \[1, 2\]"),
        ({"counts": [3, 2, 4]}, r"but got \[3, 2, 4\]"),
        ({"counts": [0, 0, 0]}, r"but got \[0, 0, 0\]"),
        ({"targets": ["No."]}, "`targets` of number, reply and whether it is whole, but got"),
    ],
)
def test_a_line_that_lacks_something_is_named(tmp_path, change, text):
    path = tmp_path / "hand.jsonl"
    path.write_text(json.dumps({**LINE, **change}) + "\n")
    with pytest.raises(DataError, match=text):
        read(path, model_key="any")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"target": "refusal"}, "to be mined with `target` 'refusal', but got 'safe'. Set `target` to what the file"),
        ({"judges": ["rules"]}, r"to be mined with `judges` \['rules'\], but got \['rules', 'harm'\]. Set `judges`"),
    ],
)
def test_a_file_mined_for_something_else_is_refused(tmp_path, change, text):
    write_mined(tmp_path / "mined.jsonl", SETS, **MINING)
    with pytest.raises(DataError, match=text):
        read(tmp_path / "mined.jsonl", **change)


def test_a_file_that_does_not_say_what_it_was_mined_for_is_refused(tmp_path):
    (tmp_path / "mined.jsonl").write_text(json.dumps({"mined_from": "abcd"}) + "\n" + json.dumps(LINE) + "\n")
    with pytest.raises(DataError, match="to be mined with `target` 'safe', but got None"):
        read(tmp_path / "mined.jsonl")


def test_the_order_of_the_judges_does_not_matter(tmp_path):
    write_mined(tmp_path / "mined.jsonl", SETS, **MINING)
    found = read(tmp_path / "mined.jsonl", target="safe", judges=["harm", "rules"])
    assert found == SETS
