from __future__ import annotations

import pytest
import torch

from framework.chat import ChatEncoder
from framework.errors import ConfigError, DataError
from framework.evaluation.margin import COMPLIANCE_OPENINGS, REFUSAL_OPENINGS, MarginResult, refusal_margin
from framework.evaluation.refusal_rules import is_refusal
from framework.examples import Prompt

PROMPTS = [Prompt(f"p{i}", "Why? " * n, "harmful", prefill="Well, " if i == 2 else "") for i, n in enumerate([1, 4, 2])]


def reference(model, encoder, prompt):
    """The formula, one full forward pass per opening."""

    def score(opening):
        before = encoder.encode_prompt(prompt.messages, prefill=prompt.prefill)
        ids = encoder.encode_reply(opening, is_complete=False)
        with torch.no_grad():
            logits = model(torch.tensor([before + ids])).logits[0, len(before) - 1 : -1].double()
        return torch.log_softmax(logits, -1)[torch.arange(len(ids)), ids].sum() / len(ids)

    def mean(openings):
        return torch.stack([score(text).exp() for text in openings]).mean().log()

    return float(mean(REFUSAL_OPENINGS) - mean(COMPLIANCE_OPENINGS))


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_margin_equals_the_formula(any_model, tiny_tokenizer, batch_size):
    encoder = ChatEncoder(tiny_tokenizer, system="A system turn of more than sixteen tokens")
    result = refusal_margin(any_model, encoder, PROMPTS, batch_size=batch_size)
    expected = [reference(any_model, encoder, prompt) for prompt in PROMPTS]
    assert result.per_prompt == pytest.approx(expected, abs=2e-4)
    assert result.mean == pytest.approx(sum(expected) / 3, abs=2e-4)
    assert result.num_prompts == 3


def test_probability_of_refusal_openings_is_their_sum(tiny_model, tiny_tokenizer):
    encoder, seen = ChatEncoder(tiny_tokenizer), []
    openings = ["N", "ab"]
    found = refusal_margin(
        tiny_model, encoder, PROMPTS, batch_size=2, refusals=openings, progress=lambda *done: seen.append(done)
    )

    def probability(prompt, opening):
        before = encoder.encode_prompt(prompt.messages, prefill=prompt.prefill)
        ids = encoder.encode_reply(opening, is_complete=False)
        with torch.no_grad():
            logits = tiny_model(torch.tensor([before + ids])).logits[0, len(before) - 1 : -1]
        return float(torch.log_softmax(logits, -1)[torch.arange(len(ids)), ids].sum().exp())

    expected = sum(probability(prompt, opening) for prompt in PROMPTS for opening in openings) / len(PROMPTS)
    assert found.refusal_probability == pytest.approx(expected, rel=1e-4)
    assert 0 < expected < 1
    assert seen == [(2, 3), (3, 3)]


def test_margin_rises_when_refusals_become_likelier(tiny_model, tiny_tokenizer):
    encoder = ChatEncoder(tiny_tokenizer)
    before = refusal_margin(tiny_model, encoder, PROMPTS)
    rows = [encoder.encode_prompt(prompt.messages) for prompt in PROMPTS]
    optimizer = torch.optim.Adam(tiny_model.parameters(), lr=0.01)
    for _ in range(20):
        reply = encoder.encode_reply(REFUSAL_OPENINGS[0])
        loss = sum(
            torch.nn.functional.cross_entropy(
                tiny_model(torch.tensor([row + reply])).logits[0, len(row) - 1 : -1], torch.tensor(reply)
            )
            for row in rows
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = refusal_margin(tiny_model, encoder, PROMPTS)
    assert after.mean > before.mean + 0.5
    assert after.mean > 0


def test_margin_disturbs_nothing(tiny_model, tiny_tokenizer):
    tiny_model.train()
    state, weights = torch.get_rng_state(), {k: v.clone() for k, v in tiny_model.state_dict().items()}
    result = refusal_margin(tiny_model, ChatEncoder(tiny_tokenizer), PROMPTS)
    assert isinstance(result, MarginResult)
    assert tiny_model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, weights[k]) for k, v in tiny_model.state_dict().items())
    # Nothing made in inference mode is left in the model: it still trains.
    tiny_model(torch.tensor([[5, 6, 7]])).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in tiny_model.parameters())


def test_equal_openings_cancel_whatever_their_number(tiny_model, tiny_tokenizer):
    encoder = ChatEncoder(tiny_tokenizer)
    result = refusal_margin(tiny_model, encoder, PROMPTS, refusals=["I"] * 3, compliances=["I"])
    assert result.per_prompt == pytest.approx([0.0] * 3, abs=1e-6)


def test_refusal_openings_open_refusals_and_the_others_do_not():
    assert [text for text in REFUSAL_OPENINGS if not is_refusal(f"{text} help with that.")] == []
    assert [text for text in COMPLIANCE_OPENINGS if is_refusal(f"{text} the plan.")] == []


@pytest.mark.parametrize("openings", [[], ["I", ""]])
def test_openings_must_have_text(tiny_model, tiny_tokenizer, openings):
    with pytest.raises(ConfigError, match=r"Expected `compliances` to be one or more openings with text, but got"):
        refusal_margin(tiny_model, ChatEncoder(tiny_tokenizer), PROMPTS, compliances=openings)


def test_no_prompts_is_an_error(tiny_model, tiny_tokenizer):
    with pytest.raises(DataError, match=r"Expected `prompts` to be one or more prompts .* but got none"):
        refusal_margin(tiny_model, ChatEncoder(tiny_tokenizer), [])
