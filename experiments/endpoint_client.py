"""One request to an OpenAI-compatible endpoint: sent, sent again where that may help, and its answer read.

What goes wrong for good (a wrong key, an unknown model, an answer that is no chat completion) is a ``ModelError``; what
goes wrong for one prompt (no answer after all repetitions, a reply that was cut off before it began, a filter) is an
``UnansweredError``: it is never taken for a reply. A model that ends its reply at once has replied: with nothing.
"""

from __future__ import annotations

import difflib
import json
import os
import random
import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import requests

from framework.endpoint_settings import SHORTEST_SECRET, EndpointAddress, EndpointSettings
from framework.errors import ConfigError, ModelError, SeawallError

__all__ = ["Answer", "EndpointClient", "Question", "UnansweredError"]

MASK = "[key]"
"""Stands where a server repeated the API key."""

RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504, 529})
"""Status codes that may pass."""
CONNECT_SECONDS = 10.0
LONGEST_WAIT = 60.0
"""Seconds; a server that asks for more is given up."""


class UnansweredError(SeawallError):
    """A prompt that got no reply."""


class Question(NamedTuple):
    """One conversation, as the endpoint gets it."""

    id: str
    """For messages."""
    messages: Sequence[Mapping[str, Any]]
    """Role and content each; ends with the assistant's where an opening is forced."""
    max_new_tokens: int
    temperature: float | None
    seed: int | None


class Answer(NamedTuple):
    """What the model said."""

    text: str
    """Without what was forced on it."""
    num_tokens: int | None
    """As the server counts them; None where it does not."""
    prompt_tokens: int | None
    finished: bool
    """False if the reply hit the token limit."""


class EndpointClient:
    """Asks one model behind an endpoint; may be used by several threads."""

    def __init__(self, address: EndpointAddress, settings: EndpointSettings) -> None:
        """Read the key; nothing is sent.

        Raises:
            ConfigError: the settings are wrong, or the variable that should hold the key is not set.
        """
        problems = settings.problems()
        self._key = os.environ.get(settings.key_variable, "").strip() if settings.key_variable else ""
        if settings.key_variable and not problems and not self._key:
            problems.append(
                f"Expected the environment variable {settings.key_variable} to hold the API key, but got none. "
                "Set it, or name another one: endpoint.key_variable=NAME."
            )
        if self._key and not re.fullmatch(r"[!-~]+", self._key):
            problems.append(  # what cannot stand in a header would be repeated in the error about it
                f"Expected the environment variable {settings.key_variable} to hold an API key of visible ASCII "
                "characters, but got others among them. Set it again, without quotes and line ends."
            )
        if problems:
            raise ConfigError(problems)
        self.address = address
        self.settings = settings
        self.stop = threading.Event()
        """Set to end the waits between repetitions."""
        self._session = requests.Session()
        self._session.mount("http://", requests.adapters.HTTPAdapter(pool_maxsize=settings.concurrency))
        self._session.mount("https://", requests.adapters.HTTPAdapter(pool_maxsize=settings.concurrency))
        # A key of our own or none: otherwise requests takes one from ~/.netrc.
        self._session.auth = self._authorise

    def close(self) -> None:
        """End what waits, and close the connections."""
        self.stop.set()
        self._session.close()

    def check(self) -> None:
        """Make sure that something answers there, before anything is counted on it; sent once.

        Raises:
            ModelError: nothing answers, or the key is refused.
        """
        try:
            response = self._send("GET", "models")
        except requests.RequestException as error:
            raise ModelError(
                f"Expected an endpoint at `{self.address.url}`, but got {_reason(error, self.settings)}. "
                "Start the server, or check the address."
            ) from error
        if response.status_code in (401, 403):
            raise self._refused(response, "the model list")

    def ask(self, question: Question) -> Answer:
        """Return the model's reply.

        Raises:
            ModelError: asking again would not help.
            UnansweredError: this prompt has no reply.
        """
        response = self._post(question)
        return _read_answer(self._text(response), question, self.address)

    def _post(self, question: Question) -> requests.Response:
        for attempt in range(self.settings.retries + 1):
            wait = min(LONGEST_WAIT, self.settings.retry_wait * 2**attempt) * random.uniform(0.75, 1.25)
            try:
                response = self._send("POST", "chat/completions", json=self._body(question))
            except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
                problem = _reason(error, self.settings)
            else:
                if response.status_code == 200:
                    return response
                if response.status_code not in RETRIED:
                    raise self._refused(response, f"prompt `{question.id}`")
                problem = f"status {response.status_code} ({self._words(response)})"
                asked = _seconds(response.headers.get("Retry-After"))
                if asked > LONGEST_WAIT:
                    problem += f", with the wish to wait {asked:.0f} s"
                    break
                wait = max(wait, asked)
            if attempt < self.settings.retries and self.stop.wait(wait):
                break
        raise UnansweredError(
            f"Expected a reply to prompt `{question.id}`, but got {problem} after {attempt + 1} requests. "
            "Raise endpoint.retries or endpoint.timeout, or lower endpoint.concurrency."
        )

    def _send(self, method: str, path: str, **options: Any) -> requests.Response:
        # No redirects: neither key nor prompts go where nobody sent them.
        return self._session.request(
            method,
            f"{self.address.url}/{path}",
            timeout=(min(CONNECT_SECONDS, self.settings.timeout), self.settings.timeout),
            allow_redirects=False,
            **options,
        )

    def _authorise(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request

    def _body(self, question: Question) -> dict[str, Any]:
        body: dict[str, Any] = {
            **self.settings.extra,
            "model": self.address.model,
            "messages": list(question.messages),
            self.settings.limit_field: question.max_new_tokens,
            "stream": False,
        }
        if question.temperature is not None:
            body["temperature"] = question.temperature
        if question.seed is not None and self.settings.send_seed:
            body["seed"] = question.seed
        return body

    def _text(self, response: requests.Response) -> str:
        """Return the body; a server that repeats the key does not get it into our files."""
        text = response.content.decode("utf-8", errors="replace")
        if len(self._key) < SHORTEST_SECRET:
            return text
        text = text.replace(self._key, MASK)
        try:
            body = json.loads(text)
        except ValueError:
            return text
        # JSON may spell the key with escapes, which the text then hides and whoever decodes it brings back.
        masked = _masked(body, self._key)
        return text if masked == body else json.dumps(masked)

    def _words(self, response: requests.Response) -> str:
        """Return what the server says is wrong, in one short line."""
        text = self._text(response)
        try:
            error = json.loads(text)["error"]
            text = str(error["message"] if isinstance(error, dict) else error)
        except (ValueError, KeyError, TypeError):
            pass
        return " ".join(text.split())[:160] or "no explanation"

    def _refused(self, response: requests.Response, what: str) -> SeawallError:
        status, words = response.status_code, self._words(response)
        got = f"but got status {status}: {words.rstrip('.')}"
        if status in (401, 403):
            variable = self.settings.key_variable
            held = f"the API key of {variable}" if variable else "requests without an API key"
            remedy = (
                f"Check {variable}." if variable else "Name the variable that holds one: endpoint.key_variable=NAME."
            )
            return ModelError(f"Expected `{self.address.url}` to accept {held}, {got}. {remedy}")
        if status == 400 and "content_filter" in self._text(response):
            return UnansweredError(
                f"Expected a reply of the model to {what}, {got}. A filter before the model answered in its place: "
                "count such prompts with endpoint.max_unanswered=N."
            )
        served = self._served()
        if status in (400, 404, 422) and served and self.address.model not in served:
            near = difflib.get_close_matches(self.address.model, served, n=1, cutoff=0.4)
            hint = f"Did you mean {near[0]!r}?" if near else f"It serves: {', '.join(served[:8])}."
            return ModelError(
                f"Expected `{self.address.url}` to serve the model {self.address.model!r}, but got status {status}. "
                + hint
            )
        if status == 404:
            hint = "Check the model's name, and that the address ends where /chat/completions begins, e.g. in /v1."
            return ModelError(f"Expected `{self.address}` to be a model behind an endpoint, {got}. {hint}")
        return ModelError(f"Expected `{self.address.url}` to accept {what}, {got}. {_remedy(words, self.settings)}")

    def _served(self) -> list[str]:
        """Return the names the server lists; none if it has no list."""
        try:
            response = self._send("GET", "models")
            return [str(item["id"]) for item in json.loads(self._text(response))["data"]]
        except (requests.RequestException, ValueError, KeyError, TypeError):
            return []


def _masked(value: Any, secret: str) -> Any:
    """Return decoded JSON with a secret taken out of every string."""
    if isinstance(value, str):
        return value.replace(secret, MASK)
    if isinstance(value, list):
        return [_masked(item, secret) for item in value]
    if isinstance(value, dict):
        return {_masked(name, secret): _masked(item, secret) for name, item in value.items()}
    return value


def _remedy(words: str, settings: EndpointSettings) -> str:
    low = words.lower()
    if "seed" in low:
        return "Leave the seed out: endpoint.send_seed=false."
    if "max_tokens" in low or "max_completion_tokens" in low:
        other = "max_completion_tokens" if settings.limit_field == "max_tokens" else "max_tokens"
        return f"Try endpoint.limit_field={other}, or fewer evaluate.max_new_tokens."
    if "temperature" in low:
        return "Leave the temperature out: endpoint.temperature=null."
    if "context" in low:
        return "The prompt and evaluate.max_new_tokens together must fit the model's context."
    return "Check the settings under `endpoint`."


def _read_answer(text: str, question: Question, address: EndpointAddress) -> Answer:
    malformed = ModelError(
        f"Expected `{address.url}` to answer with a chat completion, but got {text[:40]!r}. "
        "Check the address: an OpenAI-compatible API, without streaming."
    )
    try:
        body = json.loads(text)
        choice = body["choices"][0]
        message, reason = choice["message"], choice["finish_reason"]
        content, refusal = message.get("content"), message.get("refusal")
        usage = body.get("usage") or {}
        tokens = _count(usage.get("completion_tokens")), _count(usage.get("prompt_tokens"))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise malformed from error
    if not isinstance(content, str | None) or not isinstance(refusal, str | None) or not isinstance(reason, str):
        raise malformed
    said = content or refusal or ""
    if reason == "content_filter":
        raise UnansweredError(
            f"Expected a reply of the model to prompt `{question.id}`, but got one that a filter cut off. A filter "
            "is not the model: count such prompts with endpoint.max_unanswered=N."
        )
    if not said.strip() and (reason != "stop" or message.get("tool_calls")):
        raise UnansweredError(
            f"Expected the reply to prompt `{question.id}` to hold text, but got none (finish_reason {reason!r}). "
            + (
                "The model may have spent its tokens on reasoning: raise evaluate.max_new_tokens."
                if reason == "length"
                else "Ask it by hand to see why, or count such prompts with endpoint.max_unanswered=N."
            )
        )
    return Answer(said, *tokens, finished=reason not in ("length", "max_tokens"))


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and value >= 0 else None


def _reason(error: requests.RequestException, settings: EndpointSettings) -> str:
    """Return what happened on the way, without addresses and object names."""
    if isinstance(error, requests.Timeout):
        return f"no answer within {settings.timeout:g} s"
    text = str(error).lower()
    for words, found in (("refused", "connection refused"), ("resolve", "no such host"), ("ssl", "a TLS error")):
        if words in text:
            return found
    return "a broken connection"


def _seconds(header: str | None) -> float:
    """Return what ``Retry-After`` asks for; a date is left to our own waits."""
    try:
        return max(0.0, float(header or 0))
    except ValueError:
        return 0.0
