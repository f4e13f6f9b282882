"""The penalty of AsFT and its gradients in closed form, for low-rank and dense updates.

The penalty is ``<dW, P dW>`` with ``P = (I - C)^2`` for what leaves the direction and ``P = C^2`` for what goes along
it. Value and gradients come from the same few thin products, nothing of the size ``(out, out)`` is ever formed, and V
is read in blocks of rows, so that one kept in 16 bits is never widened as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch

from framework.weight_space import Factors
from methods.asft.config import Projector

__all__ = [
    "Direction",
    "PenaltyParts",
    "apply_projector",
    "asft_penalty",
    "attach_gradients",
    "dense_parts",
    "direction_bytes",
    "direction_from_factors",
    "direction_from_matrix",
    "isotropic_penalty",
    "low_rank_parts",
]

COLUMNS = 1024
"""Columns of a dense update handled at a time."""
CACHED_ROWS = 128
"""Rows widened at a time on a CPU."""
SMALL = 1024**2
"""Numbers of V up to which it is widened as a whole, once a step instead of once a product: 4 MiB for a moment."""


class Direction(NamedTuple):
    """What is kept of V for one module; ``V = left @ right``, or ``left`` alone."""

    projector: Projector
    left: torch.Tensor
    """``(out, k)``; ``C = left left^T / divisor``, but for flat."""
    right: torch.Tensor | None = None
    """``(k, in)``, only for flat."""
    divisor: float = 1.0
    """``||V||_F`` for frobenius and flat."""

    @property
    def is_projection(self) -> bool:
        """Whether applying it twice is applying it once."""
        return self.projector != "frobenius"

    @property
    def numel(self) -> int:
        """Numbers kept."""
        return self.left.numel() + (0 if self.right is None else self.right.numel())

    @property
    def nbytes(self) -> int:
        """Bytes kept."""
        return sum(t.numel() * t.element_size() for t in (self.left, self.right) if t is not None)

    def to(self, device: torch.device) -> Direction:
        """Return it on a device."""
        right = None if self.right is None else self.right.to(device)
        return self._replace(left=self.left.to(device), right=right)


class PenaltyParts(NamedTuple):
    """The penalty of one module, its gradients, and the energies that telemetry shows; all without a graph."""

    value: torch.Tensor
    along: torch.Tensor
    """``||C dW||_F^2``"""
    off: torch.Tensor
    """``||dW - C dW||_F^2``"""
    isotropic: torch.Tensor
    """``||dW||_F^2``"""
    gradients: tuple[torch.Tensor, ...]
    """By A and B, or by the weight."""


# ---- directions --------------------------------------------------------------------------------------------------


def direction_from_matrix(V: torch.Tensor, projector: Projector) -> Direction:
    """Return the direction of a matrix that needs no decomposition: frobenius or flat.

    Args:
        V: ``(out, in)``, not all zero.
        projector: one of the two.
    """
    return Direction(projector, V, None, float(torch.linalg.matrix_norm(V.double() if V.numel() < COLUMNS**2 else V)))


def direction_from_factors(factors: Factors, projector: Projector) -> Direction:
    """Return the direction of a decomposed matrix; for top_k, cut the factors first.

    Args:
        factors: of V, at least one.
        projector: any but none.
    """
    if projector in ("column_space", "top_k"):
        return Direction(projector, factors.left.contiguous())
    scaled = factors.left * factors.values
    norm = float(torch.linalg.vector_norm(factors.values))
    return Direction(projector, scaled, factors.right.contiguous() if projector == "flat" else None, norm)


def direction_bytes(projector: Projector, *, rows: int, columns: int, rank: int = 0, itemsize: int = 2) -> int:
    """Return the bytes that the direction of one module keeps.

    Args:
        projector: any.
        rows: out.
        columns: in.
        rank: singular vectors kept by top_k or column_space; 0 for a V that is not low-rank.
        itemsize: bytes of a number of V as the model files hold it.

    Example:
        >>> direction_bytes("top_k", rows=4096, columns=4096, rank=64) // 2**20
        1
    """
    if projector == "none":
        return 0
    whole = rows * columns * itemsize
    if not rank:
        return whole
    return min(4 * rank * (rows + (columns if projector == "flat" else 0)), whole)


def apply_projector(direction: Direction, X: torch.Tensor) -> torch.Tensor:
    """Return ``C X``.

    Args:
        direction: any but flat.
        X: ``(out, n)``.
    """
    return _product(direction.left, _transposed_product(direction.left, X)) / direction.divisor


# ---- penalties ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def low_rank_parts(
    A: torch.Tensor, B: torch.Tensor, direction: Direction | None, *, scale: float = 1.0, is_along: bool = False
) -> PenaltyParts:
    """Return the penalty of ``dW = scale B A`` and its gradients by A and B.

    Args:
        A: ``(rank, in)``.
        B: ``(out, rank)``.
        direction: None for no projector.
        scale: factor of the update.
        is_along: penalise what goes along the direction instead of what leaves it.
    """
    square, gram = scale**2, A @ A.T
    isotropic = square * ((B.T @ B) * gram).sum()
    if direction is None:
        gradients = (2 * square * (B.T @ B) @ A, 2 * square * B @ gram)
        return PenaltyParts(isotropic, torch.zeros_like(isotropic), isotropic, isotropic, gradients)
    if direction.projector == "flat":
        return _low_rank_flat(A, B, direction, scale=scale, is_along=is_along, isotropic=isotropic)
    if direction.left.numel() <= SMALL:
        direction = direction._replace(left=direction.left.to(B.dtype))
    inside = apply_projector(direction, B)
    outside = B - inside
    kept = inside if is_along else outside
    twice = kept
    if not direction.is_projection:
        again = apply_projector(direction, kept)
        twice = again if is_along else kept - again
    energies = [square * ((part.T @ part) * gram).sum() for part in (inside, outside)]
    gradients = (2 * square * (kept.T @ kept) @ A, 2 * square * twice @ gram)
    return PenaltyParts(energies[0] if is_along else energies[1], energies[0], energies[1], isotropic, gradients)


@torch.no_grad()
def dense_parts(update: torch.Tensor, direction: Direction | None, *, is_along: bool = False) -> PenaltyParts:
    """Return the penalty of a whole update and its gradient by it, a block of columns at a time.

    Args:
        update: ``(out, in)``.
        direction: None for no projector.
        is_along: penalise what goes along the direction instead of what leaves it.
    """
    isotropic = update.square().sum()
    if direction is None:
        return PenaltyParts(isotropic, torch.zeros_like(isotropic), isotropic, isotropic, (2 * update,))
    if direction.projector == "flat":
        share = (update * _unit(direction, update)).sum()
        slope = 2 * share * _unit(direction, update)
        along, off = share.square(), (isotropic - share.square()).clamp_min(0)
        return PenaltyParts(
            along if is_along else off, along, off, isotropic, (slope if is_along else 2 * update - slope,)
        )
    gradient = torch.empty_like(update)
    along, off = torch.zeros_like(isotropic), torch.zeros_like(isotropic)
    for start in range(0, update.shape[1], COLUMNS):
        block = update[:, start : start + COLUMNS]
        inside = apply_projector(direction, block)
        kept = inside if is_along else block - inside
        along, off = along + inside.square().sum(), off + (block - inside).square().sum()
        if not direction.is_projection:
            again = apply_projector(direction, kept)
            kept = again if is_along else kept - again
        gradient[:, start : start + COLUMNS] = 2 * kept
    return PenaltyParts(along if is_along else off, along, off, isotropic, (gradient,))


def attach_gradients(
    value: torch.Tensor, tensors: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Return ``value`` as a scalar whose gradient by each of ``tensors`` is the given one.

    Args:
        value: scalar without a graph.
        tensors: what it depends on.
        gradients: one for each, of the same shapes.
    """
    return cast(torch.Tensor, _Attached.apply(value, tuple(gradients), *tensors))


def asft_penalty(
    A: torch.Tensor,
    B: torch.Tensor,
    direction: Direction | torch.Tensor | None,
    *,
    scale: float = 1.0,
    is_along: bool = False,
) -> torch.Tensor:
    """Return the penalty of one LoRA pair as a scalar that can be differentiated once.

    Args:
        A: ``(rank, in)``.
        B: ``(out, rank)``.
        direction: of the module; a matrix ``(out, in)``, not all zero, stands for the reference code's projector
            ``V V^T / ||V||_F``; None for no projector.
        scale: factor of the update.
        is_along: penalise what goes along the direction instead of what leaves it.

    Returns:
        Scalar, in the dtype of the inputs.

    Ref: arXiv:2506.08473 section 3; code PKU-YuanGroup/AsFT@07b606e (read only, re-derived).

    Example:
        >>> V = torch.eye(2)  # C = I / sqrt(2)
        >>> round(float(asft_penalty(torch.eye(2), torch.eye(2), V)), 4)  # 2 * (1 - 1/sqrt(2))^2
        0.1716
    """
    if isinstance(direction, torch.Tensor):
        direction = direction_from_matrix(direction, "frobenius")
    parts = low_rank_parts(A, B, direction, scale=scale, is_along=is_along)
    return attach_gradients(parts.value, (A, B), parts.gradients)


def isotropic_penalty(A: torch.Tensor, B: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
    """Return ``|| scale B A ||_F^2``: what the penalty would be without any projector.

    Args:
        A: ``(rank, in)``.
        B: ``(out, rank)``.
        scale: factor of the update.
    """
    return scale**2 * ((B.T @ B) * (A @ A.T)).sum()


# ---- private -----------------------------------------------------------------------------------------------------


class _Attached(torch.autograd.Function):
    """A scalar with gradients that were computed beside it."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, gradients: tuple[torch.Tensor, ...], *_: torch.Tensor) -> torch.Tensor:
        """Keep the gradients."""
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Hand them on."""
        return (None, None, *(grad_outputs[0] * gradient for gradient in ctx.gradients))


def _low_rank_flat(
    A: torch.Tensor, B: torch.Tensor, direction: Direction, *, scale: float, is_along: bool, isotropic: torch.Tensor
) -> PenaltyParts:
    """The unit vector along V takes ``c = <V, dW> / ||V||``; the penalty is ``||dW||^2 - c^2``, or ``c^2``."""
    by_A = _transposed_product(direction.left, B)
    by_A = (by_A if direction.right is None else direction.right.to(A.dtype).T @ by_A).T / direction.divisor
    share = scale * (A * by_A).sum()
    by_B = A.T if direction.right is None else direction.right.to(A.dtype) @ A.T
    by_B = _product(direction.left, by_B) / direction.divisor
    slopes = (2 * scale * share * by_A, 2 * scale * share * by_B)
    along = share.square()
    # A share of 1 up to rounding would leave a tiny negative number.
    off = (isotropic - along).clamp_min(0)
    if is_along:
        return PenaltyParts(along, along, off, isotropic, slopes)
    whole = (2 * scale**2 * (B.T @ B) @ A, 2 * scale**2 * B @ (A @ A.T))
    return PenaltyParts(off, along, off, isotropic, (whole[0] - slopes[0], whole[1] - slopes[1]))


def _transposed_product(left: torch.Tensor, X: torch.Tensor) -> torch.Tensor:
    """Return ``left^T X`` in the dtype of X."""
    if left.dtype == X.dtype:
        return left.T @ X
    found, rows = X.new_zeros(left.shape[1], X.shape[1]), _rows(X)
    for start in range(0, left.shape[0], rows):
        found += left[start : start + rows].to(X.dtype).T @ X[start : start + rows]
    return found


def _product(left: torch.Tensor, X: torch.Tensor) -> torch.Tensor:
    """Return ``left X`` in the dtype of X."""
    if left.dtype == X.dtype:
        return left @ X
    rows = _rows(X)
    return torch.cat([left[start : start + rows].to(X.dtype) @ X for start in range(0, left.shape[0], rows)])


def _rows(X: torch.Tensor) -> int:
    """Return how many rows are widened at a time: on a CPU few enough to stay in its cache."""
    return CACHED_ROWS if X.device.type == "cpu" else COLUMNS


def _unit(direction: Direction, like: torch.Tensor) -> torch.Tensor:
    left = direction.left.to(like.dtype)
    V = left if direction.right is None else left @ direction.right.to(like.dtype)
    return V / direction.divisor
