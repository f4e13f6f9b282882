"""Endpoints by name, and what their settings refuse."""

from __future__ import annotations

import pytest

from framework.config import load_evaluate_config
from framework.endpoint_settings import EndpointAddress, EndpointSettings, is_endpoint, parse_endpoint
from framework.errors import ConfigError, ModelError
from framework.models import ModelSpec, find_model


def test_an_address_holds_the_model_behind_its_sign():
    assert parse_endpoint("https://host:8000/v1/#org/model") == EndpointAddress("https://host:8000/v1", "org/model")
    assert str(parse_endpoint("http://h/v1#m")) == "http://h/v1#m"
    assert not is_endpoint("smollm2-135m-instruct")


@pytest.mark.parametrize("name", ["http://host/v1", "http://host/v1#", "http://#m", "http://host/v1# "])
def test_an_address_without_a_part_is_refused(name):
    with pytest.raises(ConfigError, match="to be written URL#MODEL"):
        parse_endpoint(name)


@pytest.mark.parametrize("name", ["http://me:pass1234@host/v1#m", "http://host/v1?api_key=pass1234#m"])
def test_secrets_in_an_address_are_refused_unrepeated(name):
    with pytest.raises(ConfigError, match="neither a user name nor a query") as caught:
        parse_endpoint(name)
    assert "pass1234" not in str(caught.value)


def test_a_port_that_is_none_is_refused():
    with pytest.raises(ConfigError, match="to be an address, but got one that is none"):
        parse_endpoint("http://host:many/v1#m")


def test_all_problems_of_the_settings_are_told_and_no_key():
    settings = EndpointSettings(key_variable="sk-abc123", extra={"stream": True, "api_key": "sk-abc123", "top_p": 1})
    problems = settings.problems()
    assert len(problems) == 3
    assert "9 characters that are none" in problems[0]
    assert "'stream'" in problems[1]
    assert "nothing secret" in problems[2]
    assert "sk-abc123" not in " ".join(problems)


@pytest.mark.parametrize(
    "extra",
    [
        {"api-key": 1},
        {"apiKey": 1},
        {"headers": {"a": 1}},
        {"options": [{"x-auth": "abc"}]},
        {"options": {"hf_token": "abc"}},
        {"Authorization": "abc"},
        {"options": {"deep": {"password": "abc"}}},
    ],
)
def test_secret_names_are_refused_at_any_depth(extra):
    problems = EndpointSettings(extra=extra).problems()
    assert len(problems) == 1
    assert "Expected `endpoint.extra` to hold nothing secret, but got the field" in problems[0]
    assert "abc" not in problems[0]


def test_names_of_ordinary_fields_pass():
    extra = {
        "min_tokens": 1,
        "stop_token_ids": [1],
        "skip_special_tokens": True,
        "return_tokens_as_token_ids": True,
        "chat_template_kwargs": {"eos_token": "</s>", "author": "me", "max_tokens": 3},
        "continue_final_message": True,
        "tool_choice": "none",
    }
    assert EndpointSettings(extra=extra).problems() == []


@pytest.mark.parametrize("extra", [{"user": "abc-secret-123"}, {"options": [{"abc-secret-123": 1}, "x"]}])
def test_the_key_itself_is_refused_unrepeated(extra, monkeypatch):
    monkeypatch.setenv("TEST_ENDPOINT_KEY", "abc-secret-123")
    problems = EndpointSettings(key_variable="TEST_ENDPOINT_KEY", extra=extra).problems()
    assert any("but got the API key itself" in problem for problem in problems)
    assert "abc-secret-123" not in " ".join(problems)
    monkeypatch.setenv("TEST_ENDPOINT_KEY", "none")
    placeholder = EndpointSettings(key_variable="TEST_ENDPOINT_KEY", extra={"tool_choice": "none"})
    assert placeholder.problems() == []


@pytest.mark.parametrize("values", [{"concurrency": 0}, {"timeout": 0.0}, {"retries": -1}, {"temperature": -0.1}])
def test_a_setting_out_of_range_is_refused(values):
    with pytest.raises(ConfigError, match=next(iter(values))):
        EndpointSettings(**values)


def test_settings_of_an_endpoint_are_refused_for_a_model_with_weights():
    with pytest.raises(ConfigError, match="`endpoint` to be unset for a model with weights"):
        load_evaluate_config("some/model", ["endpoint.concurrency=2"])


def test_an_endpoint_has_no_weights():
    with pytest.raises(ModelError, match="to be a model with weights, but got the endpoint"):
        find_model(ModelSpec("http://localhost:8000/v1#m"))
