"""How likely a composition is to work, by a logistic model with a prior, and how sure one can be of it.

    log-odds of success = b . features,   b ~ N(0, variance of the prior),

fitted by Newton's method to everything tried so far, failures included; around the mode the posterior is taken for
normal with the inverse of the Hessian (Laplace). Drawing b from it and taking the best composition under the draw is
Thompson sampling (Chapelle and Li, 2011): what is little known is tried now and then, what is known to be bad is not.

Features: for each transform whether it is in, and by how much its strength differs from the middle; the order of
groups; the logarithm of the round, since those that are left in later rounds are harder; a constant.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.attacks.texts.distribution import Composition
from experiments.attacks.texts.transforms import ORDERS

__all__ = ["Preference"]

MIDDLE = 0.625
SPREADS = {"constant": 4.0, "round": 1.0, "order": 0.5, "in": 1.0, "strength": 1.0}
"""Standard deviations of the prior."""
NEWTON_STEPS = 12


class Preference:
    """The logistic model over compositions."""

    def __init__(self, names: Sequence[str]) -> None:
        """Know nothing about these transforms."""
        self._places = {name: number for number, name in enumerate(names)}
        count = len(self._places)
        spreads = [SPREADS["constant"], SPREADS["round"], SPREADS["order"]]
        spreads += [SPREADS["in"]] * count + [SPREADS["strength"]] * count
        self._precision = 1 / np.square(spreads)
        self._rows: list[NDArray[Any]] = []
        self._outcomes: list[float] = []
        self._mode = np.zeros(len(spreads))
        self._root = np.diag(np.asarray(spreads))

    def learn(self, tried: Sequence[tuple[Composition, bool]], *, number: int) -> None:
        """Take in a round.

        Args:
            tried: compositions with whether they worked.
            number: of the round, from 1.
        """
        if not tried:
            return
        self._rows.append(self._features([composition for composition, _ in tried], number))
        self._outcomes += [float(is_success) for _, is_success in tried]
        rows, outcomes = np.concatenate(self._rows), np.asarray(self._outcomes)
        for _ in range(NEWTON_STEPS):
            chance = 1 / (1 + np.exp(-np.clip(rows @ self._mode, -30, 30)))
            slope = rows.T @ (outcomes - chance) - self._precision * self._mode
            bend = (rows.T * (chance * (1 - chance))) @ rows + np.diag(self._precision)
            move = np.linalg.solve(bend, slope)
            self._mode = self._mode + move * min(1.0, 3.0 / max(float(np.abs(move).max()), 1e-12))
        # b = mode + R z with R R^T = bend^-1
        self._root = np.linalg.inv(np.linalg.cholesky(bend)).T

    def scores(
        self, compositions: Sequence[Composition], *, number: int, draws: int, chance: np.random.Generator
    ) -> NDArray[Any]:
        """Return log-odds under ``draws`` draws from the posterior, ``(draws, compositions)``.

        Args:
            compositions: to be scored.
            number: of the round they would be tried in.
            draws: how many.
            chance: source of the draws.
        """
        noise = chance.standard_normal((draws, len(self._mode)))
        found: NDArray[Any] = (self._mode + noise @ self._root.T) @ self._features(compositions, number).T
        return found

    def _features(self, compositions: Sequence[Composition], number: int) -> NDArray[Any]:
        count = len(self._places)
        rows = np.zeros((len(compositions), 3 + 2 * count))
        rows[:, 0], rows[:, 1] = 1.0, math.log(number)
        for row, composition in zip(rows, compositions, strict=True):
            row[2] = float(composition.order == next(iter(ORDERS)))
            for name, strength in composition.steps:
                row[3 + self._places[name]] = 1.0
                row[3 + count + self._places[name]] = strength - MIDDLE
        return rows
