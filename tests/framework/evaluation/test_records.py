from __future__ import annotations

import json

import pytest

from framework.errors import DataError, SeawallError
from framework.evaluation.judges import Verdict
from framework.evaluation.records import EvaluationRecord, redact, write_samples


def record(**changes):
    settings = {
        "id": "a",
        "set_name": "embedded",
        "kind": "harmful",
        "prompt": "How?",
        "reply": "Like \u201cthis\u201d, then that.",
        "num_tokens": 7,
        "finished": True,
        "verdicts": {"rules": Verdict(refused=0.0, coherent=1.0, labels=("x",))},
    }
    return EvaluationRecord(**(settings | changes))


def test_samples_hold_everything(tmp_path):
    path = tmp_path / "new" / "samples.jsonl"
    write_samples(path, [record(), record(id="b", kind="task", verdicts={}, correct=False)])
    first, second = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert first["set"] == "embedded"
    assert first["reply"] == "Like \u201cthis\u201d, then that."
    assert first["verdicts"] == {"rules": {"refused": 0.0, "harmful": None, "coherent": 1.0, "labels": ["x"]}}
    assert (second["id"], second["correct"], second["verdicts"]) == ("b", False, {})


def test_no_samples_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"Expected `records` to be one or more evaluated prompts, but got none"):
        write_samples(tmp_path / "samples.jsonl", [])


def test_redaction_hides_replies_to_harmful_prompts_only():
    assert redact(record()).reply == "[reply of 4 words redacted]"
    assert redact(record()).prompt == "How?"
    benign = record(kind="benign")
    assert redact(benign) is benign


def test_first_judge_who_knows_decides():
    verdicts = {"guard": Verdict(harmful=0.7), "rules": Verdict(refused=1.0, harmful=0.0)}
    judged = record(verdicts=verdicts)
    assert judged.is_refused
    assert judged.is_harmful
    assert record().is_harmful is None


@pytest.mark.parametrize(("verdicts", "got"), [({}, "no judge"), ({"guard": Verdict(harmful=0.7)}, "guard")])
def test_refusal_must_be_known(verdicts, got):
    with pytest.raises(SeawallError, match=f"Expected a judge to say whether reply `a` refuses, but got {got}"):
        _ = record(verdicts=verdicts).is_refused


def test_short_refusal_is_not_degenerate():
    assert record(degenerate="short").is_degenerate
    assert not record(degenerate="short", verdicts={"rules": Verdict(refused=1.0)}).is_degenerate
