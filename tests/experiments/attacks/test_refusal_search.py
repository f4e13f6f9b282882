"""The rule that chooses a direction, its scores, and a planted direction that must be found."""

from __future__ import annotations

import math

import pytest
import torch

from experiments.attacks.refusal_search import (
    Candidate,
    PromptIds,
    choose,
    find_direction,
    mean_differences,
    mean_kl,
    num_template_tokens,
    refusal_scores,
    separation,
)
from experiments.contract.tiny import make_tokenizer
from framework.chat import ChatEncoder
from framework.errors import DataError, WiringError
from tests.experiments.attacks.planted_refusal import MARKER, encode, planted_model, refusal_ids


def prompts(count=6):
    harmful, harmless = ([encode(f"{kind} {i}") for i in range(2 * count)] for kind in (f"do {MARKER}", "do it"))
    return PromptIds(harmful[:count], harmless[:count], harmful[count:], harmless[count:])


def find(model, rows=None, **options):
    given = {"positions": 4, "shortlist": None, "kl_threshold": 0.1, "pad_id": 0, **options}
    return find_direction(model, rows or prompts(), tokens=refusal_ids(), **given)


def test_a_planted_direction_is_found_and_the_rule_holds():
    model, planted = planted_model()
    found = find(model)
    assert abs(float(found.direction @ planted)) > 0.999
    assert found.meets_rule
    assert 1 <= found.candidate.layer < 0.8 * 5
    assert found.refusal_before > 0 > found.candidate.bypass
    assert found.candidate.induce > 0
    assert found.candidate.kl <= 0.1
    # Nothing is written before layer 1, so layer 0 gives no candidate: 3 layers at 4 tokens.
    assert found.num_candidates == 3 * 4


def test_a_shortlist_finds_it_with_fewer_scores():
    model, planted = planted_model()
    found = find(model, shortlist=3)
    assert found.num_candidates == 3
    assert abs(float(found.direction @ planted)) > 0.999


def test_a_shortlist_longer_than_the_list_is_refused():
    with pytest.raises(
        DataError, match=r"`shortlist` to be at most \d+ \(\d+ positions x 4 of 5 layers\), but got 999"
    ):
        find(planted_model()[0], shortlist=999)


def test_classes_that_look_alike_are_refused():
    same = [encode("the same")] * 3
    with pytest.raises(DataError, match="harmful and harmless prompts to differ"):
        find(planted_model()[0], PromptIds(same, same, same, same))


def test_the_lowest_bypass_of_those_that_keep_the_rule_wins():
    rows = [
        Candidate(1, -1, bypass=-9.0, induce=1.0, kl=0.2),
        Candidate(2, -1, bypass=-8.0, induce=-0.1, kl=0.01),
        Candidate(3, -1, bypass=-2.0, induce=0.0, kl=0.1),
        Candidate(4, -1, bypass=-1.0, induce=5.0, kl=0.0),
    ]
    assert choose(rows, kl_threshold=0.1) == (rows[2], True)
    assert choose(rows[:2], kl_threshold=0.1) == (rows[0], False)


def test_scores_by_hand():
    logits = torch.log(torch.tensor([[0.2, 0.3, 0.5]]))
    assert float(refusal_scores(logits, [0, 1])) == pytest.approx(0.0, abs=1e-6)
    assert float(refusal_scores(logits, [0])) == pytest.approx(math.log(0.25), abs=1e-5)
    other = torch.log(torch.tensor([[0.5, 0.25, 0.25]]))
    by_hand = 0.2 * math.log(0.4) + 0.3 * math.log(1.2) + 0.5 * math.log(2)
    assert mean_kl(logits, other) == pytest.approx(by_hand, abs=1e-6)
    assert mean_kl(logits, logits) == pytest.approx(0.0, abs=1e-9)


def test_separation_is_in_pooled_deviations():
    draw = torch.Generator().manual_seed(0)
    harmful, harmless = (torch.randn(4000, 1, 1, 3, generator=draw) for _ in range(2))
    harmful[..., 0] += 2.0
    assert mean_differences(harmful, harmless).dtype == torch.float64
    assert float(separation(harmful, harmless)) == pytest.approx(2.0, abs=0.1)
    assert float(separation(harmful, harmful)) == 0.0


def test_the_template_of_the_tiny_tokenizer_ends_in_an_end_and_the_next_turn():
    assert num_template_tokens(ChatEncoder(make_tokenizer())) == len("..\nassistant\n")


def test_a_template_without_tokens_behind_the_text_is_refused():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<|start|>{{ m['content'] }}{% endfor %}"
    with pytest.raises(WiringError, match="to put tokens behind the user's text, but got none"):
        num_template_tokens(ChatEncoder(tokenizer))
