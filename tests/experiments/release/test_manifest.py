"""The canonical form, what a manifest may say, and which paths may stand in it."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

import pytest

from experiments.release import manifest as manifest_module
from experiments.release.manifest import (
    canonical_json,
    compare_files,
    list_files,
    make_manifest,
    parse_manifest,
    path_problem,
    read_time,
)
from framework.errors import DataError
from tests.experiments.release.conftest import NOW


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "bundle"
    (place / "model").mkdir(parents=True)
    (place / "a.txt").write_bytes(b"abc")
    (place / "model" / "w.safetensors").write_bytes(b"\0\1")
    return place


def value(folder, **changes):
    import json

    return json.loads(make_manifest(folder, name="x", created=NOW, expires=None)) | changes


def test_manifest_lists_every_file_with_its_hash_and_reads_back(folder):
    data = make_manifest(folder, name="x", created=NOW, expires=NOW + timedelta(days=2))
    found = parse_manifest(data)
    assert found.name == "x"
    assert found.created == NOW
    assert found.expires == NOW + timedelta(days=2)
    assert found.files["a.txt"].size == 3
    # sha256 of "abc", FIPS 180-2 appendix B.1
    assert found.files["a.txt"].sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert set(found.files) == {"a.txt", "model/w.safetensors"}
    assert compare_files(folder, found) == []


def test_same_files_give_the_same_bytes_in_whatever_order_they_were_written(folder, tmp_path):
    other = tmp_path / "other"
    (other / "model").mkdir(parents=True)
    (other / "model" / "w.safetensors").write_bytes(b"\0\1")
    (other / "a.txt").write_bytes(b"abc")
    (other / "manifest.json").write_text("not itself")
    made = [make_manifest(place, name="x", created=NOW, expires=None) for place in (folder, other)]
    assert made[0] == made[1]


def test_times_are_utc_whatever_the_zone():
    zone = timezone(timedelta(hours=2))
    assert read_time("2030-01-01T12:00:00Z") == datetime(2030, 1, 1, 14, tzinfo=zone)
    for wrong in ("2030-01-01", None, 5):
        with pytest.raises(DataError, match=r"Expected a time of manifest\.json to read like"):
            read_time(wrong)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "other"}, "to be a seawall-release of schema version 1, but got another"),
        ({"schema_version": 2}, "to be a seawall-release of schema version 1, but got another"),
        ({"more": 1}, "to have the keys"),
        ({"name": 3}, "to have the keys"),
        ({"expires": "soon"}, "to read like"),
        ({"files": {}}, "to list files, but got none"),
        ({"files": []}, "to list files, but got none"),
        ({"files": {"../a": {"size": 1, "sha256": "0" * 64}}}, "'../a' leads out of the bundle"),
        ({"files": {"a": {"size": True, "sha256": "0" * 64}}}, "to give size and SHA-256 of 'a'"),
        ({"files": {"a": {"size": 1, "sha256": "0" * 63 + "G"}}}, "to give size and SHA-256 of 'a'"),
        ({"files": {"a": {"size": -1, "sha256": "0" * 64}}}, "to give size and SHA-256 of 'a'"),
        ({"files": {"a": {"size": 1}}}, "to give size and SHA-256 of 'a'"),
    ],
)
def test_manifest_that_says_something_else_is_refused(changes, message, folder):
    with pytest.raises(DataError, match=message):
        parse_manifest(canonical_json(value(folder, **changes)))


def test_bytes_that_are_not_canonical_are_refused(folder):
    data = make_manifest(folder, name="x", created=NOW, expires=None)
    twice = data.replace(b'{"created"', b'{"name":"y","created"', 1)  # the last of two equal keys would win
    for other in (data + b"\n", b" " + data, data[:-1], twice):
        with pytest.raises(DataError, match="to be in canonical form"):
            parse_manifest(other)
    with pytest.raises(DataError, match=r"to give size and SHA-256 of 'a\.txt'"):
        parse_manifest(data.replace(b":3}", b":3.0}"))
    for other in (b"", b"{", b"\xff", b"[" * 100_000):
        with pytest.raises(DataError, match=r"Expected manifest\.json to be JSON"):
            parse_manifest(other)
    with pytest.raises(DataError, match="seawall-release"):
        parse_manifest(b"[]\n")


@pytest.mark.parametrize(
    "path", ["", ".", "..", "/a", "a/../b", "./a", "a/", "a//b", "a\\b", "C:\\a", "c:a", "a\n", "a\0", "signature.json"]
)
def test_path_that_may_not_stand_in_a_manifest(path):
    assert path_problem(path)


def test_plain_paths_may(folder):
    assert [path_problem(path) for path in ("a", "model/a.json", "a..b", "...", "model/manifest.json")] == [""] * 5


def test_folder_with_links_or_nothing_makes_no_manifest(folder, tmp_path):
    (folder / "link").symlink_to("a.txt")
    assert "symbolic link" in list_files(folder)[1][0].detail
    with pytest.raises(DataError, match=r"to hold plain files for a bundle\. 'link' is a symbolic link"):
        make_manifest(folder, name="x", created=NOW, expires=None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="It holds no files"):
        make_manifest(tmp_path / "empty", name="x", created=NOW, expires=None)


def shut(monkeypatch, owner, name, place):
    """Let a folder refuse ``name`` as it does for others than root, whom nothing is refused."""
    whole = getattr(owner, name)

    def refuse(path):
        if str(path) == str(place):
            raise PermissionError(13, "Permission denied", str(path))
        return whole(path)

    monkeypatch.setattr(owner, name, refuse)


def test_folder_that_cannot_be_listed_is_a_problem_and_hides_nothing(folder, monkeypatch):
    manifest = parse_manifest(make_manifest(folder, name="x", created=NOW, expires=None))
    (folder / "hidden").mkdir()
    (folder / "hidden" / "more.py").write_bytes(b"")
    shut(monkeypatch, manifest_module.os, "scandir", folder / "hidden")
    details = [problem.detail for problem in compare_files(folder, manifest)]
    assert details == ["'hidden' cannot be read: Permission denied."]
    with pytest.raises(DataError, match="'hidden' cannot be read"):
        make_manifest(folder, name="x", created=NOW, expires=None)


def test_root_that_cannot_be_listed_is_a_problem(folder, monkeypatch):
    shut(monkeypatch, manifest_module.os, "scandir", folder)
    assert [problem.detail for problem in list_files(folder)[1]] == ["'.' cannot be read: Permission denied."]


def test_file_of_a_folder_that_cannot_be_entered_is_a_problem(folder, monkeypatch):
    shut(monkeypatch, manifest_module.Path, "lstat", folder / "a.txt")
    paths, problems = list_files(folder)
    assert paths == ["model/w.safetensors"]
    assert [problem.detail for problem in problems] == ["'a.txt' cannot be read: Permission denied."]


def test_every_difference_of_the_files_is_named(folder, monkeypatch):
    manifest = parse_manifest(make_manifest(folder, name="x", created=NOW, expires=None))
    (folder / "a.txt").write_bytes(b"abd")
    (folder / "model" / "w.safetensors").write_bytes(b"\0")
    (folder / "more").write_bytes(b"")
    assert [problem.detail for problem in compare_files(folder, manifest)] == [
        "'a.txt' was changed: its SHA-256 differs.",
        "'model/w.safetensors' has 1 bytes instead of 2.",
        "'more' is not part of the bundle.",
    ]

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(manifest_module, "hash_file", refuse)
    assert compare_files(folder, manifest)[0].detail == "'a.txt' cannot be read: Permission denied."
