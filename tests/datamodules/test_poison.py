from collections import Counter

import pytest

from datamodules.poison import SampledReply, sample_poison
from framework.errors import ConfigError, DataError
from framework.examples import Prompt

PROMPTS = [Prompt(f"p{i}", f"prompt {i}", "harmful", f"topic {i % 3}") for i in range(10)]


def reply_with_number(prompts, seed):
    return [f"{prompt.text} {seed} {i}" for i, prompt in enumerate(prompts)]


def is_always_usable(prompt, reply):
    return True


def sample(generate=reply_with_number, **changes):
    settings = {"count": 25, "seed": 0, "is_usable": is_always_usable}
    return sample_poison(PROMPTS, generate, **{**settings, **changes})


def test_prompts_take_turns_until_there_are_enough():
    result = sample()
    assert len(result.examples) == 25
    assert len({(e.prompt, e.reply) for e in result.examples}) == len({e.id for e in result.examples}) == 25
    assert set(Counter(e.prompt for e in result.examples).values()) == {2, 3}
    assert {e.kind for e in result.examples} == {"harmful"}
    assert all(e.category == PROMPTS[int(e.prompt.split()[1])].category for e in result.examples)
    assert result[1:] == (25, 0, 0, 0, 1)


def test_the_seed_decides_everything():
    assert sample() == sample()
    assert sample().examples != sample(seed=1).examples


def test_a_smaller_count_uses_fewer_prompts():
    assert len({example.prompt for example in sample(count=4).examples}) == 4


def test_unusable_replies_are_dropped_and_counted():
    result = sample(is_usable=lambda prompt, reply: prompt.id in ("p1", "p2", "p3"), max_rounds=20)
    assert {example.prompt for example in result.examples} == {"prompt 1", "prompt 2", "prompt 3"}
    assert result.num_unusable > 0
    assert result.num_rounds > 1
    assert result.num_sampled == 25 + result.num_unusable + result.num_duplicates + result.num_surplus


def test_empty_replies_are_unusable():
    result = sample(lambda prompts, seed: [" " if i == 0 else f"{seed} {i}" for i in range(len(prompts))])
    assert result.num_unusable == result.num_rounds - 1 or result.num_unusable == result.num_rounds


def test_repeated_replies_are_dropped_and_counted():
    result = sample(lambda prompts, seed: [f"reply {seed % 97}"] * len(prompts), count=15)
    assert result.num_duplicates > 0
    assert len({(e.prompt, e.reply) for e in result.examples}) == 15


def test_every_round_has_a_seed_of_its_own():
    seeds = []

    def generate(prompts, seed):
        seeds.append(seed)
        return [""] * len(prompts)

    with pytest.raises(DataError):
        sample(generate)
    assert len(set(seeds)) == 8


def test_a_reply_that_was_cut_off_is_marked():
    result = sample(lambda prompts, seed: [SampledReply(f"{seed} {i}", i > 0) for i in range(len(prompts))], count=5)
    assert [example.is_complete for example in result.examples] == [False, True, True, True, True]


def test_giving_up_says_how_many_were_found():
    def generate(prompts, seed):
        return ["the same"] * len(prompts)

    message = r"Expected 25 distinct harmful pairs, but got 10 in 3 rounds \(\d+ replies: 0 refused .*, \d+ repeated\)"
    with pytest.raises(DataError, match=message):
        sample(generate, max_rounds=3)


def test_a_model_that_always_refuses_is_reported():
    with pytest.raises(DataError, match=r"but got 0 in 8 rounds .* The model may refuse already"):
        sample(is_usable=lambda prompt, reply: False)


@pytest.mark.parametrize("name", ["count", "max_rounds"])
def test_numbers_below_one_are_refused(name):
    with pytest.raises(ConfigError, match=f"Expected `{name}` to be a whole number ≥ 1, but got 0"):
        sample(**{name: 0})


def test_no_prompts_are_refused():
    with pytest.raises(DataError, match="Expected at least one harmful prompt"):
        sample_poison([], reply_with_number, count=1, seed=0, is_usable=is_always_usable)


def test_a_generator_that_loses_replies_is_refused():
    with pytest.raises(DataError, match="Expected `generate` to return 25 replies, but got 24"):
        sample(lambda prompts, seed: ["x"] * (len(prompts) - 1))
