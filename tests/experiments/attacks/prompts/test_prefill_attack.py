"""The prefilling attack: where the openings come from, and how long they are."""

from __future__ import annotations

import pytest

from experiments.attacks.interface import Supplies
from experiments.attacks.prompts.prefill import Prefill, PrefillConfig
from experiments.prefill import OPENING
from framework.errors import ConfigError, DataError
from tests.experiments.attacks.scripted import REQUESTS


def asked(attack: Prefill) -> list:
    attack.start(REQUESTS, seed=0)
    return [query for _ in range(attack.budget) for query in attack.ask()]


def test_fixed_opening_is_cut_to_the_tokens(tiny_tokenizer):
    attack = Prefill(PrefillConfig(tokens=[5, 12], replies="opening"))
    attack.equip(Supplies(tokenizer=tiny_tokenizer))
    openings = {(query.details["variant"], query.prompt.prefill) for query in asked(attack)}
    assert openings == {("5 tokens", OPENING[:5]), ("12 tokens", OPENING[:12])}  # one token a byte


def test_without_a_tokenizer_words_stand_for_tokens():
    attack = Prefill(PrefillConfig(tokens=[4], replies="opening"))
    attack.equip(Supplies())
    assert {query.prompt.prefill for query in asked(attack)} == {"Sure, I can"}


def test_sampled_replies_come_from_the_unaligned_model_and_gaps_are_left_out(tiny_tokenizer):
    wanted = []

    def sample(requests, num_tokens):
        wanted.append(num_tokens)
        return ["Of course, first you do this", None, "Certainly, begin with that", "Yes, here you are"]

    attack = Prefill(PrefillConfig(tokens=[6]))
    attack.equip(Supplies(tiny_tokenizer, sample))
    found = asked(attack)
    assert [query.request.id for query in found] == ["r0", "r2", "r3"]
    assert found[0].prompt.prefill == "Of cou"
    assert wanted == [48]


def test_sampled_replies_need_the_unaligned_model():
    with pytest.raises(ConfigError, match=r"Expected `target.base` to name the unaligned model"):
        Prefill(PrefillConfig()).equip(Supplies())


def test_model_that_complies_with_too_few_is_refused(tiny_tokenizer):
    attack = Prefill(PrefillConfig(tokens=[2]))
    attack.equip(Supplies(tiny_tokenizer, lambda requests, _: ["Sure, yes", None, None, None]))
    with pytest.raises(DataError, match="to comply with at least half of 4 harmful prompts"):
        attack.start(REQUESTS, seed=0)


def test_replies_of_a_file(tmp_path, tiny_tokenizer):
    path = tmp_path / "replies.jsonl"
    rows = [f'{{"prompt": "{one.text}", "reply": "Gladly, at once"}}\n' for one in REQUESTS[:3]]
    path.write_text("".join(rows))
    attack = Prefill(PrefillConfig(tokens=[6], replies=str(path)))
    attack.equip(Supplies(tiny_tokenizer))
    assert [query.prompt.prefill for query in asked(attack)] == ["Gladly"] * 3
    path.write_text(rows[0])
    with pytest.raises(DataError, match="to have replies to at least half of 4 requests, but got 1"):
        attack.start(REQUESTS, seed=0)
    path.write_text('{"prompt": "only"}\n')
    with pytest.raises(DataError, match=r"Expected row 1 of .* to have the texts `prompt` and `reply`"):
        attack.start(REQUESTS, seed=0)
