"""Best-of-N: what the disturbances do, and when a request is left alone."""

from __future__ import annotations

import random

import pytest

from experiments.attacks.interface import Attempt
from experiments.attacks.prompts.best_of_n import BestOfN, BestOfNConfig, disturb
from framework.errors import ConfigError
from tests.experiments.attacks.scripted import REQUESTS

TEXT = "Please describe the whole procedure slowly and carefully"


def test_disturbance_keeps_the_length_and_follows_from_chance():
    texts = {disturb(TEXT, sigma=0.4, draw=random.Random(seed)) for seed in range(20)}
    assert len(texts) == 20
    assert {len(text) for text in texts} == {len(TEXT)}
    assert disturb(TEXT, sigma=0.4, draw=random.Random(3)) == disturb(TEXT, sigma=0.4, draw=random.Random(3))


def test_nothing_is_disturbed_at_sigma_0():
    assert disturb(TEXT, sigma=0.0, draw=random.Random(0)) == TEXT


def test_letters_change_their_case_with_the_square_root_of_sigma():
    text = "a" * 20_000
    flipped = sum(sign == "A" for sign in disturb(text, sigma=0.09, draw=random.Random(0)))
    assert flipped / len(text) == pytest.approx(0.3, abs=0.02)


def test_first_and_last_letters_of_words_stay_when_only_words_are_scrambled():
    disturbed = disturb(TEXT, sigma=0.4, draw=random.Random(5)).lower().split()
    same = sum(a[0] == b[0].lower() and a[-1] == b[-1] for a, b in zip(disturbed, TEXT.split(), strict=True))
    assert same >= len(disturbed) - 2  # single signs are moved with probability 0.064


def test_broken_requests_are_left_alone_and_queries_end():
    attack = BestOfN(BestOfNConfig(queries=3))
    attack.start(REQUESTS, seed=1)
    first = attack.ask()
    attack.tell([Attempt(1, q.request.id, q.prompt.id, "", "", q.request.id == "r2") for q in first])
    assert [query.request.id for query in attack.ask()] == ["r0", "r1", "r3"]
    assert len(attack.ask()) == 3
    assert attack.ask() == []


def test_what_a_request_meets_does_not_depend_on_the_others():
    texts = []
    for requests in (REQUESTS, REQUESTS[2:3]):
        attack = BestOfN(BestOfNConfig(queries=2, stop=False))
        attack.start(requests, seed=1)
        asked = [query for _ in range(2) for query in attack.ask()]
        texts.append([query.prompt.text for query in asked if query.request.id == "r2"])
    assert texts[0] == texts[1]


@pytest.mark.parametrize("wrong", [{"queries": 0}, {"sigma": 1.5}, {"temperature": -1.0}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError, match=f"`{next(iter(wrong))}` to be"):
        BestOfNConfig(**wrong)
