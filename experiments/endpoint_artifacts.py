"""What an endpoint said, kept in place of what it said before; nothing tells whether it still has the same model."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from framework.files import ArtifactStore

__all__ = ["replace_artifact"]


def replace_artifact(
    artifacts: ArtifactStore,
    kind: str,
    key: dict[str, Any],
    fill: Callable[[Path], None],
    *,
    keep_partial: bool = False,
) -> Path:
    """Fill an artefact that takes the place of an earlier one, and return a copy of it that belongs to this call alone.

    The earlier one stays until the new one is complete and goes under the lock of its kind and key. Another call with
    the same key may replace the artefact at any time after; the copy it leaves as it is.

    Args:
        artifacts: the store.
        kind: of the artefact.
        key: everything known that decides it.
        fill: writes it into a folder.
        keep_partial: hand ``fill`` what an interrupted call left.

    Raises:
        StorageError: the folder cannot be written or the disk is full.
    """
    own = {**key, "run": uuid.uuid4().hex}
    with artifacts.writing(kind, key, keep_partial=keep_partial) as folder:
        fill(folder)
        with artifacts.writing(kind, own) as copy:
            shutil.copytree(folder, copy, dirs_exist_ok=True)
        shutil.rmtree(artifacts.path(kind, key), ignore_errors=True)
    return artifacts.path(kind, own)
