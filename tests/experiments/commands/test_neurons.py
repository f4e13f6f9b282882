from __future__ import annotations

import json
from dataclasses import replace

import pytest

from methods.nest.patch import read_patch, write_patch
from tests.conftest import make_model, make_tokenizer
from tests.experiments.commands.test_patch import patch, run  # noqa: F401  # a fixture
from tests.methods.nest.tiny_neurons import prepared, write_prompts


@pytest.fixture
def probed(tmp_path, monkeypatch):
    monkeypatch.setenv("SEAWALL_CACHE", str(tmp_path / "cache"))
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    files = write_prompts(tmp_path)
    return [str(tmp_path / "model"), "held_out=0.5", "threshold=1.5", *(f"{k}={v}" for k, v in files.items())]


def test_a_model_is_probed_and_drawn(probed, tmp_path, capsys):
    picture = tmp_path / "neurons.svg"
    code, out, _ = run(capsys, "neurons", *probed, "--picture", picture, "--json")
    assert code == 0
    found = json.loads(out)
    assert found["rows"] > 0
    assert picture.read_text().startswith("<svg")
    code, out, _ = run(capsys, "neurons", *probed)
    assert code == 0
    assert f"{found['rows']} neurons" in out


def test_the_command_finds_what_the_method_finds(tmp_path, probed, capsys):
    code, out, _ = run(capsys, "neurons", *probed, "min_rows=4", "--json")
    assert code == 0
    selection = prepared(tmp_path, make_model())._selection
    assert json.loads(out)["rows"] == selection.num_rows


def test_a_patch_shows_its_neurons(patch, capsys):  # noqa: F811
    code, out, _ = run(capsys, "neurons", patch)
    assert code == 0
    assert "probe accuracy" in out
    code, _, err = run(capsys, "neurons", patch, "threshold=2")
    assert code == 2
    assert "Expected no settings with a patch" in err


def test_bad_arguments_are_refused(probed, capsys):
    code, _, err = run(capsys, "neurons", *probed, "--picture", "x.png")
    assert code == 2
    assert "`--picture` to be a file ending in .svg, but got 'x.png'" in err
    code, _, err = run(capsys, "neurons", *probed, "treshold=2")
    assert code == 2
    assert "Did you mean" in err


def test_a_patch_that_does_not_say_how_its_neurons_were_found_is_refused(patch, capsys):  # noqa: F811
    write_patch(replace(read_patch(patch), selection={}), patch)
    code, _, err = run(capsys, "neurons", patch)
    assert code == 2
    assert "to say how its neurons were found, but it does not" in err
