"""Settings of NeST."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

from framework.errors import ConfigError, describe_unknown

__all__ = ["MIN_PROMPTS", "MIN_TRAINED", "NeSTConfig"]

MIN_PROMPTS = 10
"""Fewest prompts of a class that a probe can be held to."""
MIN_TRAINED = 2
"""Fewest prompts of a class that are left to train a probe on."""

Train = Literal["deltas", "deltas+adapter", "all_but_neurons"]
Score = Literal["probe", "mean_difference"]
Normalize = Literal["zscore", "none"]
Sides = Literal["one", "two"]
Projections = Literal["both", "gate", "up"]
Clustering = Literal["silhouette", "fixed", "untied"]
Scope = Literal["module", "layer"]
_CHOICES: dict[str, Any] = {
    "train": Train,
    "score": Score,
    "normalize": Normalize,
    "sides": Sides,
    "projections": Projections,
    "clustering": Clustering,
    "scope": Scope,
}
_COUNTS = {"count": MIN_PROMPTS, "max_rows": 1, "max_clusters": 2, "clusters": 1, "components": 1, "batch_tokens": 1}
_OPTIONAL = {"count", "max_rows", "components"}


@dataclass(frozen=True)
class NeSTConfig:
    """Settings of NeST."""

    train: Train = "deltas"
    """deltas: the shared vectors alone; deltas+adapter: them and what the stage trains; all_but_neurons: what the stage
    trains, the selected rows held where they are."""
    safety: tuple[str, ...] = ("embedded",)
    """Sets of harmful prompts to probe with: ``embedded``, registered names or files; one name or a list."""
    benign: tuple[str, ...] = ("embedded",)
    """Sets of ordinary prompts, spelt the same way."""
    count: int | None = 500
    """Prompts of each class, >= 10; the smaller class decides when there are fewer, null takes all."""
    seed: int = 0
    """Decides which prompts are taken and held out, random rows, and where the clustering starts, >= 0."""
    held_out: float = 0.2
    """Share of the prompts the probes are tested on, in (0, 1); two of each class have to be left to train on."""
    score: Score = "probe"
    """probe: weights of a linear probe; mean_difference: mean activation on harmful minus on ordinary prompts."""
    normalize: Normalize = "zscore"
    """zscore: activations are standardised neuron by neuron before they are scored; none: as they are."""
    probe_decay: float = 1e-3
    """L2 weight of the probe, > 0."""
    threshold: float = 3.0
    """Standard deviations above the mean of its module at which a score selects a neuron, > 0."""
    sides: Sides = "one"
    """one: neurons that speak for harm; two: also those that speak against it."""
    min_rows: int = 2
    """Neurons a module gives at least, the next best filling up, >= 0."""
    max_rows: int | None = None
    """Neurons a module gives at most, the best ones; null for no limit."""
    projections: Projections = "both"
    """Which rows are candidates; an MLP without a gate counts as up."""
    targets: tuple[str, ...] | None = None
    """Last parts of the names of MLP projections with another name than the known ones; they count as up."""
    random_rows: bool = False
    """Take as many rows at random instead of the selected ones (ablation)."""
    clustering: Clustering = "silhouette"
    """silhouette: k-means with the number of clusters of the best mean silhouette; fixed: with ``clusters``; untied:
    every row has a vector of its own."""
    clusters: int = 1
    """Clusters of a group with ``clustering: fixed``, >= 1; fewer where there are fewer rows."""
    max_clusters: int = 8
    """Most clusters that the silhouette chooses from, >= 2."""
    min_silhouette: float = 0.05
    """Mean silhouette below which one cluster is better, in [-1, 1]."""
    components: int | None = 32
    """Principal components of the profiles that are clustered; null takes the profiles."""
    scope: Scope = "module"
    """module: every projection is clustered by itself; layer: gate and up of a layer share clusters and vectors."""
    batch_tokens: int = 2048
    """Tokens of one forward pass of the probing, padding included; bounds its memory."""
    store_originals: bool = False
    """Keep the rows as they were in the patch file, so that a patch can be taken off without the base."""

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: lists every problem.
        """
        for name in ("safety", "benign", "targets"):
            value = getattr(self, name)
            if isinstance(value, str):
                object.__setattr__(self, name, (value,))
            elif isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        problems = [
            *self._choice_problems(),
            *self._count_problems(),
            *self._number_problems(),
            *self._mixed_problems(),
        ]
        if problems:
            raise ConfigError(problems)

    def _choice_problems(self) -> Iterator[str]:
        for name, kind in _CHOICES.items():
            if getattr(self, name) not in get_args(kind):
                yield describe_unknown(name, str(getattr(self, name)), get_args(kind))
        for name in ("random_rows", "store_originals"):
            if not isinstance(getattr(self, name), bool):
                yield f"Expected `{name}` to be true or false, but got {getattr(self, name)!r}."
        for name in ("safety", "benign", "targets"):
            value = getattr(self, name)
            if name == "targets" and value is None:
                continue
            if not isinstance(value, tuple) or not value or not all(isinstance(v, str) and v for v in value):
                yield f"Expected `{name}` to be a name or a list of names, but got {value!r}."

    def _count_problems(self) -> Iterator[str]:
        for name, least in {**_COUNTS, "min_rows": 0, "seed": 0}.items():
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                null = " or null" if name in _OPTIONAL else ""
                yield f"Expected `{name}` to be a whole number >= {least}{null}, but got {value!r}."

    def _number_problems(self) -> Iterator[str]:
        for name in ("threshold", "probe_decay"):
            if not _is_number(value := getattr(self, name)) or not 0 < value < math.inf:
                yield f"Expected `{name}` to be a number > 0, but got {value!r}."
        if not _is_number(self.held_out) or not 0 < self.held_out < 1:
            yield f"Expected `held_out` to be a share between 0 and 1, but got {self.held_out!r}."
        if not _is_number(self.min_silhouette) or not -1 <= self.min_silhouette <= 1:
            yield f"Expected `min_silhouette` to be a number from -1 to 1, but got {self.min_silhouette!r}."

    def _mixed_problems(self) -> Iterator[str]:
        limit = self.max_rows
        if isinstance(limit, int) and isinstance(self.min_rows, int) and limit < self.min_rows:
            yield f"Expected `max_rows` to be at least `min_rows` {self.min_rows}, but got {limit}."
        if self.train in ("deltas+adapter", "all_but_neurons") and self.store_originals is True:
            yield f"Expected `store_originals` to be false with `train: {self.train}`, which makes no patch."
        if self.clustering in ("silhouette", "untied") and isinstance(self.clusters, int) and self.clusters > 1:
            yield (
                f"Expected `clustering` to be fixed where `clusters` is given, but got {self.clustering!r} with "
                f"{self.clusters} clusters. Set `clustering: fixed`; the silhouette goes up to `max_clusters`."
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
