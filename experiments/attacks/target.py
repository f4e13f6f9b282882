"""The model under attack: found, fingerprinted, and whether an attack can be made on it at all."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.attacks.interface import ModelAttack, ModelTarget, PromptAttack, Query
from experiments.attacks.responder import LocalResponder, Progress, ReplySettings, Responder
from experiments.attacks.suite import NamedAttack, SuiteConfig
from experiments.run_folder import portable_path
from framework.endpoint_settings import EndpointAddress, EndpointSettings, is_endpoint, parse_endpoint
from framework.errors import ConfigError, ModelError
from framework.evaluation.generation import Reply
from framework.files import fingerprint, to_plain
from framework.models import ModelSpec, find_model, model_fingerprint

__all__ = ["RemoteResponder", "Target", "find_target", "target_problems"]


@dataclass(frozen=True)
class Target:
    """The model under attack."""

    name: str
    """As it was given."""
    label: str
    """Short, fit for a folder."""
    model: ModelTarget | None
    """None for an endpoint."""
    responder: Responder
    spec: ModelSpec | None = None
    """How the model is loaded; None for an endpoint."""
    keeps: bool = True
    """Whether finished attacks may be found again; an endpoint may change its model at any time."""

    def facts(self) -> dict[str, Any]:
        """Return what results say of it, as plain values."""
        found = {"name": self.name, "label": self.label, "endpoint": self.model is None}
        if self.model is not None:
            found |= {"name": portable_path(self.model.folder), "fingerprint": self.model.fingerprint}
        return {**found, **to_plain(self.responder.identity())}


def find_target(name: str, suite: SuiteConfig) -> Target:
    """Return the model under attack.

    Args:
        name: a folder, a GGUF file, a hub id, a known name, or ``http://host:port/v1#model``.
        suite: says how it is run and what the attacker has besides.

    Raises:
        ConfigError: settings of the endpoint are wrong.
        ModelError: a model is not there.
    """
    if is_endpoint(name):
        address = parse_endpoint(name)
        if problems := suite.endpoint.problems():
            raise ConfigError(problems)
        responder = RemoteResponder(address, suite.endpoint, system=suite.target.system)
        # Two hosts may serve models of one name.
        label = f"{_slug(address.model)}-{fingerprint(str(address))[:8]}"
        return Target(name, label, None, responder, keeps=suite.endpoint.reuse)
    given = suite.target
    folder = find_model(ModelSpec(name, given.dtype, None, given.trust_remote_code)).folder
    weights = model_fingerprint(folder)
    spec = ModelSpec(str(folder), given.dtype, None, given.trust_remote_code)
    model = ModelTarget(
        folder,
        weights,
        base=_find("target.base", given.base),
        adapter=None if given.adapter is None else Path(given.adapter).expanduser(),
        before_adapter=_find("target.before_adapter", given.before_adapter),
        system=given.system,
        accelerator=given.accelerator,
        dtype=given.dtype,
        seed=suite.seed,
    )
    path = Path(name)
    label = path.parent.name if path.name == "model" and path.parent.name else path.name
    own = LocalResponder(spec, weights, system=given.system, accelerator=given.accelerator)
    return Target(name, f"{_slug(label)}-{weights[:8]}", model, own, spec)


def target_problems(target: Target, attacks: Sequence[NamedAttack]) -> list[str]:
    """Return what keeps attacks from being made on the target, one sentence each; empty when nothing does."""
    problems = []
    for label, attack in ((named.label, named.attack) for named in attacks):
        if isinstance(attack, ModelAttack):
            if target.model is None:
                problems.append(
                    f"Expected `attacks.{label}` to need no weights on an endpoint, but got `{attack.name}`, which "
                    f"needs them. Name a model on this machine, or leave it out: attacks.{label}=null."
                )
            elif lacking := attack.missing(target.model):
                problems.append(f"attacks.{label}: {lacking}")
        elif isinstance(attack, PromptAttack) and attack.needs_prefill and not target.responder.has_prefill:
            problems.append(
                f"Expected `endpoint.prefill_style` to say how the endpoint takes the opening of a reply, which "
                f"`attacks.{label}` forces, but got 'none'. Declare it, or leave the attack out: attacks.{label}=null."
            )
    return problems


class RemoteResponder:
    """A model behind an endpoint; it is called upon when the first reply is asked for."""

    tokenizer = None

    def __init__(self, address: EndpointAddress, settings: EndpointSettings, *, system: str | None = None) -> None:
        """Keep where and how it is asked.

        Args:
            address: of the model.
            settings: how it is asked.
            system: system message of queries without one of their own.
        """
        self._address = address
        self._settings = settings
        self._system = system
        self._open: Any = None

    @property
    def has_prefill(self) -> bool:
        """Whether an opening of the reply can be forced."""
        return self._settings.prefill_style != "none"

    def identity(self) -> dict[str, Any]:
        """Return address, settings and system message; nobody can tell the weights."""
        return {"url": str(self._address), "settings": self._settings.deciding(), "system": self._system}

    def reply(
        self,
        queries: Sequence[Query],
        settings: ReplySettings,
        *,
        numbers: Sequence[int],
        progress: Progress | None = None,
    ) -> Sequence[Reply | None]:
        """Return one reply per query, in order; None where none came.

        Args:
            queries: at least one.
            settings: length, temperature, seed, and how many replies may be missing.
            numbers: not used; the id of a query decides its sample.
            progress: called with (done, total) in queries.

        Raises:
            SeawallError: too many queries stayed without a reply, or the endpoint refuses.
        """
        if self._open is None:
            from experiments.endpoint import EndpointResponder

            self._open = EndpointResponder(self._address, self._settings, system=self._system)
        found: list[Reply | None] = self._open.replies(
            queries,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            seed=settings.seed,
            max_unanswered=settings.max_unanswered,
            progress=progress,
        )
        return found

    def close(self) -> None:
        """Close the connections."""
        if self._open is not None:
            self._open.close()
            self._open = None


def _find(key: str, name: str | None) -> Path | None:
    if name is None:
        return None
    try:
        return find_model(ModelSpec(name)).folder
    except ModelError as error:
        raise ModelError(f"{key}: {error}") from error


def _slug(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text).strip("-.") or "model"
