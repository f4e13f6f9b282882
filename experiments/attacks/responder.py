"""Who answers the queries of a prompt attack: a model on this machine, or whatever else says what it is.

A responder is asked for many replies at once. The reply to a query depends on the query, its number and the seed, and
on nothing else that was asked with it, so that an attack that was interrupted goes on as if it had not been.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from experiments.attacks.interface import Query
from experiments.fingerprints import tokenizer_hashes
from framework.chat import ChatEncoder
from framework.evaluation.generation import Reply, generate_replies
from framework.models import LoadedModel, ModelSpec, choose_device, load_model, resolved_dtype

__all__ = ["LocalResponder", "ReplySettings", "Responder"]

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ReplySettings:
    """How replies are made."""

    max_new_tokens: int
    batch_size: int = 32
    temperature: float = 0.0
    """0 is greedy."""
    seed: int = 0
    max_unanswered: int = 0
    """Queries that may stay without a reply; of a model on this machine none does."""


class Responder(Protocol):
    """Answers queries."""

    @property
    def has_prefill(self) -> bool:
        """Whether an opening of the reply can be forced."""

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer; None where there is none at hand."""

    def identity(self) -> dict[str, Any]:
        """Return everything that decides a reply besides query, number and settings, as plain values."""

    def reply(
        self,
        queries: Sequence[Query],
        settings: ReplySettings,
        *,
        numbers: Sequence[int],
        progress: Progress | None = None,
    ) -> Sequence[Reply | None]:
        """Return one reply per query, in order, its text opening with the query's prefill; None where none came.

        Args:
            queries: at least one.
            settings: length, temperature, seed.
            numbers: of the queries, unique in the attack; they decide the samples.
            progress: called with (done, total) in granted tokens.

        Raises:
            SeawallError: more than ``max_unanswered`` replies did not come; nothing is made up for them.
        """

    def close(self) -> None:
        """Give back memory and connections; the next reply opens them again."""


class LocalResponder:
    """A model in this process, loaded when the first reply is asked for."""

    has_prefill = True

    def __init__(
        self, spec: ModelSpec, fingerprint: str, *, system: str | None = None, accelerator: str = "auto"
    ) -> None:
        """Keep what is needed to load the model.

        Args:
            spec: the model; ``name`` is a folder.
            fingerprint: of its weights.
            system: system message of queries without one of their own; None leaves the template's own.
            accelerator: as Lightning spells it; decides the device that generates.
        """
        self._spec = spec
        self._fingerprint = fingerprint
        self._system = system
        self._accelerator = accelerator
        self._loaded: LoadedModel | None = None

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self.loaded.tokenizer

    @property
    def loaded(self) -> LoadedModel:
        """The model on its device, loaded now if it was not."""
        if self._loaded is None:
            self._loaded = load_model(self._spec)
            self._loaded.model.to(choose_device(self._accelerator))  # type: ignore[arg-type]
        return self._loaded

    def identity(self) -> dict[str, Any]:
        """Return weights, tokenizer, number format and system message."""
        return {
            "model": self._fingerprint,
            "tokenizer": tokenizer_hashes(Path(self._spec.name)),
            "dtype": resolved_dtype(self._spec.dtype),
            "system": self._system,
        }

    def reply(
        self,
        queries: Sequence[Query],
        settings: ReplySettings,
        *,
        numbers: Sequence[int],
        progress: Progress | None = None,
    ) -> list[Reply]:
        """Return one reply per query, in order; queries with the same system message share batches.

        Args:
            queries: at least one.
            settings: length, temperature, seed.
            numbers: of the queries.
            progress: called with (done, total) in granted tokens.

        Raises:
            DataError: a query does not fit the model's context with its reply.
        """
        loaded = self.loaded
        rows: dict[str | None, list[int]] = {}
        for row, query in enumerate(queries):
            rows.setdefault(self._system if query.system is None else query.system, []).append(row)
        total, done = len(queries) * settings.max_new_tokens, 0
        found: list[Reply | None] = [None] * len(queries)
        for system, group in rows.items():
            replies = generate_replies(
                loaded.model,
                ChatEncoder(loaded.tokenizer, system=system, processor=loaded.processor),
                [queries[row].prompt for row in group],
                max_new_tokens=settings.max_new_tokens,
                batch_size=settings.batch_size,
                temperature=settings.temperature,
                seed=settings.seed,
                numbers=[numbers[row] for row in group],
                progress=_shifted(progress, done, total),
            )
            done += len(group) * settings.max_new_tokens
            for row, reply in zip(group, replies, strict=True):
                found[row] = reply
        return [reply for reply in found if reply is not None]

    def close(self) -> None:
        """Give back the model's memory."""
        self._loaded = None
        gc.collect()


def _shifted(progress: Progress | None, before: int, total: int) -> Progress | None:
    if progress is None:
        return None
    return lambda done, _: progress(before + done, total)
