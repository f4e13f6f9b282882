"""Mixing harmful and harmless rows at any ratio, and the law by which the ratio follows what is measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from framework.errors import DataError

__all__ = ["Decision", "Groups", "adjust_ratio", "initial_order", "is_turn", "ordered_rows", "stream"]


class Groups(NamedTuple):
    """Row numbers by kind, each in the order its rows are taken."""

    harmful: Sequence[int]
    benign: Sequence[int]
    others: Sequence[int]
    """The stage's own rows."""


class Decision(NamedTuple):
    """A ratio, what it was set for, and from which step on it holds."""

    step: int
    """First optimizer step of the block."""
    ratio: float
    """Harmless rows for each harmful one."""
    refusal: float
    """Share of harmful prompts refused, as measured before."""
    compliance: float
    """Share of harmless look-alikes answered."""


def is_turn(place: int, share: float) -> bool:
    """Return whether the row at ``place`` is of the kind that gets ``share`` of all places, evenly spread.

    Example:
        >>> [is_turn(place, 0.5) for place in range(4)]
        [False, True, False, True]
    """
    # The slack takes up what a share like 2/3 loses to rounding.
    return math.floor((place + 1) * share + 1e-9) > math.floor(place * share + 1e-9)


def benign_share(ratio: float) -> float:
    """Return the share of harmless rows among the mined ones."""
    return ratio / (1.0 + ratio)


def initial_order(groups: Groups, *, ratio: float) -> list[int]:
    """Return one pass: every harmful row once in its order, harmless rows at ``ratio``, others spread among them.

    Harmless rows come round again when there are too few, and are left over when there are more. With a ratio of 1 and
    no others, harmful and harmless rows alternate strictly.

    Args:
        groups: row numbers.
        ratio: harmless rows for each harmful one; 0 leaves them out.
    """
    num_harmful = len(groups.harmful)
    num_benign = round(num_harmful * ratio)
    num_rows = num_harmful + num_benign + len(groups.others)
    # Exact shares: one pass holds as many rows of each kind as it says, whatever `ratio` rounds to.
    share = num_benign / max(1, num_harmful + num_benign)
    return stream(groups, [(0, share)], num_rows=num_rows, others_share=len(groups.others) / max(1, num_rows))


def stream(groups: Groups, changes: Sequence[tuple[int, float]], *, num_rows: int, others_share: float) -> list[int]:
    """Return the first ``num_rows`` rows of the endless stream in which the harmless share changes at given places.

    Each kind is taken in its own order and comes round again; a change moves no kind back or forth in its
    order. The stream up to a change does not depend on what comes after it.

    Args:
        groups: row numbers.
        changes: (place, share of harmless rows among the mined ones), places rising from 0.
        num_rows: how many rows.
        others_share: share of the stage's own rows.

    Raises:
        DataError: harmful or harmless rows are asked for, but there are none.
    """
    found: list[int] = []
    taken = [0, 0, 0]
    mined_place, current = 0, 0
    for place in range(num_rows):
        while current + 1 < len(changes) and changes[current + 1][0] <= place:
            current += 1
            mined_place = 0
        if groups.others and is_turn(place, others_share):
            kind = 2
        else:
            kind = int(is_turn(mined_place, changes[current][1]))
            mined_place += 1
        own = groups[kind]
        if not own:
            raise DataError(
                f"Expected {('harmful', 'harmless')[kind]} rows to mix in, but got none. Set `ratio` to 0 to train "
                "without harmless rows, name sets with `benign`, or raise `max_length` where rows are left out."
            )
        found.append(own[taken[kind] % len(own)])
        taken[kind] += 1
    return found


def adjust_ratio(
    ratio: float,
    *,
    refusal: float,
    compliance: float,
    target_refusal: float,
    target_compliance: float,
    gain: float,
    low: float,
    high: float,
) -> float:
    """Return the next ratio: more harmless rows when answers fall short, fewer when refusals do, nothing when neither.

    ``log ratio' = log ratio + gain (max(0, target_compliance - compliance) - max(0, target_refusal - refusal))``, held
    between ``low`` and ``high``.

    Example:
        >>> targets = {"target_refusal": 0.9, "target_compliance": 0.9, "gain": 2.0, "low": 0.25, "high": 4.0}
        >>> round(adjust_ratio(1.0, refusal=1.0, compliance=0.4, **targets), 3)
        2.718
    """
    shortfall = max(0.0, target_compliance - compliance) - max(0.0, target_refusal - refusal)
    return min(high, max(low, ratio * math.exp(gain * shortfall)))


def ordered_rows(
    num_rows: int, changes: Sequence[Decision], *, batch_size: int, groups: Groups, start: float
) -> list[int]:
    """Return the rows of a whole run under the decisions taken so far.

    Args:
        num_rows: of the run, passes included.
        changes: the decisions, by rising step.
        batch_size: rows of an optimizer step.
        groups: row numbers.
        start: ratio before the first decision.
    """
    num_harmful = len(groups.harmful)
    one_pass = num_harmful + round(num_harmful * start) + len(groups.others)
    places = [(0, start), *((decision.step * batch_size, decision.ratio) for decision in changes)]
    shares = [(place, benign_share(ratio)) for place, ratio in places]
    return stream(groups, shares, num_rows=num_rows, others_share=len(groups.others) / max(1, one_pass))
