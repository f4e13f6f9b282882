"""Copies of weight files in which some tensors differ and every other byte is as it was."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import safe_open

from framework.errors import StorageError

__all__ = ["copy_changed", "tensor_offsets"]

LENGTH = 8
"""Bytes that say how long the header is, the least significant first."""


def copy_changed(
    source: Path, target: Path, names: Iterable[str], change: Callable[[str, torch.Tensor], torch.Tensor]
) -> None:
    """Copy a safetensors file and put other numbers in place of some tensors.

    Order, gaps and metadata stay, so that a file whose tensors get their old numbers back is the old one byte by byte.
    Reads one tensor at a time. Written under a temporary name, flushed and renamed.

    Args:
        source: left as it is.
        target: replaced when it exists.
        names: of the tensors.
        change: is given a name and its tensor, and returns one of the same shape and number format.

    Raises:
        StorageError: the folder cannot be written or the disk is full.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        # The bytes alone: the copy of a file that must not be written would be one too.
        shutil.copyfile(source, temporary)
        offsets = tensor_offsets(source)
        with safe_open(source, "pt") as file, temporary.open("r+b") as copy:
            for name in names:
                changed = change(name, file.get_tensor(name)).contiguous()
                copy.seek(offsets[name])
                # The whole tensor: rows of a transposed weight are columns, which lie scattered.
                copy.write(changed.view(torch.uint8).numpy().tobytes())
            copy.flush()
            os.fsync(copy.fileno())
        temporary.replace(target)
    except OSError as error:
        raise StorageError(
            f"Expected `{target}` to be writable, but got {error.strerror or error}. Free some space or choose another "
            "folder."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def tensor_offsets(path: Path) -> dict[str, int]:
    """Return where each tensor of a safetensors file begins, in bytes from the start of the file."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(LENGTH), "little")
        header = json.loads(file.read(length))
    return {name: LENGTH + length + one["data_offsets"][0] for name, one in header.items() if name != "__metadata__"}
