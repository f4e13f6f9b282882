"""What decides an artefact besides its settings: package versions, embedded sets, the content of named files."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from datamodules.catalog import catalog_files
from datamodules.readers import data_root
from framework.files import fingerprint, hash_file, to_plain
from framework.guard_settings import GuardSettings
from framework.model_files import gguf_fingerprint, model_fingerprint

__all__ = [
    "FILLED_BY_RUNS",
    "LATER_SETTINGS",
    "content_hashes",
    "data_hashes",
    "embedded_hash",
    "guard_key",
    "local_model_hashes",
    "named_hashes",
    "resolved_methods",
    "strings_in",
    "tokenizer_hashes",
    "versions",
    "without_later",
]

TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "chat_template*/**/*",
    "additional_chat_templates/*",
    "preprocessor_config.json",
    "processor_config.json",
)
"""Patterns of the files beside a model's weights that decide how a conversation becomes ids."""
DECIDING = ("torch", "transformers", "peft", "pytorch-lightning")
"""Packages whose version may change a number."""


LATER_SETTINGS = ("prefill", "prefill_replies", "prefill_model")
"""Settings of ``evaluate`` that decide a measurement of their own."""
FILLED_BY_RUNS = frozenset({("smh", "store")})
"""Methods' settings that name a place a run fills, which decides nothing: what their classes call ``UNDECISIVE``."""


def versions() -> dict[str, str]:
    """Return the versions of the packages that compute."""
    return {name: importlib.metadata.version(name) for name in DECIDING}


def embedded_hash() -> str:
    """Return a hash of the embedded sets."""
    digest = hashlib.sha256()
    for entry in sorted(files("datamodules.embedded").iterdir(), key=lambda item: item.name):
        if entry.name.endswith(".jsonl"):
            digest.update(entry.read_bytes())
    return digest.hexdigest()[:16]


def strings_in(value: Any) -> Iterator[str]:
    """Yield every string in ``value`` that is not empty, keys of mappings left out.

    Args:
        value: settings as plain JSON types.

    Example:
        >>> list(strings_in({"a": ["x", 1, ""], "b": {"c": "y"}}))
        ['x', 'y']
    """
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from strings_in(item)
    elif isinstance(value, str) and value:
        yield value


def content_hashes(value: Any) -> dict[str, str]:
    """Return the hash of every file that a string in ``value`` names, and of every file below a folder it names.

    Args:
        value: settings as plain JSON types.
    """
    found: dict[str, str] = {}
    for text in strings_in(value):
        found |= _tree_hashes(Path(text).expanduser(), text)
    return found


def named_hashes(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the hashes of every file that the settings of a run name: its data, its measurements, its methods.

    Named is what stands in the settings; the defaults of a method are not looked up, for that takes torch.

    Args:
        config: of a run, as plain values.
    """
    named: list[Any] = [config["evaluate"]]
    for stage in filter(None, config["stages"].values()):
        named.append(stage["data"])
        for method, options in stage["methods"].items():
            named.append({key: v for key, v in (options or {}).items() if (method, key) not in FILLED_BY_RUNS})
    return content_hashes(named) | data_hashes(named)


def local_model_hashes(name: str) -> dict[str, str]:
    """Return what decides a model that lies in a local folder or file; empty for every other name.

    A folder whose model cannot be read counts as that: the run refuses it, here it only passes for no other.

    Args:
        name: as in ``model.name``.
    """
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf" and path.is_file():
        return {"weights": gguf_fingerprint(path)}
    if not (path / "config.json").is_file():
        return {}
    with contextlib.suppress(ValueError):
        return {"weights": model_fingerprint(path), "tokenizer": fingerprint(tokenizer_hashes(path))}
    return {"weights": "unreadable"}


def _tree_hashes(path: Path, name: str) -> dict[str, str]:
    if path.is_file():
        return {name: hash_file(path)}
    if path.is_dir():
        return {f"{name}/{p.relative_to(path)}": hash_file(p) for p in sorted(path.rglob("*")) if p.is_file()}
    return {}


def resolved_methods(methods: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the methods with every setting spelt out, defaults included, and the content of the files they name.

    A config class may name in ``UNDECISIVE`` fields that never change a result; their defaults stand in for them.

    Args:
        methods: settings by the method's registered name.
    """
    # Here, because the fingerprint of a whole run needs neither torch nor scipy.
    from framework.evaluation.panel import create_panel
    from framework.evaluation.verdict_cache import judge_identity
    from framework.registry import create_method

    found = []
    for name, options in methods.items():
        undecisive: frozenset[str] = getattr(create_method(name, options).config, "UNDECISIVE", frozenset())
        decisive = {field: value for field, value in (options or {}).items() if field not in undecisive}
        config = to_plain(create_method(name, decisive).config)
        entry = {"name": name, "config": config, "files": content_hashes(config) | data_hashes(config)}
        if judges := config.get("judges"):
            # By what they are: a changed rule chooses other rows.
            entry["judges"] = [judge_identity(judge) for judge in create_panel(judges)]
        found.append(entry)
    return found


def data_hashes(value: Any) -> dict[str, str]:
    """Return the hash of every file below ``SEAWALL_DATA`` that a string in ``value`` stands for, by path or by name.

    Args:
        value: settings as plain JSON types.
    """
    root, found = data_root(), dict[str, str]()
    for text in strings_in(value):
        if root is None or Path(text).expanduser().exists():
            continue
        for name in catalog_files(text) or [text]:
            path = root / name
            inside = path.is_file() or (path.is_dir() and path.resolve() != root.resolve())
            found |= {f"{text}: {key}": digest for key, digest in _tree_hashes(path, name).items()} if inside else {}
    return found


def tokenizer_hashes(folder: Path) -> dict[str, str]:
    """Return the hashes of what turns a conversation into ids: the tokenizer's files and the chat template.

    Args:
        folder: of a model.
    """
    paths = [path for pattern in TOKENIZER_FILES for path in folder.glob(pattern) if path.is_file()]
    return {path.relative_to(folder).as_posix(): hash_file(path) for path in sorted(set(paths))}


def guard_key(guard: GuardSettings | None, stage: str) -> dict[str, Any]:
    """Return what a guard adds to the key of a stage: its settings and prompts where it acts, nothing otherwise.

    Args:
        guard: of the run; None without one.
        stage: name of the stage.
    """
    if guard is None or not guard.acts or not guard.guards(stage):
        return {}
    settings = {name: value for name, value in to_plain(guard).items() if name != "stages"}
    return {"guard": {**settings, "embedded": embedded_hash()}}


def without_later(evaluate: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``evaluate`` section as it was before ``LATER_SETTINGS`` existed, if it does without them.

    What was finished then is found again: the fingerprint of a run without the attack is what it was.

    Args:
        evaluate: as plain values.
    """
    if evaluate.get("prefill"):
        return dict(evaluate)
    return {name: value for name, value in evaluate.items() if name not in LATER_SETTINGS}
