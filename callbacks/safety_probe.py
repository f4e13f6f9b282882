"""What the guard looks at: refusal margin, refusal direction, and divergence from the model that entered the stage.

The refusal direction is the difference of means of the hidden states at the last prompt token, harmful minus harmless,
after one layer. It is taken on every second prompt. Two numbers come of it:

* ``direction_cosine``: cosine of the direction now with the one at the start, on the same prompts; how far it turned.
* ``direction_auroc``: how well the direction *of the start* separates the hidden states *of now* on the other prompts,
  the probability that a harmful prompt lies further along it than a harmless one.

``kl_to_start`` is the mean over harmful prompts of ``KL(p_start || p)`` of the first reply token, over the whole
vocabulary, in nats. ``refusal_margin`` is that of ``framework/evaluation/margin.py``.

Measuring changes nothing: modes, gradients and random states are put back.

Reference: difference-of-means direction, Arditi et al., NeurIPS 2024, arXiv:2406.11717, section 2.3 (read as a
formula, re-derived). The layer is a fixed share of the depth here, not searched for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from callbacks.telemetry import untouched
from framework.chat import ChatEncoder
from framework.errors import DataError
from framework.evaluation.agreement import auroc
from framework.evaluation.decoding import has_position_argument
from framework.evaluation.margin import refusal_margin
from framework.examples import Prompt

__all__ = ["SafetyProbe", "StartState", "direction_cosine", "mean_divergence", "refusal_direction", "separation"]

LEAST = 4
"""Prompts of each kind that a direction and a separation need."""


class StartState(NamedTuple):
    """What is remembered of the model that entered the stage."""

    direction: torch.Tensor
    """float32 ``(hidden,)``, of length 1."""
    log_probs: torch.Tensor
    """float32 ``(prompts, vocab)``: first reply token on the harmful prompts, nats."""


class _Seen(NamedTuple):
    hidden: torch.Tensor
    """float32 ``(prompts, hidden)``, harmful prompts first."""
    log_probs: torch.Tensor


def refusal_direction(harmful: torch.Tensor, benign: torch.Tensor) -> torch.Tensor:
    """Return the unit vector from the mean of ``benign`` to that of ``harmful``; NaN where states are not finite.

    Args:
        harmful: hidden states ``(prompts, hidden)``.
        benign: hidden states ``(prompts, hidden)``.

    Raises:
        DataError: the two means are the same.

    Example:
        >>> refusal_direction(torch.tensor([[3.0, 0.0]]), torch.tensor([[1.0, 0.0]])).tolist()
        [1.0, 0.0]
    """
    difference = harmful.mean(dim=0) - benign.mean(dim=0)
    length = difference.norm()
    if bool(length == 0):  # a model whose states are not finite is for who measures it to judge
        raise DataError(
            "Expected harmful and harmless prompts to differ in their hidden states, but got the same mean. Read the "
            "direction at another `layer`."
        )
    return difference / length


def direction_cosine(direction: torch.Tensor, other: torch.Tensor) -> float:
    """Return the cosine of two unit vectors ``(hidden,)``."""
    return float((direction * other).sum().clamp(-1.0, 1.0))


def separation(direction: torch.Tensor, harmful: torch.Tensor, benign: torch.Tensor) -> float:
    """Return the AUROC with which the projection on ``direction`` tells harmful from harmless; 0.5 is chance.

    Args:
        direction: ``(hidden,)``.
        harmful: ``(prompts, hidden)``.
        benign: ``(prompts, hidden)``.

    Raises:
        DataError: there are none of one kind.
    """
    scores = torch.cat([harmful, benign]) @ direction
    labels = [True] * len(harmful) + [False] * len(benign)
    area = auroc(labels, scores.tolist())
    if area.value is None:
        raise DataError(f"Expected harmful and harmless prompts to separate, but got one kind: {area.reason}.")
    return area.value


def mean_divergence(start: torch.Tensor, now: torch.Tensor) -> float:
    """Return the mean over prompts of ``KL(p_start || p_now)``, nats.

    Args:
        start: log-probabilities ``(prompts, vocab)``.
        now: of the same shape.
    """
    return float((start.exp() * (start - now)).sum(dim=-1).mean())


class SafetyProbe:
    """Measures a model on a fixed set of prompts."""

    def __init__(
        self, encoder: ChatEncoder, harmful: Sequence[Prompt], benign: Sequence[Prompt], *, layer: float = 0.6
    ) -> None:
        """Keep the prompts.

        Args:
            encoder: of the model.
            harmful: at least four, in a fixed order.
            benign: at least four.
            layer: depth of the direction, as a share of the layers.

        Raises:
            DataError: there are too few prompts.
        """
        if min(len(harmful), len(benign)) < LEAST:
            raise DataError(
                f"Expected at least {LEAST} harmful and {LEAST} harmless prompts to measure on, but got {len(harmful)} "
                f"and {len(benign)}. Name more with `prompts`."
            )
        self.encoder = encoder
        self.harmful, self.benign = list(harmful), list(benign)
        self.layer = layer

    def start(self, model: nn.Module) -> StartState:
        """Return what later measurements compare with."""
        with untouched(model):
            seen = self._see(model)
            return StartState(refusal_direction(*self._fitted(seen)), seen.log_probs.clone())

    def measure(self, model: nn.Module, start: StartState) -> dict[str, float]:
        """Return every metric by name.

        Args:
            model: in training; it is left as it was.
            start: of the model that entered the stage.
        """
        with untouched(model):
            seen = self._see(model)
            direction = start.direction.to(seen.hidden.device)
            held = seen.hidden[: len(self.harmful)][1::2], seen.hidden[len(self.harmful) :][1::2]
            wrapped: Any = model
            margin = refusal_margin(wrapped, self.encoder, self.harmful, batch_size=len(self.harmful))
            return {
                "refusal_margin": margin.mean,
                "direction_cosine": direction_cosine(direction, refusal_direction(*self._fitted(seen))),
                "direction_auroc": separation(direction, *held),
                "kl_to_start": mean_divergence(start.log_probs.to(seen.log_probs.device), seen.log_probs),
            }

    def _fitted(self, seen: _Seen) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the hidden states the direction is taken on: every second prompt of each kind."""
        return seen.hidden[: len(self.harmful)][::2], seen.hidden[len(self.harmful) :][::2]

    def _see(self, model: nn.Module) -> _Seen:
        prompts = [self.encoder.encode_prompt(p.messages, prefill=p.prefill) for p in (*self.harmful, *self.benign)]
        width, device = max(map(len, prompts)), next(model.parameters()).device
        ids = torch.zeros((len(prompts), width), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            # On the left, so that the last column is every prompt's last token.
            ids[row, width - len(prompt) :] = torch.tensor(prompt, dtype=torch.long)
            mask[row, width - len(prompt) :] = 1
        wrapped: Any = model
        inputs: dict[str, Any] = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        if has_position_argument(wrapped):
            inputs["position_ids"] = (inputs["attention_mask"].cumsum(dim=-1) - 1).clamp_min(0)
        outputs = wrapped(**inputs, output_hidden_states=True, use_cache=False, logits_to_keep=1)
        states = outputs.hidden_states  # of the embeddings first, then after every layer
        number = max(1, round(self.layer * (len(states) - 1)))
        log_probs = outputs.logits[: len(self.harmful), -1].float().log_softmax(dim=-1)
        return _Seen(states[number][:, -1].float(), log_probs)
