"""What the cache holds, what is chosen to go, and that a removal takes nothing from a run or from who is writing."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from filelock import FileLock

from experiments import cli
from framework.cache_contents import DAY, choose_entries, find_entries, finish_removals, remove_entry
from framework.files import ArtifactStore

NOW = 1_000_000_000.0


def put(store: ArtifactStore, kind: str, key: str, size: int, *, days: float) -> Path:
    """Write an artefact last used some days before ``NOW``."""
    with store.writing(kind, key) as folder:
        (folder / "weights.bin").write_bytes(b"x" * size)
    path = store.path(kind, key)
    os.utime(path / "manifest.json", (NOW - days * DAY, NOW - days * DAY))
    return path


def cut_off(store: ArtifactStore) -> None:
    """Begin an artefact ten days before ``NOW``."""
    with store.writing("stage", "cut off", keep_partial=True) as folder:
        (folder / "state.ckpt").write_bytes(b"x" * 500)
        os.utime(folder / "state.ckpt", (NOW - 10 * DAY, NOW - 10 * DAY))
        raise RuntimeError


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    """A cache of two old stages, a newer one, a small selection, an interrupted stage, and what is no artefact."""
    found = ArtifactStore(tmp_path / "cache" / "artifacts")
    for key, days in (("oldest", 40), ("old", 20), ("new", 1)):
        put(found, "stage", key, 1000, days=days)
    put(found, "nest_neurons", "n", 10, days=30)
    with pytest.raises(RuntimeError):
        cut_off(found)
    (found.root / "rollouts" / "abc").mkdir(parents=True)
    (found.root / "rollouts" / "abc" / "rollouts.jsonl").write_text("{}\n")
    (found.root / "verdicts-1.sqlite").write_bytes(b"v")
    return found


def names(entries: list) -> list[tuple[str, int, bool]]:
    return [(entry.kind, round((NOW - entry.used) / DAY), entry.is_finished) for entry in entries]


def test_every_artefact_is_found_the_longest_unused_first_and_nothing_else(store):
    entries = find_entries(store.root)
    stage, neurons = "stage", "nest_neurons"
    assert names(entries) == [
        (stage, 40, True), (neurons, 30, True), (stage, 20, True), (stage, 10, False), (stage, 1, True)
    ]  # fmt: skip
    assert [entry.size >= size for entry, size in zip(entries, (1000, 10, 1000, 500, 1000), strict=True)] == [True] * 5
    assert find_entries(store.root / "not there") == []


def test_age_kind_and_size_choose_together(store):
    entries = find_entries(store.root)
    assert names(choose_entries(entries, now=NOW, unused_days=25)) == [("stage", 40, True), ("nest_neurons", 30, True)]
    assert names(choose_entries(entries, now=NOW, kinds=["nest_neurons"])) == [("nest_neurons", 30, True)]
    total = sum(entry.size for entry in entries)
    assert choose_entries(entries, now=NOW, at_most=total) == []
    assert names(choose_entries(entries, now=NOW, at_most=total - 1)) == [("stage", 40, True)]
    assert len(choose_entries(entries, now=NOW, at_most=0)) == 5
    assert len(choose_entries(entries, now=NOW, at_most=0, unused_days=25)) == 2
    stages = sum(entry.size for entry in entries if entry.kind == "stage")
    assert names(choose_entries(entries, now=NOW, at_most=stages - 1, kinds=["stage"])) == [("stage", 40, True)]


def test_a_lookup_makes_an_artefact_the_newest_even_where_it_cannot_be_noted(store, monkeypatch):
    assert store.find("stage", "oldest") is not None
    assert find_entries(store.root)[-1].path == store.path("stage", "oldest")

    def refuse(path: Path) -> None:
        raise PermissionError(path)

    monkeypatch.setattr("framework.files.os.utime", refuse)
    assert store.find("stage", "old") == store.path("stage", "old")


def test_a_removed_artefact_is_gone_and_what_a_run_shares_stays(store, tmp_path):
    (oldest, *_) = find_entries(store.root)
    (run := tmp_path / "run").mkdir()
    os.link(oldest.path / "weights.bin", run / "weights.bin")
    (again, *_) = find_entries(store.root)
    assert oldest.freed == oldest.size
    assert again.freed == oldest.size - 1000
    assert remove_entry(oldest)
    assert store.find("stage", "oldest") is None
    assert not list(store.root.rglob("*.removed"))
    assert (run / "weights.bin").read_bytes() == b"x" * 1000
    assert remove_entry(oldest), "what another process removed first is removed"
    assert put(store, "stage", "oldest", 5, days=0).is_dir(), "it can be made again"


def test_what_is_being_written_is_left_alone(store):
    interrupted = next(entry for entry in find_entries(store.root) if not entry.is_finished)
    with FileLock(str(store.path("stage", "cut off")) + ".lock"):
        assert not remove_entry(interrupted)
    assert (interrupted.path / "state.ckpt").is_file()
    assert remove_entry(interrupted)
    assert not interrupted.path.exists()


def test_a_removal_that_a_crash_cut_off_is_finished_a_day_later(store, monkeypatch):
    entry = find_entries(store.root)[0]
    with monkeypatch.context() as patch:
        patch.setattr("framework.cache_contents.shutil.rmtree", lambda *_, **__: None)
        remove_entry(entry)
    (left,) = store.root.rglob(".*.removed")
    assert len(find_entries(store.root)) == 4, "half an artefact is none"
    finish_removals(store.root, now=left.stat().st_mtime + DAY / 2)
    assert left.exists()
    finish_removals(store.root, now=left.stat().st_mtime + 2 * DAY)
    assert not left.exists()


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict]:
    code = cli.main(["cache", *arguments])
    printed = capsys.readouterr().out
    return code, json.loads(printed) if printed.startswith("{") else {}


def test_the_command_lists_tries_and_removes(store, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SEAWALL_CACHE", str(tmp_path / "cache"))
    code, found = run(capsys, "--json")
    assert code == 0
    assert {kind: (one["number"], one["unfinished"]) for kind, one in found["kinds"].items()} == {
        "stage": (4, 1), "nest_neurons": (1, 0)
    }  # fmt: skip
    assert found["kinds"]["stage"]["bytes"] == found["kinds"]["stage"]["freed"] >= 3500
    code, trial = run(capsys, "remove", "--kind", "nest_neurons", "--dry-run", "--json")
    assert (code, trial["dry_run"], trial["kinds"]["nest_neurons"]["number"]) == (0, True, 1)
    assert len(find_entries(store.root)) == 5
    code, gone = run(capsys, "remove", "--at-most", "0.000000001", "--json")
    assert (code, sum(one["number"] for one in gone["kinds"].values()), gone["busy"]) == (0, 5, 0)
    assert find_entries(store.root) == []
    assert (store.root / "rollouts" / "abc" / "rollouts.jsonl").is_file()
    assert cli.main(["cache"]) == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "Expected `remove` to be told what to remove"),
        (["--kind", "stages"], "Expected `--kind` to be one of ['nest_neurons', 'stage'], but got stages."),
    ],
)
def test_nothing_is_removed_without_being_told_what(store, tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.setenv("SEAWALL_CACHE", str(tmp_path / "cache"))
    assert cli.main(["cache", "remove", *arguments]) != 0
    assert said in capsys.readouterr().err
    assert len(find_entries(store.root)) == 5


@pytest.mark.parametrize("value", ["-1", "nan", "inf", "a lot"])
def test_a_size_or_age_is_a_number(value, capsys):
    assert cli.main(["cache", "remove", "--at-most", value]) == 2
    assert f"--at-most: Expected a number >= 0, but got {value}." in capsys.readouterr().err
