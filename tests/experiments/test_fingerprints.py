"""What decides an artefact besides its settings."""

from __future__ import annotations

from experiments.fingerprints import content_hashes, embedded_hash, resolved_methods, versions


def test_an_edited_file_changes_the_hashes(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("one")
    before = content_hashes({"source": str(path), "count": 3})
    path.write_text("two")
    after = content_hashes({"source": str(path), "count": 3})
    assert set(before) == set(after) == {str(path)}
    assert before != after


def test_a_folder_counts_with_every_file(tmp_path):
    (tmp_path / "a").write_text("a")
    (tmp_path / "b").write_text("b")
    assert len(content_hashes([str(tmp_path)])) == 2


def test_names_that_are_no_files_count_by_name_alone():
    assert content_hashes({"source": "embedded", "weight": 1.0, "none": None}) == {}


def test_methods_are_spelt_out_with_their_defaults():
    assert resolved_methods({"asft": {}}) == resolved_methods({"asft": {"weight": 1.0}})
    assert resolved_methods({"asft": {}}) != resolved_methods({"asft": {"weight": 2.0}})


def test_versions_and_embedded_sets_are_known():
    assert set(versions()) == {"torch", "transformers", "peft", "pytorch-lightning"}
    assert len(embedded_hash()) == 16


def test_where_rollouts_are_kept_decides_nothing(tmp_path):
    (tmp_path / "rollouts.jsonl").write_text("one")
    assert resolved_methods({"smh": {"store": str(tmp_path)}}) == resolved_methods({"smh": {}})
    assert resolved_methods({"smh": {"store": str(tmp_path), "ratio": 2.0}}) != resolved_methods({"smh": {}})
