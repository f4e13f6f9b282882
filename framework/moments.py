"""Times as results and notes give them: UTC, to the second."""

from __future__ import annotations

from datetime import datetime, timezone

__all__ = ["moment"]


def moment(seconds: float | None = None) -> str:
    """Return a time in ISO 8601; now when none is given.

    Args:
        seconds: since 1970.

    Example:
        >>> moment(0.0)
        '1970-01-01T00:00:00+00:00'
    """
    when = datetime.now(timezone.utc) if seconds is None else datetime.fromtimestamp(seconds, timezone.utc)
    return when.isoformat(timespec="seconds")
