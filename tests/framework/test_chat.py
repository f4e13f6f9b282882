from __future__ import annotations

import copy

import pytest
from tokenizers import AddedToken

from framework.chat import ChatEncoder, EncodedExample
from framework.errors import ModelError
from framework.examples import Example, Turn
from tests.conftest import make_tokenizer

ASK = (Turn("user", "2+2?"),)


@pytest.fixture
def encoder(tiny_tokenizer):
    return ChatEncoder(tiny_tokenizer)


def test_a_prompt_ends_where_the_reply_starts(encoder):
    text = encoder.render_prompt(ASK)
    assert text == "<|start|>user\n2+2?<|end|>\n<|start|>assistant\n"
    assert encoder.render_prompt(ASK, prefill="Sure,") == text + "Sure,"
    assert encoder.tokenizer.decode(encoder.encode_prompt(ASK)) == text


def test_the_system_message_is_put_before_conversations_without_one(tiny_tokenizer):
    encoder = ChatEncoder(tiny_tokenizer, system="Be kind.")
    assert encoder.render_prompt(ASK).startswith("<|start|>system\nBe kind.<|end|>\n<|start|>user\n")
    own = (Turn("system", "Be brief."), *ASK)
    assert "Be kind." not in encoder.render_prompt(own)
    assert ChatEncoder(tiny_tokenizer, system="").render_prompt(ASK).startswith("<|start|>system\n<|end|>\n")


def test_a_reply_ends_with_the_end_of_turn_token(encoder):
    end = encoder.tokenizer.convert_tokens_to_ids("<|end|>")
    assert encoder.end_ids == (end,)
    assert encoder.encode_reply("4")[-1] == end
    assert end not in encoder.encode_reply("4", is_complete=False)


def test_an_example_carries_loss_on_its_reply_alone(encoder):
    row = encoder.encode_example(Example("1", ASK, "four"))
    assert encoder.tokenizer.decode(row.input_ids[: row.num_prompt_tokens]) == encoder.render_prompt(ASK)
    assert encoder.tokenizer.decode(row.input_ids[row.num_prompt_tokens :]) == "four<|end|>"
    assert row.num_reply_tokens == 5
    assert row.num_truncated == 0


def test_an_example_that_was_cut_off_has_no_end_token(encoder):
    row = encoder.encode_example(Example("1", ASK, "four", is_complete=False))
    assert row.input_ids[-1] not in encoder.end_ids


def test_a_long_row_loses_ids_from_the_left(encoder):
    whole = encoder.encode_example(Example("1", ASK, "four"))
    cut = encoder.encode_example(Example("1", ASK, "four"), max_length=10)
    assert cut == EncodedExample(whole.input_ids[-10:], 5, len(whole.input_ids) - 10)
    assert encoder.encode_example(Example("1", ASK, "four"), max_length=500) == whole


def test_the_first_id_never_counts_as_a_reply_token(encoder):
    row = encoder.encode_example(Example("1", ASK, "four"), max_length=4)
    assert len(row.input_ids) == 4
    assert row.num_prompt_tokens == 1
    assert row.num_reply_tokens == 3


def test_stop_ids_hold_the_end_of_turn_and_of_sequence(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.eos_token = "<|text|>"
    encoder = ChatEncoder(tokenizer)
    assert encoder.stop_ids == tuple(tokenizer.convert_tokens_to_ids(["<|end|>", "<|text|>"]))
    assert ChatEncoder(tiny_tokenizer).stop_ids == encoder.end_ids


def test_a_special_token_that_has_no_name_of_its_own_is_found():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken("<|turn|>", special=True)])
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<|turn|><|end|>{% endfor %}"
    turn = tokenizer.convert_tokens_to_ids("<|turn|>")
    assert turn not in tokenizer.all_special_ids
    assert ChatEncoder(tokenizer).end_ids == (turn,)


def test_a_template_without_end_token_falls_back_to_the_end_of_sequence():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    assert ChatEncoder(tokenizer).end_ids == (tokenizer.eos_token_id,)


def test_no_end_token_anywhere_is_refused():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="to name an end token, but got neither"):
        ChatEncoder(tokenizer)


def test_no_chat_template_is_refused():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match="Expected the tokenizer to have a chat template, but got none"):
        ChatEncoder(tokenizer)
