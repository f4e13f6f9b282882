"""From a model and prompts to selected, clustered neurons; kept as one readable file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from framework.errors import WiringError
from framework.files import read_json, write_json
from methods.nest.clusters import cluster_profiles
from methods.nest.config import NeSTConfig
from methods.nest.functional import chosen_rows, random_rows
from methods.nest.probe import PromptSet, SiteScores, pooled_activations, score_sites
from methods.nest.sites import Kind, Site, find_projections, find_sites

__all__ = ["Group", "Neurons", "Selection", "find_neurons", "load_selection", "save_selection"]


@dataclass(frozen=True)
class Neurons:
    """The selected neurons of one site."""

    site: Site
    rows: tuple[int, ...]
    """Rows of the projection's weight, ascending; empty when the site gives none."""
    clusters: tuple[int, ...]
    """Cluster of each row within the group."""
    group: str
    """Neurons of one group share vectors."""
    z: tuple[float, ...]
    """Standardised score of each row."""
    accuracy: float
    """Share of held-out prompts the site's probe gets right."""
    is_convincing: bool
    """Whether that is better than chance; otherwise nothing is selected."""


@dataclass(frozen=True)
class Group:
    """Neurons that share vectors."""

    key: str
    num_clusters: int
    width: int
    """Length of a vector."""


@dataclass(frozen=True)
class Selection:
    """All selected neurons of a model."""

    neurons: tuple[Neurons, ...]
    """One entry a site, in the order of the model."""
    groups: tuple[Group, ...]
    prompts: int
    """Prompts probed with, both classes."""
    held_out: int
    """Those of them the probes were tested on."""

    @property
    def num_rows(self) -> int:
        """Selected rows."""
        return sum(len(one.rows) for one in self.neurons)

    @property
    def num_parameters(self) -> int:
        """Numbers of all shared vectors."""
        return sum(group.num_clusters * group.width for group in self.groups)

    @property
    def accuracy_by_layer(self) -> dict[int, float]:
        """Mean held-out accuracy of the probes of each layer."""
        layers: dict[int, list[float]] = {}
        for one in self.neurons:
            layers.setdefault(one.site.layer, []).append(one.accuracy)
        return {layer: sum(values) / len(values) for layer, values in sorted(layers.items())}


def find_neurons(model: nn.Module, prompts: PromptSet, config: NeSTConfig, *, pad_id: int) -> Selection:
    """Probe a model, select neurons and cluster them.

    Args:
        model: plain or with adapters.
        prompts: of both classes.
        config: how.
        pad_id: for batches.

    Raises:
        WiringError: no MLP, packed weights, probes no better than chance, or nothing above the threshold.
        DataError: too few prompts are held out.
    """
    projections = find_projections(model, config.targets or ())
    kinds: tuple[Kind, ...] = ("gate", "up") if config.projections == "both" else (config.projections,)
    sites = find_sites(projections, kinds=kinds)
    wanted = {site.module for site in sites}
    projections = {name: one for name, one in projections.items() if name in wanted}
    features = pooled_activations(model, projections, prompts.ids, pad_id=pad_id, batch_tokens=config.batch_tokens)
    scores = score_sites(features, sites, prompts, config)
    rows = {site.key: _rows(site, scores[site.key], number, config) for number, site in enumerate(sites)}
    if not any(one.numel() for one in rows.values()):
        raise WiringError(
            f"Expected some neuron to score above {config.threshold:g} standard deviations, but none does. Lower "
            "`threshold`, or set `min_rows` above 0."
        )
    grouped: dict[str, list[Site]] = {}
    for site in sites:
        if rows[site.key].numel():
            grouped.setdefault(_group_of(site, config), []).append(site)
    clusters: dict[str, torch.Tensor] = {}
    groups = []
    for key, members in grouped.items():
        found = _cluster(members, rows, features, config)
        clusters.update(found)
        number = max(int(labels.max()) for labels in found.values()) + 1
        groups.append(Group(key, number, projections[members[0].module].width))
    neurons = tuple(_neurons(site, scores[site.key], rows[site.key], clusters, config) for site in sites)
    return Selection(neurons, tuple(groups), len(prompts.ids), int(prompts.is_held_out.sum()))


def save_selection(selection: Selection, path: Path) -> None:
    """Write a selection as JSON."""
    write_json(path, asdict(selection))


def load_selection(path: Path) -> Selection:
    """Return what ``save_selection`` wrote."""
    return selection_from(read_json(path))


def selection_from(content: Mapping[str, Any]) -> Selection:
    """Return a selection from plain values."""
    neurons = tuple(
        Neurons(**{**one, "site": Site(**one["site"]), **{k: tuple(one[k]) for k in ("rows", "clusters", "z")}})
        for one in content["neurons"]
    )
    groups = tuple(Group(**one) for one in content["groups"])
    return Selection(neurons, groups, content["prompts"], content["held_out"])


# ---- private -----------------------------------------------------------------------------------------------------


def _rows(site: Site, scores: SiteScores, number: int, config: NeSTConfig) -> torch.Tensor:
    """Return the rows a site gives, counted within the site."""
    if not scores.is_convincing:
        return torch.zeros(0, dtype=torch.long)
    rows = chosen_rows(
        scores.z,
        scores.weights,
        threshold=config.threshold,
        is_two_sided=config.sides == "two",
        min_rows=config.min_rows,
        max_rows=config.max_rows,
    )
    if not config.random_rows:
        return rows
    generator = torch.Generator().manual_seed(1_000_003 * config.seed + number)
    return random_rows(rows, size=site.stop - site.start, generator=generator)


def _group_of(site: Site, config: NeSTConfig) -> str:
    return f"layer {site.layer}" if config.scope == "layer" else site.key


def _cluster(
    members: Sequence[Site],
    rows: Mapping[str, torch.Tensor],
    features: Mapping[str, torch.Tensor],
    config: NeSTConfig,
) -> dict[str, torch.Tensor]:
    """Return the clusters of every member's rows; members are clustered together."""
    profiles = [features[site.module][:, site.start + rows[site.key]].T.float() for site in members]
    labels = cluster_profiles(torch.cat(profiles), config)
    parts = labels.split([len(one) for one in profiles])
    return {site.key: part for site, part in zip(members, parts, strict=True)}


def _neurons(
    site: Site, scores: SiteScores, rows: torch.Tensor, clusters: Mapping[str, torch.Tensor], config: NeSTConfig
) -> Neurons:
    return Neurons(
        site,
        rows=tuple((rows + site.start).tolist()),
        clusters=tuple(clusters[site.key].tolist()) if rows.numel() else (),
        group=_group_of(site, config),
        z=tuple(scores.z[rows].tolist()),
        accuracy=scores.accuracy,
        is_convincing=scores.is_convincing,
    )
