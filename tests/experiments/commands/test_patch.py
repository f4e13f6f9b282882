from __future__ import annotations

import json

import pytest

from experiments.cli import main
from framework.model_files import model_fingerprint
from methods.nest.patch import write_patch
from tests.conftest import make_model, make_tokenizer
from tests.methods.nest.test_patched_folders import patch_for
from tests.methods.nest.tiny_neurons import move_vectors, prepared


@pytest.fixture
def patch(tmp_path, monkeypatch):
    monkeypatch.setenv("SEAWALL_CACHE", str(tmp_path / "cache"))
    model = make_model()
    method = prepared(tmp_path, model, max_rows=4)
    make_tokenizer().save_pretrained(tmp_path / "start")
    method.prepare_model(model)
    move_vectors(model)
    method.edit_weights(model)
    write_patch(method._patch, tmp_path / "mend.safetensors")
    return tmp_path / "mend.safetensors"


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_apply_inspect_and_remove(patch, tmp_path, capsys):
    start, on, off = tmp_path / "start", tmp_path / "on", tmp_path / "off"
    code, out, _ = run(capsys, "patch", "apply", start, patch, "--output", on, "--json")
    assert code == 0
    rows = json.loads(out)["rows"]
    assert rows > 0
    code, out, _ = run(capsys, "patch", "inspect", patch, "--json")
    assert (code, json.loads(out)["rows"]) == (0, rows)
    code, out, _ = run(capsys, "patch", "inspect", patch)
    assert code == 0
    assert "gate_proj:gate" in out
    code, out, _ = run(capsys, "patch", "inspect", on)
    assert code == 0
    assert "carries mend on the base" in " ".join(out.split())
    code, out, _ = run(capsys, "patch", "remove", on, "mend", "--base", start, "--output", off)
    assert code == 0
    assert f"{rows} rows as they were before" in " ".join(out.split())
    assert model_fingerprint(off) == model_fingerprint(start)


def test_originals_kept_on_request_make_the_base_unnecessary(patch, tmp_path, capsys):
    assert (
        run(capsys, "patch", "apply", tmp_path / "start", patch, "--output", tmp_path / "on", "--keep-originals")[0]
        == 0
    )
    assert run(capsys, "patch", "remove", tmp_path / "on", patch, "--output", tmp_path / "off")[0] == 0
    assert model_fingerprint(tmp_path / "off") == model_fingerprint(tmp_path / "start")


def test_a_patch_trained_on_a_patched_model_comes_off_first(patch, tmp_path, capsys):
    start, on, both = tmp_path / "start", tmp_path / "on", tmp_path / "both"
    assert run(capsys, "patch", "apply", start, patch, "--output", on)[0] == 0
    more = patch_for(on, tmp_path / "more.safetensors")
    assert run(capsys, "patch", "apply", on, more, "--output", both)[0] == 0
    code, out, _ = run(capsys, "patch", "inspect", both)
    assert code == 0
    assert "carries mend, more (trained on top of mend) on the base" in " ".join(out.split())
    code, out, _ = run(capsys, "patch", "inspect", both, "--json")
    assert [one["needs"] for one in json.loads(out)["patches"]] == [[], ["mend"]]
    code, _, err = run(capsys, "patch", "remove", both, "mend", "--base", start, "--output", tmp_path / "off")
    assert code == 2
    assert "but got more. Take it off first." in " ".join(err.split())
    assert run(capsys, "patch", "remove", both, "more", "--base", on, "--output", tmp_path / "off")[0] == 0
    assert model_fingerprint(tmp_path / "off") == model_fingerprint(on)


def test_a_folder_without_patches_and_another_base_are_refused(patch, tmp_path, capsys):
    code, _, err = run(capsys, "patch", "inspect", tmp_path / "start")
    assert code == 2
    assert "to carry patches, but it carries none" in err
    make_model(1).save_pretrained(tmp_path / "other")
    make_tokenizer().save_pretrained(tmp_path / "other")
    code, _, err = run(capsys, "patch", "apply", tmp_path / "other", patch, "--output", tmp_path / "on")
    assert code == 2
    assert "but got one for the base" in err
    assert not (tmp_path / "on").exists()
