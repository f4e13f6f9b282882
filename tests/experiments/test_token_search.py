"""The safety tokens of two tiny models, and of one model with its adapter on and off."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experiments.cli import main
from experiments.token_search import TokenSearch, save_found, search_tokens
from framework.adapters import merge_adapter
from framework.errors import ConfigError, ModelError, WiringError
from framework.files import ArtifactStore
from framework.models import save_adapter
from tests.conftest import make_model, make_tokenizer
from tests.tiny_runs import make_lora

PAIRS = [{"prompt": f"do harm {i}", "response": "No, I cannot." + "!" * i} for i in range(3)]


@pytest.fixture
def folders(tmp_path, monkeypatch) -> Path:
    """A base model, an adapter of it, both merged, and pairs."""
    monkeypatch.setenv("SEAWALL_CACHE", str(tmp_path / "cache"))
    make_model().save_pretrained(tmp_path / "base")
    adapted = make_lora(make_model())
    save_adapter(adapted, tmp_path / "adapter")
    merge_adapter(adapted).save_pretrained(tmp_path / "aligned")
    for role in ("base", "aligned"):
        make_tokenizer().save_pretrained(tmp_path / role)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    return tmp_path


def search(folder: Path, **settings) -> TokenSearch:
    given = {"aligned": folder / "aligned", "source": str(folder / "pairs.jsonl"), "num_tokens": 20, "dtype": "float32"}
    return TokenSearch(folder / "base", **(given | settings))


def test_one_base_with_its_adapter_on_and_off_gives_what_two_models_give(folders, monkeypatch):
    store, reads = ArtifactStore(folders / "store"), []
    two = search_tokens(search(folders), store)
    monkeypatch.setattr("experiments.token_search.read_model", _counted(reads))
    one = search_tokens(search(folders, aligned=None, adapter=folders / "adapter"), store)
    assert reads == [folders / "base"]
    assert one.fingerprint != two.fingerprint
    assert [line["id"] for line in one.lines] == [line["id"] for line in two.lines]
    for key in ("weight", "aligned", "unaligned"):
        ours, theirs = (torch.tensor([line[key] for line in found.lines]) for found in (one, two))
        assert torch.allclose(ours, theirs, atol=1e-5)
    assert one.num_pairs == 3


def _counted(reads):
    from framework.model_files import read_model

    def read(folder, **options):
        reads.append(folder)
        return read_model(folder, **options)

    return read


def test_tokens_are_found_again_by_what_decides_them(folders):
    store = ArtifactStore(folders / "store")
    first = search_tokens(search(folders), store)
    again = search_tokens(search(folders), store)
    other = search_tokens(search(folders, temperature=2.0), store)
    assert (first.is_reused, again.is_reused, other.is_reused) == (False, True, False)
    assert first.fingerprint == again.fingerprint == first.folder.name
    assert first.lines == again.lines
    assert other.fingerprint != first.fingerprint


def test_found_tokens_are_saved_with_table_picture_and_fingerprint(folders):
    found = search_tokens(search(folders), ArtifactStore(folders / "store"))
    save_found(found, folders / "saved")
    assert json.loads((folders / "saved" / "tokens.json").read_text()) == found.lines
    assert json.loads((folders / "saved" / "manifest.json").read_text()) == {
        "fingerprint": found.fingerprint,
        "pairs": 3,
    }
    ElementTree.parse(folders / "saved" / "tokens.svg")
    assert (folders / "saved" / "tokens.safetensors").is_file()


def test_folder_without_an_adapter_is_refused(folders):
    given = search(folders, aligned=None, adapter=folders / "base")
    with pytest.raises(ModelError, match=r"to hold an adapter, but got no adapter_config\.json and no adapter_model"):
        search_tokens(given, ArtifactStore(folders / "store"))


def test_model_and_adapter_at_once_are_refused(folders):
    given = replace(search(folders), adapter=folders / "adapter")
    with pytest.raises(ConfigError, match="either `aligned` or `adapter` to be a folder"):
        search_tokens(given, ArtifactStore(folders / "store"))


def test_models_that_do_not_differ_are_refused(folders):
    given = search(folders, aligned=folders / "base", is_plain=False)
    with pytest.raises(WiringError, match="the aligned and the unaligned model to differ on refusals"):
        search_tokens(given, ArtifactStore(folders / "store"))


def test_a_stage_with_pact_finds_the_tokens_that_were_searched(folders):
    """One key decides both: what the command found is not searched again."""
    from datamodules.finetune import FineTuneDataModule
    from experiments.contract.tiny import task_examples
    from framework.chat import ChatEncoder
    from framework.composition import prepare_methods
    from framework.method import MethodStore
    from methods.pact import PACT, PACTConfig

    store = ArtifactStore(folders / "store")
    found = search_tokens(search(folders), store)
    data = FineTuneDataModule(ChatEncoder(make_tokenizer()), batch_size=8, total_steps=1, max_length=200)
    data.add_source("task", task_examples(8))
    models = MethodStore(store, models={"start": folders / "aligned", "base": folders / "base"})
    method = PACT(PACTConfig(source=str(folders / "pairs.jsonl"), num_tokens=20))
    prepare_methods([method], make_lora(make_model()), data, models)
    assert [path.name for path in (folders / "store" / "safety_tokens").glob("*/manifest.json")] == ["manifest.json"]
    assert method._tokens.ids.tolist() == [line["id"] for line in found.lines]


def test_command_shows_saves_and_draws(folders, capsys):
    options = ["--source", str(folders / "pairs.jsonl"), "--count", "20", "--base", str(folders / "base")]
    options += ["--adapter", str(folders / "adapter"), "--output", str(folders / "out")]
    assert main(["tokens", *options, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert len(document["tokens"]) == 20
    assert document["fingerprint"] == json.loads((folders / "out" / "manifest.json").read_text())["fingerprint"]
    picture = folders / "shown.svg"
    assert main(["tokens", "--show", str(folders / "out"), "--picture", str(picture)]) == 0
    assert "Safety tokens" in capsys.readouterr().out
    assert picture.read_text() == (folders / "out" / "tokens.svg").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], r"Expected `--base` and either .* but got none of them\."),
        (["--base", "a", "--aligned", "b", "--adapter", "c"], "but got --base and --aligned and --adapter"),
        (["--show", "a", "--base", "b"], "Expected `--show` to come without `--base`, but got both"),
        (["--show", "a", "--picture", "x.png"], r"Expected `--picture` to be a file ending in \.svg, but got 'x\.png'"),
        (["--show", "a", "--count", "1"], "Expected `--count` to be a whole number >= 2, but got 1"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message, capsys):
    assert main(["tokens", *options]) == 2
    assert re.search(message, capsys.readouterr().err)
