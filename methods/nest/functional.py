"""NeST's formulas: probes, scores, chosen rows, the added product and the fold; tensors in, tensors out."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats
from torch.nn import functional as F

__all__ = [
    "Probes",
    "Standardised",
    "add_shared_vectors",
    "chosen_rows",
    "fit_probes",
    "fold_rows",
    "mean_difference",
    "probe_accuracy",
    "random_rows",
    "smallest_convincing",
    "standardise",
    "z_scores",
]

NEWTON_STEPS = 50
TOLERANCE = 1e-9
"""Largest change of a logit at which a probe is done."""
HALVINGS = 12


class Probes(NamedTuple):
    """Linear probes of several modules."""

    weights: torch.Tensor
    """float64 ``(modules, neurons)``"""
    bias: torch.Tensor
    """float64 ``(modules,)``"""


class Standardised(NamedTuple):
    """Activations with mean 0 and deviation 1, and what they were made with."""

    values: torch.Tensor
    """``(modules, prompts, neurons)``"""
    mean: torch.Tensor
    """``(modules, 1, neurons)``"""
    deviation: torch.Tensor
    """``(modules, 1, neurons)``, infinite where an activation never changes, so that it is standardised to 0"""


def standardise(features: torch.Tensor, *, noise: float = 1e-12) -> Standardised:
    """Return activations standardised neuron by neuron over the prompts.

    A neuron whose maximum lies on a token of the template is the same for every prompt but for rounding, which depends
    on the batch; without ``noise`` that would be blown up to a feature.

    Args:
        features: ``(modules, prompts, neurons)``.
        noise: deviation, relative to the mean, up to which a neuron counts as constant.

    Example:
        >>> standardise(torch.tensor([[[0.0, 5.0], [2.0, 5.0]]])).values.tolist()
        [[[-1.0, 0.0], [1.0, 0.0]]]
    """
    mean = features.mean(dim=1, keepdim=True)
    deviation = features.std(dim=1, keepdim=True, correction=0)
    is_alive = deviation > noise * mean.abs().clamp_min(1e-12)
    deviation = torch.where(is_alive, deviation, torch.full_like(deviation, torch.inf))
    return Standardised((features - mean) / deviation, mean, deviation)


def fit_probes(features: torch.Tensor, labels: torch.Tensor, *, decay: float) -> Probes:
    """Return the logistic regression of every module, all modules at once.

    Minimises ``mean BCE(w x + b, y) + decay / 2 (||w||^2 + b^2)``, the objective of the reference's Adam with weight
    decay. There are fewer prompts than neurons, so Newton's method runs in the space of prompts: ``w = X^T a`` and each
    step solves a system of the size of the prompts (Rasmussen & Williams, algorithm 3.1).

    Args:
        features: ``(modules, prompts, neurons)``.
        labels: ``(prompts,)``, 1 harmful and 0 ordinary.
        decay: > 0.

    Example:
        >>> probes = fit_probes(torch.tensor([[[1.0], [-1.0]]]), torch.tensor([1, 0]), decay=1.0)
        >>> round(float(probes.weights), 3), abs(float(probes.bias)) < 1e-9
        (0.401, True)
    """
    X, y = features.double(), labels.double()
    scale = 1.0 / (X.shape[1] * decay)
    K = (X @ X.transpose(1, 2) + 1.0) * scale  # the constant stands for the bias
    a = X.new_zeros(X.shape[:2])
    f = torch.zeros_like(a)
    for _ in range(NEWTON_STEPS):
        target = _newton_target(K, f, y)
        a, moved = _damped(K, a, f, y, target)
        f = f + moved
        if float(moved.abs().max()) <= TOLERANCE:
            break
    return Probes(torch.einsum("mpn,mp->mn", X, a) * scale, a.sum(dim=1) * scale)


def _newton_target(K: torch.Tensor, f: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return where a full Newton step leads, as coefficients ``(modules, prompts)``."""
    p = torch.sigmoid(f)
    W = p * (1.0 - p)
    s = W.sqrt()
    B = s[:, :, None] * K * s[:, None, :]
    B.diagonal(dim1=1, dim2=2).add_(1.0)
    b = W * f + (y - p)
    inner = s * torch.einsum("mpq,mq->mp", K, b)
    solved = torch.cholesky_solve(inner[:, :, None], torch.linalg.cholesky(B))[:, :, 0]
    return b - s * solved


def _damped(
    K: torch.Tensor, a: torch.Tensor, f: torch.Tensor, y: torch.Tensor, target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the coefficients after a step that does not raise a module's objective, and the change of the logits."""
    direction = target - a
    change = torch.einsum("mpq,mq->mp", K, direction)
    step = a.new_ones((a.shape[0], 1))
    before = _objective(a, f, y)
    for _ in range(HALVINGS):
        worse = _objective(a + step * direction, f + step * change, y) > before + 1e-12 * before.abs()
        if not bool(worse.any()):
            break
        step = torch.where(worse[:, None], step / 2, step)
    return a + step * direction, step * change


def _objective(a: torch.Tensor, f: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.binary_cross_entropy_with_logits(f, y.expand_as(f), reduction="none").sum(dim=1) + 0.5 * (a * f).sum(dim=1)


def mean_difference(features: torch.Tensor, labels: torch.Tensor) -> Probes:
    """Return mean activations on harmful minus on ordinary prompts, and the bias that cuts half-way between the two.

    Args:
        features: ``(modules, prompts, neurons)``.
        labels: ``(prompts,)``, 1 harmful and 0 ordinary.

    Example:
        >>> mean_difference(torch.tensor([[[3.0], [1.0]]]), torch.tensor([1, 0]))
        Probes(weights=tensor([[2.]], dtype=torch.float64), bias=tensor([-4.], dtype=torch.float64))
    """
    X, harmful = features.double(), labels.bool()
    above, below = X[:, harmful].mean(dim=1), X[:, ~harmful].mean(dim=1)
    weights = above - below
    return Probes(weights, -0.5 * (weights * (above + below)).sum(dim=1))


def probe_accuracy(probes: Probes, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return how many prompts every module's probe gets right, int64 ``(modules,)``.

    Args:
        probes: of the modules.
        features: ``(modules, prompts, neurons)``.
        labels: ``(prompts,)``.
    """
    logits = torch.einsum("mpn,mn->mp", features.double(), probes.weights) + probes.bias[:, None]
    return ((logits > 0) == labels.bool()).sum(dim=1)


def smallest_convincing(number: int, *, share: float, level: float) -> int:
    """Return the fewest right answers of ``number`` that guessing reaches with a probability of at most ``level``.

    Args:
        number: of prompts.
        share: of the larger class, which is what a guess gets right.
        level: in (0, 1).

    Returns:
        ``number + 1`` when even all right would not convince.

    Example:
        >>> smallest_convincing(10, share=0.5, level=0.01)
        10
    """
    tails = stats.binom.sf(np.arange(-1, number + 1), number, share)  # of 0, 1, ... number + 1 right answers or more
    return int((tails <= level).argmax())


def z_scores(weights: torch.Tensor) -> torch.Tensor:
    """Return weights standardised within each module; zero where all are equal.

    Args:
        weights: ``(modules, neurons)``.

    Example:
        >>> z_scores(torch.tensor([[-1.0, 1.0]])).tolist()
        [[-1.0, 1.0]]
    """
    deviation = weights.std(dim=1, keepdim=True, correction=0)
    return torch.where(deviation > 0, (weights - weights.mean(dim=1, keepdim=True)) / deviation, 0.0 * weights)


def chosen_rows(
    z: torch.Tensor,
    weights: torch.Tensor,
    *,
    threshold: float,
    is_two_sided: bool,
    min_rows: int = 0,
    max_rows: int | None = None,
) -> torch.Tensor:
    """Return the neurons of one module above the threshold, best first kept, in ascending order.

    Args:
        z: ``(neurons,)``, standardised weights.
        weights: ``(neurons,)``; one-sided selection takes positive ones only.
        threshold: of z, or of its absolute value.
        is_two_sided: whether neurons that speak against harm count.
        min_rows: filled up with the next best.
        max_rows: the best ones are kept.

    Example:
        >>> chosen_rows(torch.tensor([4.0, -5.0, 2.0]), torch.ones(3), threshold=3, is_two_sided=False).tolist()
        [0]
    """
    size = z.abs() if is_two_sided else torch.where(weights > 0, z, torch.full_like(z, -math.inf))
    order = size.sort(descending=True, stable=True).indices
    count = int((size > threshold).sum())
    count = max(count, min(min_rows, int((size > -math.inf).sum())))
    if max_rows is not None:
        count = min(count, max_rows)
    return order[:count].sort().values


def random_rows(chosen: torch.Tensor, *, size: int, generator: torch.Generator) -> torch.Tensor:
    """Return as many of the rows that were not chosen, at random, in ascending order; of all when too few are left.

    Args:
        chosen: int64, rows of the selection.
        size: rows of the module.
        generator: draws.
    """
    free = torch.ones(size, dtype=torch.bool)
    free[chosen] = int(free.sum()) < 2 * chosen.numel()
    rows = free.nonzero().flatten()
    return rows[torch.randperm(rows.numel(), generator=generator)[: chosen.numel()]].sort().values


def add_shared_vectors(
    output: torch.Tensor, inputs: torch.Tensor, deltas: torch.Tensor, rows: torch.Tensor, membership: torch.Tensor
) -> torch.Tensor:
    """Add the product of shared vectors to the rows of a projection's output, in place, and return it.

    ``h[..., i] += x . delta_c(i)`` for the selected rows i: thin products of ``(tokens, in) x (in, k)`` and
    ``(tokens, k) x (k, rows)``. No matrix of the weight's size is made, and none of the size of the output.

    Args:
        output: ``(..., out)``, of the projection.
        inputs: ``(..., in)``, of the projection.
        deltas: float32 ``(k, in)``.
        rows: int64 ``(rows,)``, each once.
        membership: ``(k, rows)``, 1 where a row belongs to a cluster.

    Example:
        >>> output, x, rows = torch.zeros(1, 3), torch.tensor([[1.0, 2.0]]), torch.tensor([1, 2])
        >>> add_shared_vectors(output, x, torch.tensor([[1.0, 1.0]]), rows, torch.ones(1, 2)).tolist()
        [[0.0, 3.0, 3.0]]
    """
    product = F.linear(inputs, deltas.to(inputs.dtype)) @ membership.to(inputs.dtype)
    return output.index_add_(-1, rows, product.to(output.dtype))


def fold_rows(
    weight: torch.Tensor, rows: torch.Tensor, deltas: torch.Tensor, *, is_transposed: bool = False
) -> torch.Tensor:
    """Return the weight with a vector added to each of the rows; the others keep their bits.

    Args:
        weight: ``(out, in)``, or ``(in, out)`` when transposed.
        rows: int64 ``(rows,)``, neurons.
        deltas: ``(rows, in)``, one vector a row.
        is_transposed: whether neurons are columns.

    Example:
        >>> fold_rows(torch.zeros(2, 2), torch.tensor([1]), torch.tensor([[1.0, 2.0]])).tolist()
        [[0.0, 0.0], [1.0, 2.0]]
    """
    folded = weight.clone()
    if is_transposed:
        folded[:, rows] += deltas.T.to(folded.dtype)
    else:
        folded[rows] += deltas.to(folded.dtype)
    return folded
