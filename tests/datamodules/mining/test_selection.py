from __future__ import annotations

import pytest

from datamodules.mining.hardness import Hardness
from datamodules.mining.selection import MinedPrompt, MinedReply, MinedSets, check_eligible, pick_target, select_prompts
from framework.errors import DataError
from framework.examples import Prompt


def mined(number, harmful, total=8, kind="harmful", targets=None):
    safe = total - harmful
    replies = tuple(MinedReply(i, f"reply {i} of {number}", i % 2 == 0) for i in range(safe))
    return MinedPrompt(
        Prompt(f"{kind}-{number}", f"request {number}", kind, "category"),
        Hardness(harmful, safe, total),
        replies if targets is None else targets,
    )


POOL = [mined(i, rate) for i, rate in enumerate([0, 3, 8, 1, 5, 0, 7, 2, 5, 8])]
RATES = [7, 5, 5, 3, 2, 1]


def chosen(select="hard", count=None, share=0.5, seed=0, pool=POOL):
    return select_prompts(pool, select=select, count=count, share=share, seed=seed)


def rates(found):
    return [one.counts.harmful for one in found]


def test_the_hardest_come_first():
    assert rates(chosen(share=1.0)) == RATES
    assert rates(chosen(share=0.5)) == RATES[:3]
    assert rates(chosen(count=4)) == RATES[:4]


def test_a_share_is_rounded_up():
    assert len(chosen(share=0.4)) == 3


def test_random_prompts_are_as_many_but_others():
    picks = [rates(chosen("random", seed=seed)) for seed in range(30)]
    assert {len(pick) for pick in picks} == {3}
    assert {rate for pick in picks for rate in pick} == set(RATES)
    assert chosen("random", seed=4) == chosen("random", seed=4)


def test_top_share_takes_the_hardest_in_another_order():
    picks = [rates(chosen("top_share", share=1.0, seed=seed)) for seed in range(5)]
    assert all(sorted(pick, reverse=True) == RATES for pick in picks)
    assert any(pick != RATES for pick in picks)
    assert sorted(rates(chosen("top_share"))) == sorted(RATES[:3])


def test_equal_rates_are_ordered_by_the_seed():
    firsts = {chosen(count=3, seed=seed)[1].prompt.id for seed in range(20)}
    assert firsts == {"harmful-4", "harmful-8"}


def test_more_than_there_are_cannot_be_chosen():
    with pytest.raises(DataError, match=r"Expected 7 prompts that break the model sometimes, but got 6 of 10. Lower"):
        chosen(count=7)


@pytest.mark.parametrize(
    ("pool", "text"),
    [
        ([mined(i, 0) for i in range(3)], "got 3 of which all 3 never broke the model. Name harder prompts with `harm"),
        ([mined(i, 8) for i in range(3)], "all 3 always broke the model, so there is no safe rollout.*Align the model"),
        (
            [mined(0, 0), mined(1, 8)],
            "of which 1 never broke the model, 1 always did, on 0 the judges do not agree, and 0 have no usable safe",
        ),
        (
            [mined(0, 4, targets=())],
            "0 never broke the model, 0 always did, on 0 the judges do not agree, and 1 have no usable safe rollout.",
        ),
    ],
)
def test_a_pool_without_anything_to_learn_says_why(pool, text):
    with pytest.raises(DataError, match=text):
        check_eligible(pool)


def test_a_target_is_fixed_by_seed_and_prompt():
    prompt = POOL[1]
    assert pick_target(prompt, seed=0) == pick_target(prompt, seed=0)
    backwards = MinedPrompt(prompt.prompt, prompt.counts, prompt.targets[::-1])
    assert pick_target(backwards, seed=0) == pick_target(prompt, seed=0)
    assert {pick_target(prompt, seed=seed) for seed in range(60)} == set(prompt.targets)


def test_rows_carry_the_target_and_whether_it_was_cut_off():
    sets = MinedSets(tuple(POOL), tuple(mined(i, 0, total=3, kind="benign") for i in range(4)))
    rows = sets.rows(select="hard", count=None, share=1.0, seed=0)
    assert [row.id for row in rows.harmful[:1]] == ["smh-safety-harmful-6"]
    for row in rows.harmful:
        source = next(one for one in POOL if row.id.endswith(one.prompt.id))
        target = pick_target(source, seed=0)
        assert (row.reply, row.is_complete, row.kind) == (target.reply, target.finished, "safety")
        assert row.prompt == source.prompt.text
    assert {row.kind for row in rows.benign} == {"benign"}
    assert len(rows.benign) == 4
    assert len(sets.eligible) == 6


def test_harmless_prompts_nobody_answered_are_refused():
    sets = MinedSets(tuple(POOL), (mined(0, 4, total=4, kind="benign"),))
    with pytest.raises(DataError, match=r"Expected the model to answer some of 1 harmless prompts, but got refusals"):
        sets.rows(select="hard", count=None, share=1.0, seed=0)
