"""How much work a suite is, counted in generated tokens, and how long that takes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

from experiments.attacks.interface import ModelAttack, PromptAttack
from experiments.attacks.suite import NamedAttack, SuiteConfig
from framework.files import ArtifactStore, fingerprint, read_json, write_json

__all__ = ["Plan", "Speed", "find_speed", "keep_speed", "measuring_tokens", "plan_attacks"]

STEP_TOKENS = 300
"""An optimizer step of a fine-tuning attack takes about as long as generating so many tokens in a batch."""
UTILITY_TOKENS = 1200
"""The same of making an attacked model, loading it and scoring the benign replies."""
CPU_FLOPS = 3.5e10
"""Floating-point operations a second of generation that are assumed of a CPU as long as nothing was measured."""
GPU_FLOPS = 2e12


class Plan(NamedTuple):
    """What one attack will do at most."""

    label: str
    attack: str
    kind: str
    unit: str
    budget: int
    """Queries a request, or optimizer steps over all models, or models."""
    queries: int
    """Replies at most, over all requests and models."""
    tokens: int
    """The work, in generated tokens."""


class Speed(NamedTuple):
    """Generated tokens a second."""

    value: float
    is_measured: bool
    """By an earlier run with this model on this machine; otherwise it is assumed from the model's size."""


def plan_attacks(suite: SuiteConfig, attacks: Sequence[NamedAttack], num_requests: int) -> list[Plan]:
    """Return what each attack of a suite will do at most.

    Args:
        suite: length of replies, utility.
        attacks: those of the suite.
        num_requests: requests.
    """
    return [_searched(suite, named, num_requests) for named in attacks]


def _plan(suite: SuiteConfig, named: NamedAttack, num_requests: int) -> Plan:
    attack = named.attack
    if isinstance(attack, PromptAttack):
        queries = attack.budget * num_requests
        tokens = queries * suite.max_new_tokens
        return Plan(named.label, attack.name, attack.kind, attack.unit, attack.budget, queries, tokens)
    steps, models = (attack.num_steps, attack.num_models) if isinstance(attack, ModelAttack) else (0, 1)
    tokens = models * measuring_tokens(suite, num_requests) + steps * STEP_TOKENS
    budget = steps if attack.unit == "steps" else models
    return Plan(named.label, attack.name, attack.kind, attack.unit, budget, models * num_requests, tokens)


def _searched(suite: SuiteConfig, named: NamedAttack, num_requests: int) -> Plan:
    """Return the plan of an attack; of a search the trials on a part of the requests, and the result on the rest."""
    if named.search is None:
        return _plan(suite, named, num_requests)
    part = round(named.search.validation_share * num_requests)
    trial, last = _plan(suite, named, part), _plan(suite, named, num_requests - part)
    trials = named.search.trials
    return last._replace(queries=trials * trial.queries + last.queries, tokens=trials * trial.tokens + last.tokens)


def measuring_tokens(suite: SuiteConfig, num_requests: int) -> int:
    """Return the work of measuring one model, in generated tokens."""
    return num_requests * suite.max_new_tokens + UTILITY_TOKENS


def find_speed(artifacts: ArtifactStore, model: str | None, folder: Path | None) -> Speed | None:
    """Return how fast a model generates here; None for an endpoint that was not asked before.

    Args:
        artifacts: the store, which remembers earlier speeds.
        model: fingerprint of the model, or address of the endpoint.
        folder: of the model; None for an endpoint.
    """
    path = _path(artifacts, model)
    if path.is_file():
        return Speed(float(read_json(path)["tokens_per_second"]), True)
    if folder is None:
        return None
    flops = GPU_FLOPS if torch.cuda.is_available() else CPU_FLOPS
    return Speed(flops / (2 * max(1, _count_parameters(folder))), False)


def keep_speed(artifacts: ArtifactStore, model: str | None, *, tokens: int, seconds: float) -> None:
    """Remember how fast a model generated, judges and all.

    Args:
        artifacts: the store.
        model: as for ``find_speed``.
        tokens: granted.
        seconds: it took.
    """
    if tokens > 0 and seconds > 0:
        write_json(_path(artifacts, model), {"tokens_per_second": tokens / seconds})


def _path(artifacts: ArtifactStore, model: str | None) -> Path:
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"
    key: dict[str, Any] = {"model": model, "device": device, "threads": torch.get_num_threads()}
    return artifacts.root / "attack-speed" / f"{fingerprint(key)}.json"


def _count_parameters(folder: Path) -> int:
    count = 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(str(path), framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                count += torch.Size(file.get_slice(name).get_shape()).numel()
    if not count and (folder / "config.json").is_file():
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        count = 12 * int(config.get("num_hidden_layers", 1)) * int(config.get("hidden_size", 1)) ** 2
    return count
