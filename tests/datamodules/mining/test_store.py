from __future__ import annotations

import errno
import json

import pytest

from datamodules.mining.store import RolloutStore, StoredRollout, prompt_digest
from framework.errors import DataError, StorageError

KEY = {"model": "abc", "temperature": 1.0}


def rollout(prompt="p", number=0, reply="a reply", digest="d"):
    return StoredRollout(prompt, digest, number, reply, 3, True)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / "rollouts.jsonl"


def fill(path, count=3, key=KEY):
    with RolloutStore(path, key) as store:
        store.add([rollout(number=i, reply=f"reply {i}\u2028 with\nlines") for i in range(count)])


def test_what_was_added_is_found_again(path):
    fill(path)
    with RolloutStore(path, KEY) as store:
        assert len(store) == 3
        assert store.num_dropped == 0
        assert store.rollouts("p", "d")[2] == rollout(number=2, reply="reply 2\u2028 with\nlines")
        assert store.rollouts("other", "d") == {}
        assert sorted(found.number for found in store) == [0, 1, 2]


def test_a_line_is_on_disk_as_soon_as_it_is_added(path):
    with RolloutStore(path, KEY) as store:
        store.add([rollout()])
        assert json.loads(path.read_text().splitlines()[1])["reply"] == "a reply"
        store.add([])
        assert path.read_text().count("\n") == 2


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_half_written_last_line_is_dropped(path, cut):
    fill(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    with RolloutStore(path, KEY) as store:
        assert store.num_dropped == 1
        assert len(store) == 2
        store.add([rollout(number=2, reply="reply 2\u2028 with\nlines")])
    assert path.read_bytes() == whole


def test_a_half_written_first_line_is_written_again(path):
    fill(path, count=0)
    whole = path.read_bytes()
    path.write_bytes(whole[:7])
    fill(path, count=0)
    assert path.read_bytes() == whole


def test_rollouts_of_another_model_are_refused(path):
    fill(path)
    before = path.read_bytes()
    with pytest.raises(DataError, match=r"to be this model's under these settings, but got another's \(model 'abc' th"):
        fill(path, key={**KEY, "model": "xyz"})
    with pytest.raises(DataError, match=r"temperature 1.0 there, 0.5 here.*name another folder with `store`"):
        fill(path, key={**KEY, "temperature": 0.5})
    assert path.read_bytes() == before
    fill(path, count=0)  # the lock was given back


def test_a_file_of_something_else_is_refused(path):
    path.parent.mkdir()
    path.write_text('{"prompt": "p"}\n')
    with pytest.raises(DataError, match=r"to begin with a line that says whose rollouts it holds, but got"):
        fill(path)


def test_a_damaged_line_is_refused(path):
    fill(path)
    lines = path.read_text(encoding="utf-8").split("\n")
    path.write_text("\n".join([lines[0], "{half", *lines[2:]]), encoding="utf-8")
    with pytest.raises(DataError, match=r"Expected line 2 of `.*` to be a rollout, but got '{half'. Delete the line"):
        fill(path)


def test_a_rollout_that_comes_twice_is_refused(path):
    fill(path)
    with RolloutStore(path, KEY) as store, pytest.raises(DataError, match=r"got number 1 of prompt 'p' again in what"):
        store.add([rollout(number=1)])
    with path.open("a", encoding="utf-8") as handle:
        handle.write(json.dumps(rollout(number=1)._asdict()) + "\n")
    with pytest.raises(DataError, match=r"once, but got number 1 of prompt 'p' again in line 5. Delete one"):
        fill(path)


def test_an_id_that_now_means_another_text_is_refused(path):
    fill(path)
    with RolloutStore(path, KEY) as store, pytest.raises(DataError, match=r"to be those of its text, but got rollouts"):
        store.rollouts("p", "another digest")


def test_a_store_that_is_not_open_takes_nothing(path):
    with pytest.raises(StorageError, match=r"to be open, but it is not. Use `with store:`"):
        RolloutStore(path, KEY).add([rollout()])


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"to be a file that rollouts can be added to, but got"):
        fill(tmp_path / "file" / "rollouts.jsonl")


class FullDisk:
    def write(self, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    def close(self):
        """Nothing is open."""


def test_a_full_disk_is_named(path):
    with RolloutStore(path, KEY) as store:
        store._handle.close()
        store._handle = FullDisk()
        with pytest.raises(StorageError, match=r"to be writable, but got: .*No space left"):
            store.add([rollout()])


def test_the_digest_depends_on_every_token():
    assert prompt_digest([1, 23]) != prompt_digest([12, 3])
    assert prompt_digest([1, 2]) == prompt_digest((1, 2))
