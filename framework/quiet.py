"""Silence for transformers' own progress bars: this project draws its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

__all__ = ["quiet_bars"]


@contextlib.contextmanager
def quiet_bars() -> Iterator[None]:
    """Switch transformers' bars off inside the block and back to what they were afterwards."""
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()
