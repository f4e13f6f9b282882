"""Finding the direction along which a model refuses: candidates by difference of means, and the rule that chooses.

Scores are those of Arditi et al.: *bypass*, the mean refusal score on harmful prompts with the direction taken out;
*induce*, that on harmless prompts with the difference of means added before its layer; *KL* of the next-token
distributions on harmless prompts, whole model to model without the direction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from experiments.attacks.residual_stream import (
    adding,
    find_layers,
    find_writers,
    last_logits,
    states_before,
    without_direction,
)
from framework.chat import ChatEncoder
from framework.errors import DataError, WiringError
from framework.examples import Turn

__all__ = [
    "Candidate",
    "Found",
    "PromptIds",
    "choose",
    "find_direction",
    "mean_differences",
    "mean_kl",
    "num_template_tokens",
    "refusal_scores",
    "separation",
]

EPSILON = 1e-8
DEPTH = 0.8
"""Layers from this share of the depth on are not considered: too close to the tokens."""


class PromptIds(NamedTuple):
    """Token ids of prompts for the means and for the choice."""

    harmful: list[list[int]]
    harmless: list[list[int]]
    harmful_validation: list[list[int]]
    harmless_validation: list[list[int]]


class Candidate(NamedTuple):
    """A direction and how it did."""

    layer: int
    position: int
    """Token, counted from the end of the prompt: -1 is the last."""
    bypass: float
    induce: float
    kl: float


class Found(NamedTuple):
    """The direction that was chosen."""

    direction: torch.Tensor
    """float64 ``(hidden,)``, of norm 1."""
    candidate: Candidate
    meets_rule: bool
    num_candidates: int
    refusal_before: float
    """Mean refusal score on the harmful prompts of the choice, of the model as it is."""


def refusal_scores(logits: torch.Tensor, tokens: Sequence[int]) -> torch.Tensor:
    """Return the log-odds of beginning with one of the tokens, float64 ``(prompts,)``.

    Args:
        logits: ``(prompts, vocab)``.
        tokens: first tokens of refusals.

    Example:
        >>> round(float(refusal_scores(torch.tensor([[0.0, 0.0]]), [0])), 6)
        0.0
    """
    shares = torch.softmax(logits.double(), dim=-1)[:, list(tokens)].sum(dim=-1)
    return torch.log(shares + EPSILON) - torch.log(1.0 - shares + EPSILON)


def mean_kl(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return the mean over prompts of ``KL(ours || theirs)`` in nats.

    Args:
        ours: logits ``(prompts, vocab)``.
        theirs: the same shape.
    """
    p, q = torch.log_softmax(ours.double(), dim=-1), torch.log_softmax(theirs.double(), dim=-1)
    return float((p.exp() * (p - q)).sum(dim=-1).mean())


def mean_differences(harmful: torch.Tensor, harmless: torch.Tensor) -> torch.Tensor:
    """Return the difference of the means over prompts, float64.

    Args:
        harmful: ``(prompts, ...)``.
        harmless: ``(prompts, ...)``.
    """
    return harmful.double().mean(dim=0) - harmless.double().mean(dim=0)


def separation(harmful: torch.Tensor, harmless: torch.Tensor) -> torch.Tensor:
    """Return how many pooled standard deviations apart the classes lie along their difference of means.

    Args:
        harmful: ``(prompts, positions, layers, hidden)``.
        harmless: ``(prompts, positions, layers, hidden)``.

    Returns:
        float64 ``(positions, layers)``; 0 where the means agree.
    """
    difference = mean_differences(harmful, harmless)
    gap = difference.norm(dim=-1)
    unit = difference / gap.clamp_min(1e-12)[..., None]
    spread = [torch.einsum("npld,pld->npl", one.double(), unit).var(dim=0) for one in (harmful, harmless)]
    return gap / ((spread[0] + spread[1]) / 2.0).sqrt().clamp_min(1e-12) * (gap > 1e-9)


def num_template_tokens(encoder: ChatEncoder) -> int:
    """Return how many tokens the chat template puts behind the user's text: the post-instruction tokens.

    Raises:
        WiringError: there are none.
    """
    ids = [encoder.encode_prompt((Turn("user", text),)) for text in ("a", "?")]
    count = 0
    while count < min(map(len, ids)) and ids[0][-1 - count] == ids[1][-1 - count]:
        count += 1
    if not count:
        raise WiringError(
            "Expected the chat template to put tokens behind the user's text, but got none: there is no place to "
            "look for the direction. Leave the attack out."
        )
    return count


def choose(candidates: Sequence[Candidate], *, kl_threshold: float) -> tuple[Candidate, bool]:
    """Return the candidate of the lowest bypass score that keeps the rule, and whether one does.

    The rule: KL at most ``kl_threshold``, induced refusal at least 0. When none keeps it, the lowest bypass score of
    all is taken.

    Args:
        candidates: at least one; their layers lie below 0.8 of the depth.
        kl_threshold: nats.

    Example:
        >>> rows = [Candidate(1, -1, -5.0, 1.0, 0.5), Candidate(2, -1, -3.0, 1.0, 0.05)]
        >>> choose(rows, kl_threshold=0.1)
        (Candidate(layer=2, position=-1, bypass=-3.0, induce=1.0, kl=0.05), True)
    """
    keeping = [one for one in candidates if one.kl <= kl_threshold and one.induce >= 0.0]
    return min(keeping or candidates, key=lambda one: one.bypass), bool(keeping)


def find_direction(
    model: nn.Module,
    prompts: PromptIds,
    *,
    tokens: Sequence[int],
    positions: int,
    shortlist: int | None,
    kl_threshold: float,
    pad_id: int,
    batch_size: int = 16,
) -> Found:
    """Return the direction that the rule chooses.

    Args:
        model: plain, in evaluation mode.
        prompts: token ids, none empty.
        tokens: first tokens of refusals.
        positions: how many last tokens are candidates.
        shortlist: candidates that are scored, those of the largest separation; None scores all.
        kl_threshold: nats.
        pad_id: fills short prompts.
        batch_size: prompts of one forward pass.

    Raises:
        DataError: the shortlist is longer than the list, or harmful and harmless prompts are the same to the model.
    """

    def logits(rows: Sequence[Sequence[int]]) -> torch.Tensor:
        return last_logits(model, rows, pad_id=pad_id, batch_size=batch_size)

    states = [
        states_before(model, one, positions=positions, pad_id=pad_id, batch_size=batch_size)
        for one in (prompts.harmful, prompts.harmless)
    ]
    differences = mean_differences(states[0], states[1])
    places = _places(separation(states[0], states[1]), shortlist)
    del states
    before, plain = logits(prompts.harmful_validation), logits(prompts.harmless_validation)
    layers, writers = find_layers(model), find_writers(model)
    candidates = []
    for place, layer in places:
        difference = differences[place, layer]
        with without_direction(writers, difference / difference.norm()):
            bypass = refusal_scores(logits(prompts.harmful_validation), tokens)
            kl = mean_kl(plain, logits(prompts.harmless_validation))
        with adding(layers[layer], difference):
            induce = refusal_scores(logits(prompts.harmless_validation), tokens)
        candidates.append(Candidate(layer, place - positions, float(bypass.mean()), float(induce.mean()), kl))
    best, meets_rule = choose(candidates, kl_threshold=kl_threshold)
    chosen = differences[best.position + positions, best.layer]
    score = float(refusal_scores(before, tokens).mean())
    return Found(chosen / chosen.norm(), best, meets_rule, len(candidates), score)


def _places(apart: torch.Tensor, shortlist: int | None) -> list[tuple[int, int]]:
    """Return (position, layer) of the candidates, the furthest apart first.

    Args:
        apart: ``(positions, layers)``.
        shortlist: how many; None takes all.
    """
    positions, layers = apart.shape
    allowed = max(1, math.ceil(layers * DEPTH))
    listed = [(place, layer) for place in range(positions) for layer in range(min(allowed, layers))]
    if shortlist is not None and shortlist > len(listed):
        raise DataError(
            f"Expected `shortlist` to be at most {len(listed)} ({positions} positions x {allowed} of {layers} layers), "
            f"but got {shortlist}. Lower it, or write null for all."
        )
    different = sorted((one for one in listed if float(apart[one]) > 0.0), key=lambda one: -float(apart[one]))
    if not different:
        raise DataError(
            "Expected harmful and harmless prompts to differ at the tokens behind them, but their mean states agree. "
            "Name other sets in `harmful` and `harmless`."
        )
    return different[:shortlist]
