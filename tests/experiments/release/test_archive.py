"""A bundle as one file: what it must be made of, byte for byte, and what never leaves it."""

from __future__ import annotations

import io
import tarfile

import pytest

from experiments.benchmarks.verify import change_file
from experiments.release.archive import pack, unpack
from experiments.release.manifest import compare_files, make_manifest, parse_manifest
from experiments.release.verify import VerifyOptions, verify_bundle
from tests.experiments.release.conftest import NOW


@pytest.fixture
def archive(model_bundle, tmp_path):
    pack(model_bundle, tmp_path / "bundle.tar")
    return tmp_path / "bundle.tar"


def test_archive_is_the_bundle_and_is_the_same_twice(archive, model_bundle, public_key, tmp_path):
    pack(model_bundle, tmp_path / "again.tar")
    assert (tmp_path / "again.tar").read_bytes() == archive.read_bytes()
    found = verify_bundle(archive, VerifyOptions(key=public_key, prompts=0), now=NOW)
    assert found.is_good, found.problems
    (tmp_path / "out").mkdir()
    assert unpack(archive, tmp_path / "out") == []
    manifest = parse_manifest((model_bundle / "manifest.json").read_bytes())
    assert compare_files(tmp_path / "out", manifest) == []


def test_every_random_single_byte_change_of_an_archive_is_detected(archive):
    changes = list(change_file(archive, count=25, seed=2, now=NOW))
    assert len(changes) == 25
    assert [change for change in changes if not change.problems] == []


def test_bytes_behind_the_end_and_a_cut_are_detected(archive):
    data = archive.read_bytes()
    for other in (data + b"\0" * 512, data[:-512], data[: len(data) // 2], b"", b"no archive at all" * 100):
        archive.write_bytes(other)
        found = verify_bundle(archive, VerifyOptions(prompts=0), now=NOW)
        assert found.to_dict()["bad_parts"] == ["archive"] or "manifest" in found.to_dict()["bad_parts"]


def entry(name: str, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname = kind, "/etc/hostname" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
    made.size = 2 if kind == tarfile.REGTYPE else 0
    return made


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (entry("../out.txt"), "leads out of the bundle"),
        (entry("/tmp/out.txt"), "is absolute"),
        (entry("model/../../out.txt"), "leads out of the bundle"),
        (entry("link", tarfile.SYMTYPE), "is no plain file"),
        (entry("link", tarfile.LNKTYPE), "is no plain file"),
        (entry("pipe", tarfile.FIFOTYPE), "is no plain file"),
        (entry("folder", tarfile.DIRTYPE), "is no plain file"),
    ],
)
def test_entry_that_is_no_file_of_the_bundle_is_refused_before_it_is_written(made, message, tmp_path):
    archive, folder = tmp_path / "x.tar", tmp_path / "out"
    folder.mkdir()
    with tarfile.open(archive, "w") as tar:
        tar.addfile(made, io.BytesIO(b"ab"))
    problems = unpack(archive, folder)
    assert message in problems[0].detail
    assert list(folder.iterdir()) == []
    assert not (tmp_path / "out.txt").exists()


def sparse_member(pax: dict[str, str], kind: bytes = tarfile.REGTYPE, data: bytes = b"ab") -> bytes:
    """One entry as `tar --sparse` writes it; tarfile writes none itself."""
    made = tarfile.TarInfo("a.txt")
    made.type, made.size, made.pax_headers = kind, len(data), pax
    block = bytearray(made.tobuf(tarfile.PAX_FORMAT))
    if kind == tarfile.GNUTYPE_SPARSE:  # one piece of 2 bytes at the end of a file of 1 MiB
        block[386:410] = b"%011o\0%011o\0" % (2**20 - 2, 2)
        block[483:495] = b"%011o\0" % 2**20
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block[:512])
    return bytes(block) + data.ljust(-len(data) // 512 * -512, b"\0") + b"\0" * 1024


SPARSE = {
    "old": sparse_member({}, tarfile.GNUTYPE_SPARSE),
    "0.1": sparse_member({"GNU.sparse.map": f"{2**20 - 2},2", "GNU.sparse.size": str(2**20)}),
    "1.0": sparse_member(
        {
            "GNU.sparse.major": "1",
            "GNU.sparse.minor": "0",
            "GNU.sparse.name": "a.txt",
            "GNU.sparse.realsize": "1048576",
        },
        data=b"1\n1048574\n2\n".ljust(512, b"\0") + b"ab",
    ),
    "contiguous": sparse_member({}, tarfile.CONTTYPE),
}


@pytest.mark.parametrize("kind", list(SPARSE))
def test_sparse_entry_that_would_fill_the_disk_is_refused_before_it_is_written(kind, tmp_path):
    archive, folder = tmp_path / "x.tar", tmp_path / "out"
    folder.mkdir()
    archive.write_bytes(SPARSE[kind])
    with tarfile.open(archive, "r:") as tar:
        assert next(iter(tar)).isreg()  # what the standard library says of it
    problems = unpack(archive, folder)
    assert "is no plain file" in problems[0].detail
    assert list(folder.iterdir()) == []


def test_archive_that_says_to_hold_more_bytes_than_it_has_is_refused_before_they_are_written(tmp_path):
    archive, folder = tmp_path / "x.tar", tmp_path / "out"
    folder.mkdir()
    made = tarfile.TarInfo("a.txt")
    made.size = 2**30
    archive.write_bytes(made.tobuf(tarfile.PAX_FORMAT) + b"\0" * 2048)
    assert "'a.txt' holds more bytes than the archive" in unpack(archive, folder)[0].detail
    assert list(folder.iterdir()) == []


def test_entry_far_down_makes_no_folders(tmp_path):
    archive, folder = tmp_path / "x.tar", tmp_path / "out"
    folder.mkdir()
    with tarfile.open(archive, "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(entry("a/" * 100 + "b"), io.BytesIO(b"ab"))
    assert "lies in too many folders" in unpack(archive, folder)[0].detail
    assert list(folder.iterdir()) == []


def test_file_that_stands_twice_is_refused(tmp_path):
    archive = tmp_path / "x.tar"
    (tmp_path / "out").mkdir()
    with tarfile.open(archive, "w") as tar:
        for _ in range(2):
            tar.addfile(entry("a.txt"), io.BytesIO(b"ab"))
    assert "holds 'a.txt' twice" in unpack(archive, tmp_path / "out")[0].detail


def test_archive_written_otherwise_is_refused(model_bundle, tmp_path):
    archive = tmp_path / "x.tar"
    with tarfile.open(archive, "w") as tar:
        for path in sorted(model_bundle.rglob("*")):
            if path.is_file():
                tar.add(path, path.relative_to(model_bundle).as_posix())
    (tmp_path / "out").mkdir()
    assert "not what packing its files gives" in unpack(archive, tmp_path / "out")[0].detail
    assert make_manifest(model_bundle, name="x", created=NOW, expires=None)
