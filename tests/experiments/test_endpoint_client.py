"""One request to an endpoint: what is sent, sent again, and refused."""

from __future__ import annotations

import json
import socket

import pytest

from experiments.endpoint_client import Answer, EndpointClient, Question, UnansweredError
from framework.endpoint_settings import EndpointAddress, EndpointSettings
from framework.errors import ConfigError, ModelError
from tests.experiments.endpoint_server import Said, completion, serving

ASKED = Question("p1", [{"role": "user", "content": "hello"}], 16, 0.0, 5)
QUICK = {"retry_wait": 0.01, "timeout": 5.0}


def ask(endpoint, *, model: str = "tiny", question: Question = ASKED, **settings):
    client = EndpointClient(EndpointAddress(endpoint.url, model), EndpointSettings(**{**QUICK, **settings}))
    try:
        return client.ask(question)
    finally:
        client.close()


def test_a_request_holds_what_was_asked_and_no_stream():
    with serving(lambda body, number: completion("hi there")) as endpoint:
        answer = ask(endpoint, extra={"top_p": 0.9})
        body = endpoint.asked[0]
    assert answer == Answer("hi there", 7, 11, finished=True)
    assert body.pop("path") == "/v1/chat/completions"
    assert body == {
        "model": "tiny",
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 16,
        "temperature": 0.0,
        "seed": 5,
        "stream": False,
        "top_p": 0.9,
    }
    assert endpoint.authorization == [None]


def test_fields_a_server_refuses_can_be_left_out():
    with serving(lambda body, number: completion("hi", reason="length", usage=False)) as endpoint:
        settings = {"send_seed": False, "limit_field": "max_completion_tokens"}
        answer = ask(endpoint, question=ASKED._replace(temperature=None), **settings)
    assert answer == Answer("hi", None, None, finished=False)
    assert {"seed", "temperature", "max_tokens"}.isdisjoint(endpoint.asked[0])
    assert endpoint.asked[0]["max_completion_tokens"] == 16


def test_a_refusal_field_is_what_the_model_said():
    with serving(lambda body, number: completion(None, refusal="I can't help with that.")) as endpoint:
        assert ask(endpoint).text == "I can't help with that."


@pytest.mark.parametrize("text", ["", None, "\n"])
def test_a_model_that_ends_its_reply_at_once_has_replied(text):
    with serving(lambda body, number: completion(text)) as endpoint:
        assert ask(endpoint) == Answer(text or "", 7, 11, finished=True)


def test_a_busy_server_is_asked_again_and_its_wish_to_wait_kept():
    busy = Said({"error": {"message": "slow down"}}, 429, {"Retry-After": "0"})
    with serving(lambda body, number: busy if number < 3 else completion("hi")) as endpoint:
        assert ask(endpoint, retries=3).text == "hi"
    assert len(endpoint.asked) == 3


def test_a_late_answer_is_asked_for_again():
    late = Said(completion("late"), wait=0.6)
    with serving(lambda body, number: late if number == 1 else completion("in time")) as endpoint:
        assert ask(endpoint, timeout=0.2, retries=1).text == "in time"


@pytest.mark.parametrize(
    ("said", "settings", "message"),
    [
        (Said({"error": {"message": "busy"}}, 503), {"retries": 2}, r"got status 503 \(busy\) after 3 requests"),
        (Said(b"", 429, {"Retry-After": "3600"}), {"retries": 2}, r"wish to wait 3600 s after 1 requests"),
        (Said(completion("x"), wait=0.5), {"retries": 0, "timeout": 0.1}, r"no answer within 0\.1 s after 1 requests"),
        (Said(completion("", reason="eos")), {}, r"to hold text, but got none \(finish_reason 'eos'\)"),
        (Said(completion(None, tool_calls=[{"id": "a"}])), {}, r"to hold text, but got none"),
        (Said(completion(None, reason="length")), {}, r"spent its tokens on reasoning: raise evaluate\.max_new_tokens"),
        (Said(completion("half", reason="content_filter")), {}, "a filter cut off"),
        (Said({"error": {"code": "content_filter", "message": "blocked"}}, 400), {}, "A filter before the model"),
    ],
    ids=["busy", "long-wait", "time-out", "empty", "tool", "empty-length", "filtered", "blocked"],
)
def test_a_prompt_without_a_reply_is_no_reply(said, settings, message):
    with serving(lambda body, number: said) as endpoint, pytest.raises(UnansweredError, match=message):
        ask(endpoint, **settings)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (Said(b"<html>hello</html>"), r"to answer with a chat completion, but got '<html>hello</html>'"),
        (Said(b'data: {"choices": []}'), "without streaming"),
        (Said({"choices": []}), "to answer with a chat completion"),
        (Said({"choices": ["text"]}), "to answer with a chat completion"),
        (Said(completion(["text"])), "to answer with a chat completion"),
        (Said(completion("hi", reason=None)), "to answer with a chat completion"),
        (Said({"error": "moved"}, 307, {"Location": "http://127.0.0.1:9/"}), "got status 307: moved"),
        (Said({"error": {"message": "no seed here"}}, 400), r"endpoint\.send_seed=false"),
        (Said({"error": {"message": "unsupported: temperature"}}, 400), r"endpoint\.temperature=null"),
        (
            Said({"error": {"message": "use max_completion_tokens"}}, 400),
            r"endpoint\.limit_field=max_completion_tokens",
        ),
        (Said({"error": {"message": "context is 10"}}, 400), "must fit the model's context"),
        (Said({"error": {"message": "what"}}, 418), "Check the settings under `endpoint`"),
        (Said(b"", 401), r"accept requests without an API key, but got status 401: no explanation"),
    ],
)
def test_what_asking_again_cannot_mend_is_refused_at_once(said, message):
    with serving(lambda body, number: said) as endpoint, pytest.raises(ModelError, match=message):
        ask(endpoint)
    assert len(endpoint.asked) == 1


def test_an_unknown_model_is_refused_with_the_nearest_name():
    missing = Said({"error": {"message": "model not found"}}, 404)
    with serving(lambda body, number: missing) as endpoint:
        with pytest.raises(ModelError, match=r"to serve the model 'tinny', but got status 404\. Did you mean 'tiny'\?"):
            ask(endpoint, model="tinny")
        with pytest.raises(ModelError, match=r"It serves: tiny, other/model"):
            ask(endpoint, model="zzz")
        endpoint.models = None
        with pytest.raises(ModelError, match=r"ends where /chat/completions begins"):
            ask(endpoint, model="zzz")


def test_the_key_comes_from_a_variable_and_is_never_repeated(monkeypatch):
    monkeypatch.setenv("TEST_ENDPOINT_KEY", "abc-secret-123")
    wrong = Said({"error": {"message": "Incorrect API key: abc-secret-123."}}, 401)
    with serving(lambda body, number: wrong) as endpoint:
        with pytest.raises(ModelError, match="to accept the API key of TEST_ENDPOINT_KEY") as caught:
            ask(endpoint, key_variable="TEST_ENDPOINT_KEY")
        endpoint.models = wrong
        client = EndpointClient(EndpointAddress(endpoint.url, "m"), EndpointSettings(key_variable="TEST_ENDPOINT_KEY"))
        with pytest.raises(ModelError, match="but got status 401"):
            client.check()
        client.close()
        endpoint.answer = lambda body, number: completion("You sent abc-secret-123 to me.")
        assert ask(endpoint, key_variable="TEST_ENDPOINT_KEY").text == "You sent [key] to me."
    assert "secret" not in str(caught.value)
    assert set(endpoint.authorization) == {"Bearer abc-secret-123"}


@pytest.mark.parametrize("spelt", [r"sk-abc\/def+ghi\/jkl=", r"sk-abc/def+ghi/jk\u006c=", "sk-abc/def+ghi/jkl="])
def test_a_key_is_masked_however_the_server_spells_it_in_json(monkeypatch, spelt):
    monkeypatch.setenv("TEST_ENDPOINT_KEY", "sk-abc/def+ghi/jkl=")
    wrong = Said(f'{{"error": {{"message": "No such key: {spelt}."}}}}'.encode(), 401)
    with serving(lambda body, number: wrong) as endpoint:
        with pytest.raises(ModelError, match=r"No such key: \[key\]") as caught:
            ask(endpoint, key_variable="TEST_ENDPOINT_KEY")
        told = json.dumps(completion("You sent THIS to me.")).replace("THIS", spelt)
        endpoint.answer = lambda body, number: Said(told.encode())
        assert ask(endpoint, key_variable="TEST_ENDPOINT_KEY").text == "You sent [key] to me."
    assert "jk" not in str(caught.value)


def test_a_key_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.delenv("TEST_ENDPOINT_KEY", raising=False)
    with pytest.raises(ConfigError, match="variable TEST_ENDPOINT_KEY to hold the API key, but got none"):
        EndpointClient(EndpointAddress("http://x/v1", "m"), EndpointSettings(key_variable="TEST_ENDPOINT_KEY"))


def test_a_key_that_cannot_stand_in_a_header_is_refused_unrepeated(monkeypatch):
    monkeypatch.setenv("TEST_ENDPOINT_KEY", "abc-secret\n123")
    with pytest.raises(ConfigError, match="to hold an API key of visible ASCII characters") as caught:
        EndpointClient(EndpointAddress("http://x/v1", "m"), EndpointSettings(key_variable="TEST_ENDPOINT_KEY"))
    assert "secret" not in str(caught.value)


def test_nothing_there_is_said_at_once():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    client = EndpointClient(EndpointAddress(f"http://127.0.0.1:{port}/v1", "m"), EndpointSettings(**QUICK, retries=1))
    with pytest.raises(ModelError, match=r"but got connection refused\. Start the server"):
        client.check()
    with pytest.raises(UnansweredError, match="connection refused after 2 requests"):
        client.ask(ASKED)
    client.close()
