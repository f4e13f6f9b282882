"""Many prompts to an endpoint: order, concurrency, the journal, and the responder of attacks."""

from __future__ import annotations

import base64
import threading

import pytest

from experiments.attacks.interface import Query
from experiments.endpoint import EndpointResponder, ReplyJournal, ask_all, question_of, to_reply
from experiments.endpoint_client import Answer, EndpointClient, UnansweredError
from framework.endpoint_settings import EndpointAddress, EndpointSettings
from framework.errors import ConfigError, DataError, ModelError
from framework.evaluation.generation import Reply
from framework.examples import Prompt
from tests.experiments.endpoint_server import Said, completion, serving

QUICK = {"retry_wait": 0.01, "timeout": 5.0}
OPEN = EndpointSettings(prefill_style="assistant_last_message", **QUICK)


def question(prompt: Prompt, settings: EndpointSettings = OPEN, *, system: str | None = None, seed: int = 0):
    return question_of(prompt, settings, system=system, max_new_tokens=8, temperature=0.0, seed=seed)


def echo(body, number):
    return completion(body["messages"][-1]["content"])


def test_replies_come_back_under_their_numbers_with_the_limit_at_once():
    gate = threading.Barrier(3, timeout=5)

    def together(body, number):
        gate.wait()  # passes only when three requests are under way
        return echo(body, number)

    with serving(together) as endpoint:
        client = EndpointClient(EndpointAddress(endpoint.url, "tiny"), EndpointSettings(concurrency=3, **QUICK))
        asked = [question(Prompt(f"p{n}", f"text {n}", "harmful")) for n in range(9)]
        found = dict(ask_all(client, asked))
        client.close()
    assert {number: answer.text for number, answer in found.items()} == {n: f"text {n}" for n in range(9)}
    assert endpoint.most_under_way == 3


def test_an_error_that_concerns_all_ends_the_asking():
    with serving(lambda body, number: Said(b"", 401)) as endpoint:
        client = EndpointClient(EndpointAddress(endpoint.url, "tiny"), EndpointSettings(concurrency=1, **QUICK))
        asked = [question(Prompt(f"p{n}", "text", "harmful")) for n in range(9)]
        with pytest.raises(ModelError, match="status 401"):
            list(ask_all(client, asked))
        client.close()
    assert len(endpoint.asked) < 9


def test_a_question_holds_system_opening_and_a_seed_of_its_own():
    prompt = Prompt("p", "text", "harmful", prefill="Sure,")
    found = question(prompt, system="Be brief.")
    assert [m["role"] for m in found.messages] == ["system", "user", "assistant"]
    assert found.messages[-1]["content"] == "Sure,"
    seeds = {question(prompt, seed=s).seed for s in (0, 1)} | {question(Prompt("q", "text", "harmful")).seed}
    assert len(seeds) == 3
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_an_opening_is_refused_unless_the_endpoint_is_declared_to_take_one():
    with pytest.raises(ConfigError, match=r"`endpoint\.prefill_style` to say how .* but got 'none' and prompt `p`"):
        question(Prompt("p", "text", "harmful", prefill="Sure,"), EndpointSettings())


@pytest.mark.parametrize("said", ["Sure, here", " here"])
def test_a_reply_opens_with_what_was_forced_once(said):
    assert to_reply(Answer(said, None, None, True), "Sure,") == Reply("Sure, here", 0, True)


def test_an_image_is_sent_in_the_request(tmp_path):
    image = tmp_path / "a.png"
    image.write_bytes(b"pixels")
    parts = question(Prompt("p", "what is it", "benign", image=image)).messages[0]["content"]
    assert parts[0]["image_url"]["url"] == "data:image/png;base64," + base64.b64encode(b"pixels").decode()
    assert parts[1] == {"type": "text", "text": "what is it"}
    with pytest.raises(DataError, match="to be an image, but got"):
        question(Prompt("p", "what is it", "benign", image=tmp_path / "none.png"))


def test_the_journal_keeps_replies_and_drops_a_line_cut_short(tmp_path):
    path = tmp_path / "replies.jsonl"
    first = Answer("line\u2028one\n", 3, 4, True)
    with ReplyJournal(path) as journal:
        journal.append("safety/embedded/a", first)
        journal.append("safety/embedded/b", Answer("two", None, None, False))
    path.write_bytes(path.read_bytes()[:-5])
    with ReplyJournal(path) as journal:
        assert {name: kept.answer for name, kept in journal.kept.items()} == {"safety/embedded/a": first}
        journal.append("safety/embedded/b", first)
    with ReplyJournal(path) as journal:
        assert list(journal.kept) == ["safety/embedded/a", "safety/embedded/b"]


def test_a_journal_of_something_else_is_refused(tmp_path):
    path = tmp_path / "replies.jsonl"
    path.write_text('{"prompt": "a"}\n')
    with pytest.raises(DataError, match=r"Expected line 1 of `.*replies\.jsonl` to be a reply"):
        ReplyJournal(path)


def queries(*texts: str) -> list[Query]:
    return [Query(Prompt(f"r{n}", t, "harmful"), Prompt(f"q{n}", t, "harmful")) for n, t in enumerate(texts)]


def test_the_responder_answers_queries_in_order():
    with serving(echo) as endpoint:
        address = EndpointAddress(endpoint.url, "tiny")
        with EndpointResponder(address, OPEN, system="Be safe.") as responder:
            asked = [*queries("one", "two"), Query(*[Prompt("x", "three", "harmful")] * 2, system="Other.")]
            seen = []
            found = responder.replies(
                asked,
                max_new_tokens=5,
                temperature=1.0,
                seed=3,
                progress=lambda done, total: seen.append((done, total)),
            )
            assert responder.can_prefill
    assert [reply.text for reply in found] == ["one", "two", "three"]
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert sorted(body["messages"][0]["content"] for body in endpoint.asked) == ["Be safe.", "Be safe.", "Other."]
    assert {body["temperature"] for body in endpoint.asked} == {1.0}


def test_a_query_without_a_reply_is_an_error_not_a_reply():
    with serving(lambda body, number: completion("", reason="length")) as endpoint:
        responder = EndpointResponder(EndpointAddress(endpoint.url, "tiny"), EndpointSettings(**QUICK))
        with responder, pytest.raises(UnansweredError, match="prompt `q0` to hold text"):
            responder.replies(queries("one"), max_new_tokens=5, temperature=0.0, seed=0)


def test_so_many_queries_as_are_allowed_stay_without_a_reply():
    def answer(body, number):
        return completion("", reason="length") if number == 1 else completion("hi")

    settings = EndpointSettings(**{**QUICK, "concurrency": 1})
    options = {"max_new_tokens": 5, "temperature": 0.0, "seed": 0}
    with serving(answer) as endpoint, EndpointResponder(EndpointAddress(endpoint.url, "tiny"), settings) as responder:
        found = responder.replies(queries("one", "two"), max_unanswered=1, **options)
        assert [reply and reply.text for reply in found] == [None, "hi"]
        endpoint.answer = lambda body, number: completion("", reason="length")
        with pytest.raises(UnansweredError, match="to hold text"):
            responder.replies(queries("one", "two"), max_unanswered=1, **options)
