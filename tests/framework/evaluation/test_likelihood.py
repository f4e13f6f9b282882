from __future__ import annotations

import json

import pytest
import torch
from scipy import stats

from framework.chat import ChatEncoder
from framework.errors import ConfigError, DataError
from framework.evaluation import likelihood
from framework.evaluation.likelihood import ChoiceItem, mean_nll, read_bbh, read_mmlu, score_choices
from framework.examples import Example, Turn

ITEMS = [
    ChoiceItem("a", "Which letter?", ("A", "B"), 0),
    ChoiceItem("b", "Is that so, or is it not so at all?", ("Yes", "No", "Perhaps"), 2),
    ChoiceItem("c", "One?", ("B", "No"), 1),
]


def log_likelihood(model, before, ids):
    with torch.no_grad():
        logits = model(torch.tensor([before + ids])).logits[0, len(before) - 1 : -1].double()
    return float(torch.log_softmax(logits, -1)[torch.arange(len(ids)), ids].sum())


@pytest.mark.parametrize("batch_size", [1, 3])
def test_choices_in_chat_form(any_model, tiny_tokenizer, batch_size):
    encoder = ChatEncoder(tiny_tokenizer)
    result = score_choices(any_model, encoder, ITEMS, batch_size=batch_size)
    for item, found, guess in zip(ITEMS, result.log_likelihoods, result.predictions, strict=True):
        before = encoder.encode_prompt([Turn("user", item.prompt)])
        expected = [log_likelihood(any_model, before, encoder.encode_reply(c, is_complete=False)) for c in item.choices]
        assert found == pytest.approx(expected, abs=1e-3)
        assert guess == expected.index(max(expected))
    num_right = sum(item.answer == guess for item, guess in zip(ITEMS, result.predictions, strict=True))
    assert (result.accuracy.numerator, result.accuracy.denominator) == (num_right, 3)


def test_choices_in_plain_form(tiny_model, tiny_tokenizer):
    result = score_choices(tiny_model, tiny_tokenizer, ITEMS[:1])
    before = tiny_tokenizer("Which letter?\nAnswer:")["input_ids"]
    expected = [log_likelihood(tiny_model, before, tiny_tokenizer(c)["input_ids"]) for c in (" A", " B")]
    assert result.log_likelihoods[0] == pytest.approx(expected, abs=1e-4)


def test_no_items_is_an_error(tiny_model, tiny_tokenizer):
    with pytest.raises(DataError, match=r"Expected `prompts` to be one or more prompts .* but got none"):
        score_choices(tiny_model, ChatEncoder(tiny_tokenizer), [])


@pytest.mark.parametrize(("choices", "answer"), [(("A",), 0), (("A", ""), 0), (("A", "B"), 2), (("A", "B"), -1)])
def test_unanswerable_item_is_refused(choices, answer):
    with pytest.raises(DataError, match=r"Expected item `x` to have two or more choices and the answer among them"):
        ChoiceItem("x", "?", choices, answer)


def examples(n=5):
    return [
        Example(f"e{i}", (Turn("user", "Say " * (i + 1)),), "word " * (3 * i + 1), is_complete=i != 1) for i in range(n)
    ]


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_nll_is_the_mean_over_reply_tokens(any_model, tiny_tokenizer, batch_size):
    encoder = ChatEncoder(tiny_tokenizer)
    result = mean_nll(any_model, encoder, examples(), batch_size=batch_size)
    sums, counts = [], []
    for example in examples():
        reply = encoder.encode_reply(example.reply, is_complete=example.is_complete)
        sums.append(-log_likelihood(any_model, encoder.encode_prompt(example.messages), reply))
        counts.append(len(reply))
    assert result.value == pytest.approx(sum(sums) / sum(counts), abs=1e-4)
    assert (result.count, result.num_groups) == (sum(counts), 5)
    assert result.low < result.value < result.high


def test_scoring_says_how_far_it_is(tiny_model, tiny_tokenizer):
    encoder, seen = ChatEncoder(tiny_tokenizer), []
    rows = examples()
    mean_nll(tiny_model, encoder, rows, batch_size=2, progress=lambda *done: seen.append(done))
    assert seen[-1] == (len(rows), len(rows))
    assert len(seen) == -(-len(rows) // 2)
    seen.clear()
    items = [ChoiceItem(f"q{i}", f"Question {i}?", ("a", "b"), 0) for i in range(3)]
    score_choices(tiny_model, encoder, items, batch_size=2, progress=lambda *done: seen.append(done))
    assert seen == [(2, 3), (3, 3)]


def test_nll_interval_over_replies(tiny_model, tiny_tokenizer):
    encoder = ChatEncoder(tiny_tokenizer)
    rows = [Example(f"e{i}", (Turn("user", "a" * i),), "same", "task") for i in range(1, 9)]
    result = mean_nll(tiny_model, encoder, rows)
    each = torch.tensor([mean_nll(tiny_model, encoder, [row]).value for row in rows], dtype=torch.float64)
    half = stats.t.ppf(0.975, 7) * stats.sem(each.numpy())
    assert result.high - result.value == pytest.approx(half, rel=1e-3)


def test_long_replies_are_computed_in_smaller_batches(tiny_model, tiny_tokenizer, monkeypatch):
    encoder, sizes = ChatEncoder(tiny_tokenizer), []
    whole = mean_nll(tiny_model, encoder, examples())
    reply_nll = likelihood._reply_nll

    def record(model, rows, counts):
        sizes.append(len(rows))
        return reply_nll(model, rows, counts)

    monkeypatch.setattr(likelihood, "_reply_nll", record)
    monkeypatch.setattr(likelihood, "_MAX_LOGITS", 260 * 60)
    assert mean_nll(tiny_model, encoder, examples()).value == pytest.approx(whole.value, abs=1e-5)
    assert sizes == [1, 1, 1, 2]


def test_nll_bad_input(tiny_model, tiny_tokenizer):
    encoder = ChatEncoder(tiny_tokenizer)
    with pytest.raises(DataError, match=r"Expected `prompts` to be one or more .* but got none"):
        mean_nll(tiny_model, encoder, [])
    with pytest.raises(ConfigError, match=r"Expected `batch_size` to be an integer ≥ 1, but got 0"):
        mean_nll(tiny_model, encoder, examples(), batch_size=0)
    with pytest.raises(DataError, match=r"context of 512 tokens, but got 1 of 1"):
        mean_nll(tiny_model, encoder, [Example("x", (Turn("user", "a"),), "b" * 512)])


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


HEADER = "question,choice0,choice1,choice2,choice3,answer\n"


def test_mmlu_layout(tmp_path):
    path = write(tmp_path / "anatomy_test.csv", HEADER + '"Which, if any?\nReally?",one,two,three,"fo,ur",2\n')
    (item,) = read_mmlu(path)
    assert item.prompt.startswith("Which, if any?\nReally?\nA. one\nB. two\nC. three\nD. fo,ur\n")
    assert (item.id, item.choices, item.answer, item.category) == ("anatomy_test-1", tuple("ABCD"), 2, "anatomy")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEADER, r"to hold at least one question, but got none"),
        (HEADER + "q,1,2,3,4,0\nq,1,2,3,4,A\n", r"Expected row 2 of .* with an answer from 0 to 3"),
        (HEADER + "q,1,2\n", r"Expected row 1 of .* to have question, choice0"),
    ],
)
def test_mmlu_bad_files(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        read_mmlu(write(tmp_path / "x.csv", text))


def bbh(tmp_path, *rows):
    rows = [{"input": text, "target": target} for text, target in rows]
    return write(tmp_path / "task.json", json.dumps({"examples": rows}))


def test_bbh_options_by_letter_by_text_and_by_target(tmp_path):
    lettered, listed, free = read_bbh(
        bbh(
            tmp_path,
            ("When?\nOptions:\n(A) Monday\n(B) Tuesday", "(B)"),
            ("Does it?\nOptions:\n- Yes\n- No", "No"),
            ("not True is", "False"),
        )
    )
    assert (lettered.choices, lettered.answer) == (("(A)", "(B)"), 1)
    assert (listed.choices, listed.answer) == (("Yes", "No"), 1)
    assert (free.choices, free.answer, free.category) == (("(B)", "False", "No"), 1, "task")


def test_bbh_bad_files(tmp_path):
    with pytest.raises(DataError, match=r"`.*gone.json` to be a readable text file, but got FileNotFoundError"):
        read_bbh(tmp_path / "gone.json")
    with pytest.raises(DataError, match=r"to be json with `examples` of `input` and `target`, but got JSONDecodeError"):
        read_bbh(write(tmp_path / "a.json", "{"))
    with pytest.raises(DataError, match=r"to be json with `examples` of `input` and `target`, but got KeyError"):
        read_bbh(write(tmp_path / "b.json", '{"examples": [{"input": "x"}]}'))
    with pytest.raises(DataError, match=r"to hold at least one question, but got none"):
        read_bbh(write(tmp_path / "c.json", '{"examples": []}'))
    with pytest.raises(DataError, match=r"target of example 1 of .* to be one of \(A\), \(B\), but got 'C'"):
        read_bbh(bbh(tmp_path, ("?\nOptions:\n(A) a\n(B) b", "C")))


def test_real_files(real_data):
    questions = [item for path in sorted(real_data.glob("mmlu/test/*.csv")) for item in read_mmlu(path)]
    assert len(questions) == 1140
    assert len({item.category for item in questions}) == 57
    tasks = {path.stem: read_bbh(path) for path in sorted(real_data.glob("bbh/*.json"))}
    assert len(tasks) == 6
    assert {item.choices for item in tasks["navigate"]} == {("Yes", "No")}
    assert {item.choices for item in tasks["boolean_expressions"]} == {("False", "True")}
