"""A model behind an OpenAI-compatible endpoint: how it is named, and how it is asked.

It is named by the address of its API and its name there: ``http://localhost:8000/v1#model-name``.
"""

# ruff: noqa: RUF009 - `setting` is dataclasses.field with a rule, which ruff does not know.

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

from framework.errors import ConfigError
from framework.fields import COUNT, COUNT_OR_ZERO, NOT_NEGATIVE, POSITIVE, check_instance, setting

__all__ = ["SHORTEST_SECRET", "EndpointAddress", "EndpointSettings", "is_endpoint", "parse_endpoint"]

_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")
_OWN_FIELDS = frozenset(
    ("model", "messages", "stream", "n", "seed", "temperature", "max_tokens", "max_completion_tokens")
)
_SECRETS = re.compile(
    r"api[-_]?key|authori[sz]ation|(?<![a-z])auth(?![a-z])|token$|access_token|secret|password|bearer|headers",
    re.IGNORECASE,
)
_TEXT_TOKENS = re.compile(r"(?:bos|eos|pad|unk|stop|start|end|image)_token", re.IGNORECASE)
"""Names that end like a secret's and say how texts are written."""
SHORTEST_SECRET = 8
"""Characters; shorter keys (``none``, ``EMPTY``) are placeholders and stand in ordinary texts."""


class EndpointAddress(NamedTuple):
    """Where a model is asked."""

    url: str
    """Of the API, without a slash at its end."""
    model: str
    """Its name there."""

    def __str__(self) -> str:
        return f"{self.url}#{self.model}"


@dataclass(frozen=True)
class EndpointSettings:
    """How an endpoint is asked."""

    key_variable: str | None = None
    """Environment variable that holds the API key; null sends none. The key itself is written nowhere."""
    concurrency: int = setting(4, rule=COUNT)
    """Requests under way at once."""
    timeout: float = setting(120.0, rule=POSITIVE)
    """Seconds without a sign of an answer after which a request is given up."""
    retries: int = setting(5, rule=COUNT_OR_ZERO)
    """How often a request is sent again after a time-out, a broken connection, or status 408, 425, 429 or 5xx."""
    retry_wait: float = setting(1.0, rule=NOT_NEGATIVE)
    """Seconds before the first repetition; doubled every time, 60 at most, and what the server asks for at least."""
    max_unanswered: int = setting(0, rule=COUNT_OR_ZERO)
    """Prompts (of an attack: queries) that may stay without a reply. They are counted in `num_unanswered` (of an attack
    in `unanswered_queries`) and are in no rate; one more ends the measurement or the attack."""
    temperature: float | None = setting(0.0, rule=NOT_NEGATIVE)
    """0 asks for greedy replies; null sends none, for servers that accept no choice."""
    send_seed: bool = True
    """Send a seed; false for servers that refuse the field."""
    limit_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """What the server calls the limit of a reply."""
    prefill_style: Literal["none", "assistant_last_message"] = "none"
    """How the server takes the opening of a reply: not at all, or as a last message of the assistant that it goes on
    with. Nothing in the protocol tells; where it is declared wrongly, a server answers the opening instead."""
    extra: dict[str, Any] = setting(factory=dict)
    """More fields of every request, e.g. `continue_final_message: true` or `top_p: 0.9`."""
    reuse: bool = False
    """Take an earlier measurement with the same settings. Not by default: nothing tells whether the server still has
    the same model behind the name."""

    def __post_init__(self) -> None:
        """Raise ConfigError listing every field that has the wrong type or breaks its rule."""
        check_instance(self)

    def problems(self) -> list[str]:
        """Return what is wrong with the settings beyond the type and range of each; nothing secret is repeated."""
        found = []
        if self.key_variable is not None and not _VARIABLE.fullmatch(self.key_variable):
            found.append(  # what was written may be the key
                "Expected `endpoint.key_variable` to be the name of an environment variable (A-Z, 0-9, _), but got "
                f"{len(self.key_variable)} characters that are none. Put the key into a variable and name that."
            )
        found += [
            f"Expected `endpoint.extra` to hold fields with no setting of their own, but got {name!r}. Remove it."
            for name in sorted(_OWN_FIELDS & set(self.extra))
        ]
        key = os.environ.get(self.key_variable or "", "").strip()
        is_real = len(key) >= SHORTEST_SECRET
        found += [
            f"Expected `endpoint.extra` to hold nothing secret, but got the field {name!r}. Put the key into an "
            "environment variable and name that: endpoint.key_variable=NAME."
            for name in sorted({name for name in _names(self.extra) if _is_secret(name)})
            if not (is_real and key in name)
        ]
        if is_real and any(key in text for text in _texts(self.extra)):
            found.append(
                "Expected `endpoint.extra` to hold nothing secret, but got the API key itself. Remove it: the key is "
                "sent as endpoint.key_variable says, and nothing else of it is written."
            )
        return found

    def deciding(self) -> dict[str, Any]:
        """Return the settings that decide a reply."""
        names = ("temperature", "send_seed", "limit_field", "prefill_style", "extra")
        return {name: getattr(self, name) for name in names}


def _is_secret(name: str) -> bool:
    return _SECRETS.search(name) is not None and _TEXT_TOKENS.fullmatch(name) is None


def _names(value: Any) -> Iterator[str]:
    """Yield the names of all fields, at any depth."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield str(name)
            yield from _names(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _names(item)


def _texts(value: Any) -> Iterator[str]:
    """Yield all texts, at any depth, names of fields included."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield str(name)
            yield from _texts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, str):
        yield value


def is_endpoint(name: str) -> bool:
    """Return whether a model's name is the address of an endpoint.

    Example:
        >>> [is_endpoint(name) for name in ("http://localhost:8000/v1#m", "runs/http", "org/name")]
        [True, False, False]
    """
    return name.lower().startswith(("http://", "https://"))


def parse_endpoint(name: str) -> EndpointAddress:
    """Return the parts of ``http://host:port/v1#model-name``.

    Raises:
        ConfigError: a part is missing, or there is more than these; secrets in it are not repeated.

    Example:
        >>> parse_endpoint("http://localhost:8000/v1/#org/name").url
        'http://localhost:8000/v1'
    """
    url, _, model = name.partition("#")
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise ConfigError(f"Expected the endpoint to be an address, but got one that is none ({error}).") from error
    if parts.username or parts.password or parts.query:
        raise ConfigError(
            "Expected the endpoint's address to hold neither a user name nor a query, but got one: both would stand in "
            "the results. Put the key into an environment variable and name that: endpoint.key_variable=NAME."
        )
    if not is_endpoint(name) or not host or not model.strip():
        raise ConfigError(
            f"Expected the endpoint to be written URL#MODEL, but got {name!r}. "
            "For example: http://localhost:8000/v1#model-name."
        )
    return EndpointAddress(url.rstrip("/"), model.strip())
