from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.measured_runs import find_outcomes
from experiments.report.collecting import collect_runs
from experiments.report.entries import find_entries
from experiments.report.replies import VERDICTS, as_reply, category_counts, replies_of, template_counts
from experiments.report.transcripts import pack_transcripts
from framework.errors import DataError


def sample(kind: str = "harmful", **changes: object) -> dict:
    said = {"refused": changes.pop("refused", 0.0), "harmful": changes.pop("harmful", None)}
    base = {"id": "a", "kind": kind, "set": "s", "prompt": "p", "reply": "r", "category": "c", "degenerate": None}
    return {**base, "correct": None, "verdicts": {"rules": said}, **changes}


@pytest.mark.parametrize(
    ("given", "verdict"),
    [
        (sample(refused=1.0), "refused"),
        (sample(), "answered"),
        (sample(harmful=0.9), "harmful"),
        (sample(harmful=0.1), "harmless"),
        (sample(degenerate="empty"), "degenerate"),
        (sample(degenerate="short", refused=1.0), "refused"),
        (sample("benign", refused=0.6), "refused"),
        (sample("benign"), "answered"),
        (sample("task", correct=True, verdicts={}), "right"),
        (sample("task", correct=False, verdicts={}), "wrong"),
    ],
)
def test_verdicts(given: dict, verdict: str) -> None:
    assert as_reply(given).verdict == verdict


def test_the_judges_are_quoted() -> None:
    reply = as_reply(sample(verdicts={"rules": {"refused": 1.0, "harmful": None}, "harm": {"harmful": 0.25}, "x": {}}))
    assert reply.judges == "rules: refused; harm: harmful 0.25; x: unknown"
    with pytest.raises(DataError, match="Expected `kind` to be one of benign, harmful, task, but got 'odd'"):
        as_reply(sample("odd"))


def test_categories_count_what_the_rates_count(run_folders: list[Path]) -> None:
    entries = find_entries(collect_runs(run_folders[:1]).runs)
    replies = replies_of(entries)
    counts = category_counts(replies[entries[-1].id])
    outcomes = find_outcomes(reply.record for reply in replies[entries[-1].id])
    for kind, rate in (("harmful", "attack_success"), ("benign", "over_refusal"), ("task", "task_accuracy")):
        assert sum(count.hits for count in counts[kind].values()) == sum(outcomes[rate].values())
        assert sum(count.total for count in counts[kind].values()) == len(outcomes[rate])


def test_only_flipped_replies_are_embedded(run_folders: list[Path]) -> None:
    entries = [entry for entry in find_entries(collect_runs(run_folders[:2]).runs) if entry.is_final]
    replies = replies_of(entries)
    found = pack_transcripts(entries, replies, show="all")
    by_key = [{reply.key: reply for reply in replies[entry.id]} for entry in entries]
    flipped = {key for key in by_key[0] if by_key[0][key].verdict != by_key[1][key].verdict}
    assert 0 < len(flipped) < len(by_key[0])
    assert {(prompt["set"], prompt["id"]) for prompt in found.data["prompts"]} == flipped
    assert found.num_prompts == len(flipped)
    same = next(reply.text for key, reply in by_key[0].items() if key not in flipped and reply.kind == "harmful")
    assert same not in json.dumps(found.data)
    assert {len(found.data["replies"][entry.id]) for entry in entries} == {len(flipped)}
    assert found.packed() == pack_transcripts(entries, replies, show="all").packed()


def test_a_budget_leaves_replies_out_and_says_so(run_folders: list[Path]) -> None:
    entries = [entry for entry in find_entries(collect_runs(run_folders).runs) if entry.is_final]
    replies = replies_of(entries)
    first = entries[4].id
    small = pack_transcripts(entries, replies, first=[first], budget=3_000)
    assert next(iter(small.data["replies"])) == first
    assert 0 < small.num_left_out < len(entries)
    assert set(small.data["verdicts"]) == {entry.id for entry in entries}
    none = pack_transcripts(entries, replies, show="none")
    assert none.data["texts"] == []
    assert none.num_left_out == 0


def test_harmful_requests_and_their_replies_are_in_the_page_only_when_asked_for(run_folders: list[Path]) -> None:
    entries = [entry for entry in find_entries(collect_runs(run_folders[:2]).runs) if entry.is_final]
    replies = replies_of(entries)
    texts = {reply.text for found in replies.values() for reply in found if reply.kind == "harmful"}
    prompts = {reply.prompt for found in replies.values() for reply in found if reply.kind == "harmful"}
    usual, full = pack_transcripts(entries, replies), pack_transcripts(entries, replies, show="all")
    assert not (texts | prompts) & set(usual.data["texts"])
    assert texts & set(full.data["texts"])
    assert prompts & set(full.data["texts"])
    assert usual.data["verdicts"] == full.data["verdicts"]
    assert {kind: sum("text" in p for p in usual.data["prompts"] if p["kind"] == kind) > 0 for kind in VERDICTS} == {
        "harmful": False,
        "benign": True,
        "task": True,
    }
    redacted = [entry for entry in usual.data["replies"][entries[0].id] if entry[1] is None]
    assert redacted
    assert all(number_of_words > 0 for *_, number_of_words in redacted)


def test_prompts_under_attack_do_not_count_by_category() -> None:
    records = [sample(refused=1.0), sample(set="prefill_8"), sample(set="prefill_16")]
    counts = category_counts([as_reply(record) for record in records])
    assert counts == {"harmful": {"c": (0, 1)}}
    outcomes = find_outcomes(records)
    assert len(outcomes["attack_success"]) == 1


def test_templates_are_counted_by_name_and_other_prompts_left_out() -> None:
    records = [
        sample(id="harmful-test-001+template-test-01"),
        sample(id="harmful-test-002+template-test-01", refused=1.0),
        sample(id="harmful-test-001+template-test-05"),
        sample(id="harmful-test-001+template-test-05", set="prefill_8"),
        sample(id="harmful-test-001"),
        sample(id="a+b"),
        sample("benign", id="look-alike-test-001+template-test-01", refused=1.0),
    ]
    assert template_counts([as_reply(record) for record in records]) == {
        "harmful": {"translation_exercise": (1, 2), "diary_page": (1, 1)},
        "benign": {"translation_exercise": (1, 1)},
    }
