"""Which of the selected neurons behave alike: k-means on their activation profiles."""

from __future__ import annotations

import warnings

import numpy as np
import torch

from methods.nest.config import NeSTConfig

__all__ = ["cluster_profiles"]

FEW = 3
"""Rows below which there is nothing to cluster."""
RESTARTS = 10


def cluster_profiles(profiles: torch.Tensor, config: NeSTConfig) -> torch.Tensor:
    """Return the cluster of every neuron, int64 ``(neurons,)``, numbered by first appearance.

    Each profile is standardised over the prompts, reduced to its leading principal components and clustered by k-means;
    the number of clusters is that of the best mean silhouette, or one when none is good enough.

    Args:
        profiles: ``(neurons, prompts)``, activations.
        config: how.
    """
    rows = int(profiles.shape[0])
    if config.clustering == "untied":
        return torch.arange(rows)
    most = config.clusters if config.clustering == "fixed" else config.max_clusters
    if rows < FEW or most == 1:
        return torch.zeros(rows, dtype=torch.long)
    points = _points(profiles.double().numpy(), config.components)
    distinct = len(np.unique(points, axis=0))
    if config.clustering == "fixed":
        return _numbered(_k_means(points, min(config.clusters, distinct), config.seed))
    return _numbered(_best_by_silhouette(points, min(most, rows - 1, distinct), config))


def _best_by_silhouette(points: np.ndarray, most: int, config: NeSTConfig) -> np.ndarray:
    from sklearn.metrics import silhouette_score

    best, labels = config.min_silhouette, np.zeros(len(points), dtype=np.int64)
    for k in range(2, most + 1):
        found = _k_means(points, k, config.seed)
        if len(np.unique(found)) < 2:
            continue
        score = float(silhouette_score(points, found))
        if score > best:
            best, labels = score, found
    return labels


def _k_means(points: np.ndarray, k: int, seed: int) -> np.ndarray:
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    # One thread: several add up partial sums in whatever order they end, and a rounding can move a row.
    with threadpool_limits(limits=1), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*distinct clusters.*")  # profiles that coincide
        labels: np.ndarray = KMeans(k, n_init=RESTARTS, random_state=seed).fit(points).labels_
    return labels


def _points(profiles: np.ndarray, components: int | None) -> np.ndarray:
    """Return standardised profiles, or their coordinates along the leading principal components."""
    deviation = profiles.std(axis=1, keepdims=True)
    points = (profiles - profiles.mean(axis=1, keepdims=True)) / np.where(deviation > 0, deviation, 1.0)
    if components is None or min(points.shape) <= components:
        return np.asarray(points)
    left, values, _ = np.linalg.svd(points - points.mean(axis=0), full_matrices=False)
    return np.asarray(left[:, :components] * values[:components])


def _numbered(labels: np.ndarray) -> torch.Tensor:
    order = {label: number for number, label in enumerate(dict.fromkeys(labels.tolist()))}
    return torch.tensor([order[label] for label in labels.tolist()], dtype=torch.long)
