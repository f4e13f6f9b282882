"""What a report page says about itself: the form it has and which replies are in it; read without what draws pages."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

__all__ = ["is_redacted_page", "page_marker"]

FORM = 2
"""Goes up when pages leave out what earlier ones showed; 1, without a marker, held the replies to harmful requests."""
NAMES = {"redacted": "redacted", "all": "with-replies", "none": "without-replies"}
HEAD_BYTES = 1024
"""The marker is among the first lines of a page."""


def page_marker(show: Literal["all", "redacted", "none"]) -> str:
    """Return the content of a page's ``seawall-page``.

    Args:
        show: which replies are in the page.

    Example:
        >>> page_marker("redacted")
        '2 redacted'
    """
    return f"{FORM} {NAMES[show]}"


def is_redacted_page(page: Path) -> bool:
    """Return whether a page is of the present form and holds no replies to harmful requests.

    Args:
        page: may be missing, or of any form.
    """
    if not page.is_file():
        return False
    with page.open("rb") as handle:
        head = handle.read(HEAD_BYTES)
    shows: tuple[Literal["redacted", "none"], ...] = ("redacted", "none")
    return any(f'<meta name="seawall-page" content="{page_marker(show)}">'.encode() in head for show in shows)
