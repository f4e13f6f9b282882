"""Tiny models in folders as targets of attacks, and files of harmless rows that stand for harmful ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from experiments.attacks.interface import ModelTarget
from experiments.contract.tiny import TinyModel, make_model, make_tokenizer
from framework.models import model_fingerprint, save_model
from framework.weight_files import WeightFiles


def write_model(folder: Path, model: Any = None) -> Path:
    """Write a tiny model with its tokenizer."""
    save_model(make_model() if model is None else model, make_tokenizer(), folder)
    return folder


def make_target(folder: Path, model: Any = None, **options: Any) -> ModelTarget:
    """A tiny model as a target."""
    place = write_model(folder, model)
    return ModelTarget(place, model_fingerprint(place), accelerator="cpu", dtype="float32", **options)


def with_base(folder: Path) -> ModelTarget:
    """A tiny model and the one it was made of."""
    base = write_model(folder / "base")
    return make_target(folder / "target", TinyModel(shift=0.05).build().eval(), base=base)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a model folder."""
    files = WeightFiles(folder)
    return {name: files.read(name).tensor for name in files}


def same_bits(ours: Path, theirs: Path) -> bool:
    """Whether two folders hold the same numbers."""
    first, second = weights(ours), weights(theirs)
    return set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)


def write_rows(path: Path, rows: Sequence[tuple[str, str]]) -> Path:
    """Write pairs of request and reply."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([{"instruction": request, "output": reply} for request, reply in rows]))
    return path


def tensors_that(model: nn.Module, holds: Callable[[torch.Tensor], bool]) -> list[str]:
    """Names of the parameters for which something holds."""
    return [name for name, parameter in model.named_parameters() if holds(parameter)]
