"""What attacks on weights share: reading the target with all its digits, and folders that go when the next is made."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from experiments.attacks.interface import ModelTarget
from framework.errors import WiringError
from framework.models import LoadedModel, ModelSpec, load_model, save_model
from framework.weight_edits import edit_parameters
from framework.weight_files import WeightFiles

__all__ = [
    "Stopwatch",
    "differs_from",
    "list_problems",
    "load_exact",
    "missing_base",
    "nothing_changed",
    "passing_folder",
    "save_exact",
    "write_edited",
]


class Stopwatch:
    """Seconds since it was last read."""

    def __init__(self) -> None:
        """Start."""
        self._since = time.perf_counter()

    def lap(self) -> float:
        """Return the seconds since the last lap and start the next."""
        now = time.perf_counter()
        passed, self._since = now - self._since, now
        return passed


def load_exact(folder: Path) -> LoadedModel:
    """Return a model in float32: edits of 16-bit numbers would mostly be rounded away."""
    return load_model(ModelSpec(str(folder), "float32"))


def save_exact(loaded: LoadedModel, folder: Path) -> None:
    """Write an edited model in float32, complete with its tokenizer."""
    model: Any = loaded.model.to("cpu")  # type: ignore[arg-type]
    save_model(model, loaded.tokenizer, folder, dtype=torch.float32, processor=loaded.processor)


def write_edited(target: ModelTarget, folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor | None]) -> int:
    """Write the target with edited parameters to ``folder`` and return how many changed.

    Args:
        target: is left as it is.
        folder: receives the model.
        change: called with plain name and float32 value; None leaves the parameter as it is.
    """
    loaded = load_exact(target.folder)
    changed = edit_parameters(loaded.model, change, files=WeightFiles(loaded.folder))
    save_exact(loaded, folder)
    return changed


def differs_from(model: nn.Module, folder: Path) -> bool:
    """Return whether any parameter has another value than in a folder; the first that does ends the search.

    Args:
        model: plain, in float32.
        folder: of a model of the same architecture.
    """
    files = WeightFiles(folder)
    return any(
        not torch.equal(parameter.detach().cpu(), files.read(name).tensor)
        for name, parameter in model.named_parameters()
        if name in files
    )


@contextlib.contextmanager
def passing_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder that is removed when the block ends, however it ends."""
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def nothing_changed(attack: str, found: str, remedy: str) -> WiringError:
    """Return the error of an attack that would be measured on the very model it attacks.

    Args:
        attack: as the user knows it, with its setting.
        found: what was found, completing *but ...*.
        remedy: what to check, as a sentence.
    """
    return WiringError(f"Expected `{attack}` to change the model, but {found}: the attack changed nothing. {remedy}")


def missing_base(target: ModelTarget, *, attack: str, use: str) -> str | None:
    """Return the sentence for a target without its unaligned model, else None.

    Args:
        target: may have one.
        attack: who asks.
        use: what it needs the model for, completing *to ...*.
    """
    if target.base is not None:
        return None
    return (
        f"Expected the target of `{attack}` to come with its unaligned model to {use}, but got none. Name the folder "
        "of the unaligned model with `target.base`."
    )


def list_problems(**lists: Sequence[Any]) -> list[str]:
    """Return what is wrong with lists of settings that must hold something, and nothing twice.

    Example:
        >>> list_problems(factors=[0.5, 0.5])
        ['Expected `factors` to hold each value once, but got [0.5, 0.5].']
    """
    problems = []
    for name, values in lists.items():
        if not values:
            problems.append(f"Expected `{name}` to hold at least one value, but got none.")
        elif len(set(values)) < len(values):
            problems.append(f"Expected `{name}` to hold each value once, but got {list(values)}.")
    return problems
