import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from framework import model_files
from framework.adapters import AdapterSpec, add_adapter
from framework.errors import ModelError, StorageError, WiringError
from framework.files import read_json
from framework.model_files import (
    check_model_folder,
    model_fingerprint,
    read_model,
    read_tokenizer,
    save_adapter,
    save_model,
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SEAWALL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path, tiny_model, tiny_tokenizer) -> Path:
    save_model(tiny_model, tiny_tokenizer, tmp_path / "model")
    return tmp_path / "model"


def test_saved_model_loads_with_plain_transformers(folder, tiny_model):
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(loaded, LlamaForCausalLM)
    for name, tensor in tiny_model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert AutoTokenizer.from_pretrained(folder).chat_template
    assert not list(folder.glob("*.bin"))
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_saving_narrower_leaves_the_model_alone_and_is_written_narrower(tmp_path, tiny_model, tiny_tokenizer):
    save_model(tiny_model, tiny_tokenizer, tmp_path / "model", dtype=torch.bfloat16)
    assert tiny_model.dtype == torch.float32
    assert read_json(tmp_path / "model" / "config.json")["dtype"] == "bfloat16"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded.model.norm.weight, tiny_model.model.norm.weight.bfloat16())
    assert torch.equal(loaded.lm_head.weight, tiny_model.lm_head.weight.bfloat16())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_tied_weights_are_written_once(tmp_path, tiny_model, tiny_tokenizer, dtype):
    from safetensors import safe_open

    save_model(tiny_model, tiny_tokenizer, tmp_path / "model", dtype=dtype)
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as weights:
        names = set(weights.keys())
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


def test_saving_again_replaces_the_folder(folder, tiny_model, tiny_tokenizer):
    (folder / "leftover").touch()
    save_model(tiny_model, tiny_tokenizer, folder)
    assert not (folder / "leftover").exists()
    assert [path.name for path in folder.parent.iterdir() if path.name != "cache"] == ["model"]


def test_interrupted_saving_keeps_the_old_folder(folder, tiny_model, tiny_tokenizer, monkeypatch):
    before = (folder / "model.safetensors").read_bytes()
    monkeypatch.setattr(type(tiny_tokenizer), "save_pretrained", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_model(tiny_model, tiny_tokenizer, folder)
    assert (folder / "model.safetensors").read_bytes() == before
    assert [path.name for path in folder.parent.iterdir() if path.name != "cache"] == ["model"]


def test_saving_where_nothing_can_be_written_is_refused(tmp_path, tiny_model, tiny_tokenizer):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="to be writable"):
        save_model(tiny_model, tiny_tokenizer, tmp_path / "file" / "model")


def test_a_full_disk_is_named(tmp_path, tiny_model, tiny_tokenizer, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(type(tiny_model), "save_pretrained", fail)
    with pytest.raises(StorageError, match="No space left"):
        save_model(tiny_model, tiny_tokenizer, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_saving_an_adapted_model_as_plain_is_refused(tmp_path, tiny_model, tiny_tokenizer):
    with pytest.raises(WiringError, match="carries an adapter"):
        save_model(add_adapter(tiny_model, AdapterSpec()), tiny_tokenizer, tmp_path / "model")


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_adapter_alone_loads_with_plain_peft(tmp_path, tiny_model, folder):
    from peft import PeftModel

    model = add_adapter(tiny_model, AdapterSpec(rank=2))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(parameter)
    save_adapter(model, tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model.eval()(ids).logits)
    with pytest.raises(ModelError, match="holds an adapter: merge it"):
        check_model_folder(tmp_path / "adapter")


def test_a_plain_model_has_no_adapter_to_save(tmp_path, tiny_model):
    with pytest.raises(WiringError, match="to carry an adapter"):
        save_adapter(tiny_model, tmp_path / "adapter")


def test_missing_folder_is_refused(tmp_path):
    with pytest.raises(ModelError, match="no such folder"):
        check_model_folder(tmp_path / "nothing")


def test_folder_without_config_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"to hold config\.json"):
        check_model_folder(tmp_path)


def test_pickled_weights_are_refused_with_the_way_out(folder, tiny_model):
    (folder / "model.safetensors").unlink()
    torch.save(tiny_model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"got pytorch_model\.bin.*save it again"):
        read_model(folder, dtype=torch.float32)


def test_folder_without_weights_is_refused(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"\.safetensors, but got none"):
        model_fingerprint(folder)


def test_missing_shard_is_refused(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00002-of-00002.safetensors"}}')
    with pytest.raises(ModelError, match=r"got none of model-00002-of-00002\.safetensors"):
        check_model_folder(folder)


@pytest.mark.parametrize("keep", [0, 7, 300, -10])
def test_truncated_weights_are_refused(folder, keep):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:keep])
    with pytest.raises(ModelError, match="to hold a complete causal language model"):
        read_model(folder, dtype=torch.float32)


def test_absent_weights_are_refused_instead_of_drawn_at_random(folder):
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 missing or of another shape, 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        read_model(folder, dtype=torch.float32)


def test_weights_of_another_shape_are_refused(folder):
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"intermediate_size": 64', '"intermediate_size": 32'))
    with pytest.raises(ModelError, match="hold"):
        read_model(folder, dtype=torch.float32)


def test_unknown_architecture_is_refused(folder):
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"llama"', '"lama"'))
    with pytest.raises(ModelError, match="complete causal language model, but got"):
        read_model(folder, dtype=torch.float32)


def test_missing_or_damaged_tokenizer_is_refused(folder):
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="to hold a tokenizer"):
        read_tokenizer(folder)


def test_fingerprint_follows_the_content_not_the_place(folder, tmp_path):
    before = model_fingerprint(folder)
    shutil.copytree(folder, tmp_path / "copy")
    assert model_fingerprint(tmp_path / "copy") == before
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    assert model_fingerprint(folder) != before


def test_fingerprint_follows_the_config(folder):
    before = model_fingerprint(folder)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    assert model_fingerprint(folder) != before


def test_weights_are_hashed_once(folder, cache, monkeypatch):
    before = model_fingerprint(folder)
    assert len(list((cache / "hashes").iterdir())) == 1
    monkeypatch.setattr(model_files, "hash_file", lambda path: pytest.fail("hashed again"))
    assert model_fingerprint(folder) == before


def test_damaged_or_unwritable_hash_cache_costs_only_time(folder, cache, tmp_path, monkeypatch):
    before = model_fingerprint(folder)
    next((cache / "hashes").iterdir()).write_text("{}")
    assert model_fingerprint(folder) == before
    (tmp_path / "file").touch()
    monkeypatch.setenv("SEAWALL_CACHE", str(tmp_path / "file"))
    assert model_fingerprint(folder) == before
