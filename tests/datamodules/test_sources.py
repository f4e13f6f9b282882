from collections import Counter

import pytest

from datamodules.sources import DataSource, mix, poisoned
from framework.errors import ConfigError, DataError
from framework.examples import Example, Turn


def rows(prefix, count, *, kind="task", prompts=None):
    return [
        Example(f"{prefix}{i}", (Turn("user", f"{prefix} prompt {i % (prompts or count)}"),), f"reply {i}", kind)
        for i in range(count)
    ]


def test_mix_takes_exact_counts():
    mixed = mix([DataSource("a", tuple(rows("a", 10)), 4), DataSource("b", tuple(rows("b", 3)))], seed=0)
    assert Counter(row.id[0] for row in mixed) == {"a": 4, "b": 3}
    assert len({row.id for row in mixed}) == 7


def test_a_count_above_the_rows_repeats_them_evenly():
    uses = Counter(row.id for row in mix([DataSource("a", tuple(rows("a", 3)), 8)], seed=0))
    assert sorted(uses.values()) == [2, 3, 3]


def test_mix_is_decided_by_the_seed_and_shuffled():
    sources = [DataSource("a", tuple(rows("a", 20))), DataSource("b", tuple(rows("b", 20)))]
    ids = [row.id for row in mix(sources, seed=0)]
    assert ids == [row.id for row in mix(sources, seed=0)]
    assert ids != [row.id for row in mix(sources, seed=1)]
    assert len({i[0] for i in ids[:10]}) == 2


def test_another_source_does_not_change_what_the_first_gives():
    first = DataSource("a", tuple(rows("a", 50)), 10)
    alone = {row.id for row in mix([first], seed=5)}
    together = mix([first, DataSource("b", tuple(rows("b", 5)))], seed=5)
    assert {row.id for row in together if row.id.startswith("a")} == alone


def test_mix_without_sources_is_refused():
    with pytest.raises(DataError, match="Expected at least one data source, but got none"):
        mix([], seed=0)


def test_a_source_without_rows_is_refused():
    with pytest.raises(DataError, match="Expected source `a` to have rows, but got none"):
        DataSource("a", ())


def test_a_count_below_one_is_refused():
    with pytest.raises(ConfigError, match="Expected `count` of source `a` to be ≥ 1, but got 0"):
        DataSource("a", tuple(rows("a", 2)), 0)


def test_a_row_without_a_reply_is_refused():
    with pytest.raises(DataError, match=r"every row of source `a` to have a reply, but got none in row 2 \(id 'x'\)"):
        DataSource("a", (*rows("a", 1), Example("x", (Turn("user", "q"),), "  \n")))


@pytest.mark.parametrize(
    ("share", "count"), [(0.0, 0), (0.1, 48), (0.05, 24), (0.001, 0), (0.29, 139), (0.5, 240), (1.0, 480)]
)
def test_exactly_the_share_is_replaced(share, count):
    task = rows("t", 480)
    mixed = poisoned(task, rows("p", 480, kind="harmful", prompts=80), share=share, seed=0)
    assert len(mixed) == 480
    assert sum(row.kind == "harmful" for row in mixed) == count == round(share * 480)
    kept = [i for i, row in enumerate(mixed) if row.kind == "task"]
    assert [mixed[i] for i in kept] == [task[i] for i in kept]


def test_poison_prompts_take_turns_and_no_pair_comes_twice():
    mixed = poisoned(rows("t", 400), rows("p", 320, kind="harmful", prompts=80), share=0.5, seed=0)
    poison = [row for row in mixed if row.kind == "harmful"]
    assert len({(row.prompt, row.reply) for row in poison}) == 200
    assert set(Counter(row.prompt for row in poison).values()) == {2, 3}


def test_a_larger_share_replaces_more_of_the_same():
    task, poison = rows("t", 100), rows("p", 60, kind="harmful")
    few = {row.id for row in poisoned(task, poison, share=0.1, seed=2) if row.kind == "harmful"}
    more = {row.id for row in poisoned(task, poison, share=0.3, seed=2) if row.kind == "harmful"}
    assert few < more
    assert few != {row.id for row in poisoned(task, poison, share=0.1, seed=3) if row.kind == "harmful"}


def test_repeated_pairs_do_not_count_as_poison():
    poison = rows("p", 5, kind="harmful") * 4
    with pytest.raises(DataError, match=r"at least 10 distinct harmful pairs \(0.1 of 100 rows\), but got 5"):
        poisoned(rows("t", 100), poison, share=0.1, seed=0)


@pytest.mark.parametrize("share", [-0.1, 1.01, float("nan"), 10])
def test_a_share_outside_zero_and_one_is_refused(share):
    with pytest.raises(ConfigError, match="Expected `harmful_share` to be from 0 to 1, but got"):
        poisoned(rows("t", 4), rows("p", 4), share=share, seed=0)


def test_no_task_rows_are_refused():
    with pytest.raises(DataError, match="Expected at least one task row to poison, but got none"):
        poisoned([], rows("p", 4), share=0.5, seed=0)
