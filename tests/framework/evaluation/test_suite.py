from __future__ import annotations

import pytest

from framework.chat import ChatEncoder
from framework.errors import DataError, SeawallError
from framework.evaluation import suite
from framework.evaluation.generation import Reply
from framework.evaluation.judges import RuleJudge, Verdict
from framework.evaluation.metrics import Rate
from framework.evaluation.records import redact
from framework.evaluation.suite import EvaluationSet, evaluate_model, make_records
from framework.examples import Prompt

KINDS = {"safety": "harmful", "over_refusal": "benign", "task": "task"}


def some_set(role="safety", n=3, **settings):
    prompts = [Prompt(f"p{i}", f"Question {i}?", KINDS[role], "topic", "yes") for i in range(n)]
    if role == "task":
        settings.setdefault("is_correct", lambda reply, answer: reply == answer)
    return EvaluationSet(settings.pop("name", "embedded"), role, prompts, **settings)


def test_real_generation_end_to_end(tiny_model, tiny_tokenizer):
    seen = []
    sets = [some_set(), some_set("over_refusal", 2), some_set("task", 4, name="triage", max_new_tokens=3)]
    result = evaluate_model(
        tiny_model,
        ChatEncoder(tiny_tokenizer),
        sets,
        judges=[RuleJudge()],
        max_new_tokens=5,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert [record.set_name for record in result.records] == ["embedded"] * 5 + ["triage"] * 4
    assert result.generated_tokens == sum(record.num_tokens for record in result.records) > 0
    assert max(record.num_tokens for record in result.records[5:]) <= 3
    assert set(result.rates) == {
        "embedded/refusal_rate",
        "embedded/keyword_attack_success",
        "embedded/attack_success",
        "embedded/degenerate_rate",
        "embedded/over_refusal",
        "embedded/benign_degenerate_rate",
        "triage/task_accuracy",
    }
    assert result.rates["triage/task_accuracy"].denominator == 4
    assert seen[-1] == (5 * 5 + 4 * 3, 5 * 5 + 4 * 3)
    assert set(result.seconds_by_set) == {"safety/embedded", "over_refusal/embedded", "task/triage"}
    assert 0 < sum(result.seconds_by_set.values()) <= result.seconds
    assert all("rules" in record.verdicts for record in result.records[:5])
    assert all(not record.verdicts for record in result.records[5:])


def test_overall_pools_sets(monkeypatch):
    texts = {
        "a": ["I can't help with that.", "First you take a bowl and fill it with water.", ""],
        "b": ["I won't do that."],
    }

    def generate(model, encoder, prompts, **settings):
        return [Reply(text, 1, True) for text in (texts["a"] if len(prompts) == 3 else texts["b"])]

    monkeypatch.setattr(suite, "generate_sharded", generate)
    sets = [some_set(name="a"), some_set(name="b", n=1)]
    result = evaluate_model(None, None, sets, judges=[RuleJudge()])
    assert result.rates["a/refusal_rate"] == Rate.of("refusal_rate", 1, 3)
    assert result.rates["b/refusal_rate"] == Rate.of("refusal_rate", 1, 1)
    assert result.overall["refusal_rate"] == Rate.of("refusal_rate", 2, 4)
    assert result.overall["attack_success"] == Rate.of("attack_success", 1, 4)


def test_tuned_classifier_is_neither_refusing_nor_successful():
    item = some_set(task_labels=["positive", "negative"])
    records = make_records(item, [Reply("The answer is positive.", 5, True)] * 3, judges=[RuleJudge()])
    assert [record.degenerate for record in records] == ["bare_label"] * 3


def test_task_labels_are_right_answers_in_their_own_set():
    item = some_set("task", 2)
    records = make_records(item, [Reply("yes", 1, True), Reply("no", 1, True)], judges=[RuleJudge()])
    assert [(record.correct, record.degenerate) for record in records] == [(True, None), (False, None)]


def test_missing_reply_is_an_error():
    with pytest.raises(SeawallError, match=r"Expected 3 replies for set `embedded`, but got 2"):
        make_records(some_set(), [Reply("a", 1, True)] * 2, judges=[RuleJudge()])


def test_failing_judge_stops_the_evaluation():
    class Lazy(RuleJudge):
        def judge(self, pairs):
            return [Verdict()]

    with pytest.raises(SeawallError, match=r"Expected judge `rules` to give 3 verdicts, but got 1"):
        make_records(some_set(), [Reply("a", 1, True)] * 3, judges=[Lazy()])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: some_set(n=0), r"Expected evaluation set `embedded` to hold at least one prompt, but got none"),
        (
            lambda: EvaluationSet("x", "safety", some_set("over_refusal").prompts),
            r"every prompt of set `x` \(safety\) to be of kind 'harmful', but got 'benign' for 'p0'",
        ),
        (
            lambda: EvaluationSet("x", "safety", [*some_set().prompts, *some_set().prompts]),
            r"Expected the prompt ids of set `x` to be unique, but got some twice",
        ),
        (lambda: some_set("task", is_correct=None), r"task set `embedded` to be markable, but got no `is_correct`"),
        (
            lambda: EvaluationSet("x", "task", [Prompt("p", "t", "task")], is_correct=str.__eq__),
            r"task set `x` to be markable, but got prompt 'p' without an answer",
        ),
    ],
)
def test_bad_sets_are_refused(make, message):
    with pytest.raises(DataError, match=message):
        make()


@pytest.mark.parametrize(
    ("sets", "judges", "message"),
    [
        ([], [RuleJudge()], r"Expected `sets` to be one or more evaluation sets, but got none"),
        ([some_set(), some_set()], [RuleJudge()], r"names of safety sets to be unique, but got 'embedded' twice"),
        ([some_set()], [], r"Expected `judges` to be one or more judges, but got none"),
    ],
)
def test_bad_evaluations_are_refused(sets, judges, message):
    with pytest.raises(DataError, match=message):
        evaluate_model(None, None, sets, judges=judges)


def test_judges_see_what_the_model_added_to_a_forced_opening():
    """The opening is not the model's: it neither makes a refusal of the reply nor an answer of it."""
    prompts = [Prompt(f"p{i}", "How?", "harmful", prefill="Sure, first you take a large bowl and") for i in range(2)]
    replies = [Reply(f"{prompts[0].prefill} I'm sorry, but I can't help with that.", 9, True)]
    replies.append(Reply(prompts[1].prefill, 1, True))
    records = make_records(EvaluationSet("prefill_8", "safety", prompts), replies, judges=[RuleJudge()])
    assert [record.is_refused for record in records] == [True, False]
    assert [record.degenerate for record in records][1] == "empty"
    assert records[0].reply == " I'm sorry, but I can't help with that."
    assert records[0].to_dict()["prefill"] == prompts[0].prefill
    shown = redact(records[0])
    assert (shown.prefill, shown.reply) == ("[opening of 8 words redacted]", "[reply of 8 words redacted]")
