"""The append-only transcript: what it keeps, what it drops, what it refuses."""

from __future__ import annotations

import pytest

from experiments.attacks.interface import Attempt, Query
from experiments.attacks.transcript import Transcript, read_transcript
from framework.errors import DataError, StorageError
from framework.examples import Prompt

KEY = {"attack": "direct", "model": "m"}


def attempt(number: int) -> Attempt:
    return Attempt(1, f"r{number}", f"r{number}", f"text {number}", "reply", is_success=number % 2 == 0)


def query(number: int, text: str | None = None) -> Query:
    prompt = Prompt(f"r{number}", text or f"text {number}", "harmful")
    return Query(prompt, prompt)


def test_attempts_come_back(tmp_path):
    path = tmp_path / "deep" / "t.jsonl"
    Transcript(path, KEY).add([attempt(0), attempt(1)])
    Transcript(path, KEY).add([attempt(2)])
    assert read_transcript(path) == [attempt(0), attempt(1), attempt(2)]
    again = Transcript(path, KEY)
    assert again.num_known == 3
    assert again.take([query(0), query(1)]) == [attempt(0), attempt(1)]
    assert again.take([query(2), query(3)]) == [attempt(2)]
    assert again.take([query(3)]) == []


def test_line_cut_short_is_dropped_wherever_it_was_cut(tmp_path):
    path = tmp_path / "t.jsonl"
    Transcript(path, KEY).add([attempt(0), attempt(1)])
    whole = path.read_bytes()
    second_ends = len(whole)
    first_ends = whole.rstrip(b"\n").rfind(b"\n") + 1
    for size in range(first_ends, second_ends):
        path.write_bytes(whole[:size])
        assert Transcript(path, KEY).num_known == 1
        assert path.read_bytes() == whole[:first_ends]


def test_file_cut_in_its_first_line_begins_anew(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"format": 1, "ke')
    transcript = Transcript(path, KEY)
    transcript.add([attempt(0)])
    assert read_transcript(path) == [attempt(0)]


def test_transcript_of_another_suite_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "t.jsonl"
    Transcript(path, KEY).add([attempt(0)])
    before = path.read_bytes()
    with pytest.raises(DataError, match="to be the transcript of this attack on this model, but got one of another"):
        Transcript(path, {**KEY, "model": "other"})
    assert path.read_bytes() == before


def test_damaged_line_in_the_middle_is_refused(tmp_path):
    path = tmp_path / "t.jsonl"
    Transcript(path, KEY).add([attempt(0), attempt(1)])
    lines = path.read_text().split("\n")
    path.write_text("\n".join([lines[0], "{broken", lines[2], ""]))
    with pytest.raises(DataError, match=r"Expected line 2 of .* to be JSON"):
        Transcript(path, KEY)
    path.write_text("\n".join([lines[0], '{"other": 1}', ""]))
    with pytest.raises(DataError, match=r"Expected line 2 of .* to be an attempt, but got other fields"):
        Transcript(path, KEY)


def test_another_query_than_the_transcript_holds_is_refused(tmp_path):
    path = tmp_path / "t.jsonl"
    Transcript(path, KEY).add([attempt(0)])
    with pytest.raises(DataError, match=r"to go on with query 'r0', but got 'r0'. The attack was changed"):
        Transcript(path, KEY).take([query(0, "other words")])


def test_missing_file_and_other_files_are_no_transcripts(tmp_path):
    with pytest.raises(DataError, match="to be a transcript, but found nothing"):
        read_transcript(tmp_path / "none.jsonl")
    (tmp_path / "other.jsonl").write_text('{"rows": 3}\n')
    with pytest.raises(DataError, match="to be a transcript of format 1, but got another file"):
        read_transcript(tmp_path / "other.jsonl")


def test_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"to be writable, but got .*Free some space"):
        Transcript(tmp_path / "file" / "t.jsonl", KEY)
