from __future__ import annotations

import itertools

import pytest

from framework.errors import DataError
from methods.smh.functional import (
    Decision,
    Groups,
    adjust_ratio,
    benign_share,
    initial_order,
    is_turn,
    ordered_rows,
    stream,
)

GROUPS = Groups(range(0, 6), range(100, 108), ())


def test_one_to_one_alternates_strictly():
    assert initial_order(GROUPS, ratio=1.0) == [0, 100, 1, 101, 2, 102, 3, 103, 4, 104, 5, 105]


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 1.0, 1.5, 2.0, 3.7, 16.0])
@pytest.mark.parametrize("others", [0, 5, 11])
def test_a_pass_holds_every_row_and_the_ratio_at_every_place(ratio, others):
    groups = Groups(range(0, 6), range(100, 108), range(200, 200 + others))
    order = initial_order(groups, ratio=ratio)
    harmful, benign, rest = ([row for row in order if row // 100 == kind] for kind in range(3))
    assert harmful == list(groups.harmful)
    assert rest == list(groups.others)
    assert len(benign) == round(6 * ratio)
    assert benign == [100 + i % 8 for i in range(len(benign))]
    mined = [row // 100 for row in order if row < 200]
    for place in range(len(mined) + 1):
        expected = place * len(benign) / max(1, len(mined))
        assert abs(mined[:place].count(1) - expected) <= 1


def test_other_rows_are_spread_evenly():
    groups = Groups(range(6), range(100, 106), range(200, 204))
    places = [place for place, row in enumerate(initial_order(groups, ratio=1.0)) if row >= 200]
    assert {b - a for a, b in itertools.pairwise(places)} == {4}


def test_a_turn_comes_as_often_as_its_share_says():
    for share in (0.0, 1 / 3, 0.5, 2 / 3, 0.9, 1.0):
        assert sum(is_turn(place, share) for place in range(300)) == round(300 * share)


def test_the_stream_before_a_change_stays_as_it_was():
    before = stream(GROUPS, [(0, 0.5)], num_rows=40, others_share=0.0)
    after = stream(GROUPS, [(0, 0.5), (16, 0.8)], num_rows=40, others_share=0.0)
    assert after[:16] == before[:16]
    assert sum(row >= 100 for row in after[16:]) == 19
    # No kind jumps in its own order.
    assert [row for row in after if row < 100] == [i % 6 for i in range(40 - 27)]
    assert [row - 100 for row in after if row >= 100] == [i % 8 for i in range(27)]


def test_decisions_become_rows():
    decisions = [Decision(4, 3.0, 1.0, 0.5), Decision(8, 0.25, 0.2, 1.0)]
    rows = ordered_rows(48, decisions, batch_size=4, groups=GROUPS, start=1.0)
    shares = [sum(row >= 100 for row in rows[a:b]) for a, b in ((0, 16), (16, 32), (32, 48))]
    assert shares == [8, 12, 3]
    assert rows[:12] == initial_order(GROUPS, ratio=1.0)
    assert ordered_rows(48, decisions[:1], batch_size=4, groups=GROUPS, start=1.0)[:32] == rows[:32]


def test_harmless_rows_that_are_not_there_cannot_be_mixed_in():
    with pytest.raises(DataError, match=r"Expected harmless rows to mix in, but got none. Set `ratio` to 0"):
        initial_order(Groups(range(3), (), ()), ratio=1.0)
    with pytest.raises(DataError, match=r"Expected harmful rows to mix in, but got none"):
        stream(Groups((), range(3), ()), [(0, 0.5)], num_rows=4, others_share=0.0)
    assert initial_order(Groups(range(3), (), ()), ratio=0.0) == [0, 1, 2]


TARGETS = {"target_refusal": 0.9, "target_compliance": 0.8, "gain": 2.0, "low": 0.25, "high": 4.0}


@pytest.mark.parametrize(
    ("refusal", "compliance", "direction"),
    [(1.0, 0.3, 1), (0.4, 0.9, -1), (0.95, 0.85, 0), (0.9, 0.8, 0), (0.4, 0.3, 0), (0.8, 0.3, 1)],
)
def test_the_ratio_follows_the_side_that_falls_short(refusal, compliance, direction):
    found = adjust_ratio(1.0, refusal=refusal, compliance=compliance, **TARGETS)
    assert (found > 1 + 1e-12) - (found < 1 - 1e-12) == direction


def test_the_ratio_stays_within_its_bounds():
    assert adjust_ratio(3.9, refusal=1.0, compliance=0.0, **TARGETS) == 4.0
    assert adjust_ratio(0.3, refusal=0.0, compliance=1.0, **TARGETS) == 0.25


def test_the_share_belongs_to_the_ratio():
    assert [benign_share(ratio) for ratio in (0.0, 1.0, 3.0)] == [0.0, 0.5, 0.75]
