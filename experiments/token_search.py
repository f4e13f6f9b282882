"""Searching the safety tokens of two models, or of one base with its adapter on and off; kept in the artefact store."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from datamodules.catalog import find_examples
from experiments.token_view import read_token_table, token_svg
from framework.chat import ChatEncoder
from framework.errors import ConfigError, ModelError
from framework.files import ArtifactStore, fingerprint, hash_file, write_atomic, write_json
from framework.model_files import model_fingerprint, read_model, read_tokenizer
from framework.models import choose_dtype
from framework.reference import on_fast_device
from framework.weight_files import check_same_tokenizer
from methods.pact.tokens import (
    Logits,
    RefusalRow,
    SafetyTokens,
    find_safety_tokens,
    load_tokens,
    refusal_logits,
    refusal_rows,
    save_tokens,
    tokens_key,
)

__all__ = ["FoundTokens", "TokenSearch", "save_found", "search_tokens"]

KIND = "safety_tokens"
"""The artefacts of PACT: a stage finds the tokens that were searched here, and the other way round."""
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True)
class TokenSearch:
    """Which models are compared, on what, and how many tokens are kept."""

    base: Path
    """Folder of the unaligned model."""
    aligned: Path | None = None
    """Folder of the aligned model; None with an adapter."""
    adapter: Path | None = None
    """Folder of the adapter that aligns ``base``: then one model in memory is both, adapter on and off."""
    source: str = "embedded"
    """Pairs of harmful prompt and refusal: ``embedded``, a registered set or a file."""
    pairs: int = 512
    reply_tokens: int = 64
    """First tokens of each refusal that are used."""
    num_tokens: int = 50
    temperature: float = 1.0
    score: str = "difference"
    """``difference`` or ``log_ratio``."""
    is_plain: bool = True
    """Whether the unaligned model reads ``User: ...`` and ``Assistant: `` instead of the chat template."""
    system: str | None = None
    """System message; None leaves the template's own."""
    dtype: Any = "auto"

    @property
    def other(self) -> Path:
        """Folder of the second model.

        Raises:
            ConfigError: there are both a model and an adapter, or neither.
        """
        if (self.aligned is None) == (self.adapter is None):
            raise ConfigError(
                f"Expected either `aligned` or `adapter` to be a folder, but got {self.aligned} and {self.adapter}."
            )
        return self.base if self.aligned is None else self.aligned


@dataclass(frozen=True)
class FoundTokens:
    """What was found, and where it is kept."""

    lines: list[dict[str, Any]]
    """Id, text, weight and mean probabilities of every token."""
    fingerprint: str
    """Of everything that decided them."""
    folder: Path
    num_pairs: int
    is_reused: bool


def search_tokens(search: TokenSearch, artifacts: ArtifactStore) -> FoundTokens:
    """Return the safety tokens of two models, from the store when they were searched before.

    Args:
        search: models and settings.
        artifacts: where they are kept.

    Raises:
        ConfigError: an aligned model and an adapter are named, or neither.
        ModelError: a model or adapter is not there.
        WiringError: other tokenizers, no difference between the models, or more tokens than the vocabulary has.
        DataError: no refusals.
    """
    check_same_tokenizer(search.base, search.other)
    tokenizer = read_tokenizer(search.other)
    pairs = find_examples("safety", search.source, seed=0)[: search.pairs]
    encoder = ChatEncoder(tokenizer, system=search.system)
    rows = refusal_rows(pairs, encoder, reply_tokens=search.reply_tokens, is_plain=search.is_plain)
    dtype = choose_dtype(search.dtype)
    key = tokens_key(
        rows,
        aligned=_aligned_fingerprint(search),
        unaligned=model_fingerprint(search.base),
        dtype=dtype,
        num_tokens=search.num_tokens,
        temperature=search.temperature,
        score=search.score,
    )
    found = artifacts.find(KIND, key)
    if found is None:
        with artifacts.writing(KIND, key) as folder:
            save_tokens(folder, _search(search, rows, dtype), tokenizer=tokenizer)
    folder = artifacts.path(KIND, key)
    return FoundTokens(read_token_table(folder), fingerprint(key), folder, len(rows), found is not None)


def save_found(found: FoundTokens, folder: Path) -> None:
    """Write the tokens as tensors, table and picture into a folder, with their fingerprint."""
    folder.mkdir(parents=True, exist_ok=True)
    save_tokens(folder, load_tokens(found.folder))
    write_json(folder / "tokens.json", found.lines)
    write_atomic(folder / "tokens.svg", token_svg(found.lines))
    write_json(folder / "manifest.json", {"fingerprint": found.fingerprint, "pairs": found.num_pairs})


def _search(search: TokenSearch, rows: Sequence[RefusalRow], dtype: torch.dtype) -> SafetyTokens:
    base: nn.Module = read_model(search.base, dtype=dtype)
    with contextlib.ExitStack() as stack:
        if search.adapter is not None:
            model = _with_adapter(base, search.adapter)
            stack.enter_context(on_fast_device(model))
            aligned, unaligned = refusal_logits(model, is_reference=False), refusal_logits(model)
        else:
            other = read_model(search.other, dtype=dtype)
            stack.enter_context(on_fast_device(base))
            stack.enter_context(on_fast_device(other))
            aligned, unaligned = refusal_logits(other), refusal_logits(base)
        return _found(search, rows, aligned, unaligned)


def _found(search: TokenSearch, rows: Sequence[RefusalRow], aligned: Logits, unaligned: Logits) -> SafetyTokens:
    return find_safety_tokens(
        rows,
        aligned,
        unaligned,
        num_tokens=search.num_tokens,
        temperature=search.temperature,
        is_log_ratio=search.score == "log_ratio",
    )


def _aligned_fingerprint(search: TokenSearch) -> str:
    folder = search.adapter
    if folder is None:
        return model_fingerprint(search.other)
    missing = [name for name in ADAPTER_FILES if not (folder / name).is_file()]
    if missing:
        raise ModelError(f"Expected `{folder}` to hold an adapter, but got no {' and no '.join(missing)}.")
    parts = {name: hash_file(folder / name) for name in ADAPTER_FILES}
    return fingerprint({"base": model_fingerprint(search.base), **parts})


def _with_adapter(base: nn.Module, folder: Path) -> nn.Module:
    from peft import PeftModel  # takes seconds to import

    return PeftModel.from_pretrained(base, str(folder)).eval()
