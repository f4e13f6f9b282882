"""Pruning the safety neurons: zero the rows of the MLPs that tell harm, and see whether refusals go.

Neurons are rows of the projections into the MLPs (gate and up), scored on harmful and ordinary prompts by the largest
output over the tokens of a prompt:

- ``probe``: weight of a logistic probe, standardised within its module; modules whose probe does not convince give none
  (NeST's detector).
- ``weighted_difference``: mean activation on harmful minus on ordinary prompts, times the norm of the column of the
  MLP's output that the neuron writes with.

For every share of all scored rows, the highest-scoring ones become 0 (their bias too), which silences the neuron: both
``silu(0)`` and ``gelu(0)`` are 0. The control zeroes as many rows of each module at random.

Reference: NeuroStrike, arXiv:2509.11864 (detector by its released code, see ``methods/nest``); ``weighted_difference``
after the idea of Wanda, arXiv:2306.11695, is ours.

Deviations: a share of rows over all modules instead of a threshold of three deviations in each; the random control.

Cost: no query, no training step; one pass over the prompts.

Needs: nothing but the weights and prompts.
"""

# ruff: noqa: RUF009 - `setting` is dataclasses.field with a rule, which ruff does not know.

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from datamodules.catalog import find_examples
from experiments.attacks.harmful_rows import leave_out_measured
from experiments.attacks.interface import AttackedModel, ModelAttack, ModelTarget, register_attack
from experiments.attacks.model_folders import (
    Stopwatch,
    list_problems,
    load_exact,
    nothing_changed,
    passing_folder,
    save_exact,
)
from experiments.attacks.residual_stream import WRITERS, find_layers
from framework.chat import ChatEncoder
from framework.errors import ConfigError, DataError, WiringError
from framework.fields import COUNT, NOT_EMPTY, Rule, check_instance, setting
from framework.models import LoadedModel, choose_device
from framework.parameters import clean_name
from framework.weight_files import linear_weights
from methods.nest.config import NeSTConfig
from methods.nest.functional import mean_difference, random_rows
from methods.nest.probe import PromptSet, build_prompts, pooled_activations, score_sites
from methods.nest.sites import Projection, Site, find_projections, find_sites

__all__ = ["NeuronPruning", "NeuronPruningConfig", "highest_rows", "zero_rows"]

Score = Literal["probe", "weighted_difference"]
Chosen = Literal["safety", "random"]
PART = Rule("a share above 0 and at most 0.5", lambda value: 0 < value <= 0.5)


@dataclass(frozen=True)
class NeuronPruningConfig:
    """Settings of neuron pruning."""

    shares: list[float] = setting(factory=lambda: [0.005, 0.02], rule=PART)
    """Shares of the scored rows that become 0, one model each."""
    neurons: list[Chosen] = setting(factory=lambda: ["safety", "random"])
    """safety: the highest-scoring rows; random: as many others of each module (control)."""
    score: Score = "probe"
    """How rows are scored."""
    layers: int | None = setting(None, rule=COUNT)
    """Only the first so many layers; null takes all."""
    harmful: str = setting("embedded", rule=NOT_EMPTY)
    """Harmful requests to probe with: ``embedded``, a registered set of pairs or a file."""
    harmless: str = setting("embedded", rule=NOT_EMPTY)
    """Ordinary requests, spelt the same way."""
    count: int = setting(120, rule=Rule("a whole number ≥ 10", lambda value: value >= 10))
    """Prompts of each class at most."""

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: lists every problem.
        """
        check_instance(self)
        if problems := list_problems(shares=self.shares, neurons=self.neurons):
            raise ConfigError(problems)


@register_attack("neuron_pruning", config=NeuronPruningConfig)
class NeuronPruning(ModelAttack):
    """The target without its highest-scoring neurons."""

    kind = "weights"
    unit = "edits"
    config: NeuronPruningConfig

    @property
    def num_models(self) -> int:
        """One a share, and one more for the control."""
        return len(self.config.shares) * len(self.config.neurons)

    def make(self, target: ModelTarget, folder: Path) -> Iterator[AttackedModel]:
        """Yield one model a share and kind of neurons.

        Raises:
            DataError: there are too few prompts.
            WiringError: the model has fewer layers than asked for, no known MLPs, no row that speaks for harm, or
                nothing but zeros in the chosen rows.
        """
        watch = Stopwatch()
        loaded = load_exact(target.folder)
        sites, scores, num_left_out = self._score(loaded, target)
        del loaded
        for share in self.config.shares:
            chosen = highest_rows(scores, share=share)
            if not any(rows.numel() for rows in chosen.values()):
                raise WiringError(
                    f"Expected a share of {share:g} of the rows to be at least one that speaks for harm, but got none. "
                    "Raise `shares`, or name other prompts."
                )
            for kind in self.config.neurons:
                rows = chosen if kind == "safety" else _random(sites, chosen, seed=target.seed)
                with passing_folder(folder / f"{kind}-{share:g}") as place:
                    loaded = load_exact(target.folder)
                    number = zero_rows(loaded.model, sites, rows)
                    if not number:
                        raise nothing_changed(
                            f"{self.name} {kind} {share:g}",
                            "every chosen row was zero before",
                            "Check whether the target was pruned before, or raise `shares`.",
                        )
                    save_exact(loaded, place)
                    del loaded
                    facts = {"rows": number, "rows_by_layer": _by_layer(sites, rows)}
                    facts |= {"measured_rows_left_out": num_left_out} if target.requests else {}
                    yield AttackedModel(place, 0, {"share": share, "neurons": kind}, facts, {"seconds": watch.lap()})

    def _score(self, loaded: LoadedModel, target: ModelTarget) -> tuple[list[Site], dict[str, torch.Tensor], int]:
        """Return the sites, the score of every row, and how many prompts were left out because they are measured.

        The score is higher for harm, and minus infinity where nothing speaks for it.
        """
        model: Any = loaded.model.to(choose_device(target.accelerator))  # type: ignore[arg-type]
        count = len(find_layers(model))
        if self.config.layers is not None and self.config.layers > count:
            raise WiringError(
                f"Expected `layers` to be at most {count}, the layers of the model, but got {self.config.layers}. "
                "Lower it, or write null for all."
            )
        encoder = ChatEncoder(loaded.tokenizer, system=target.system)
        given = NeSTConfig(count=self.config.count, seed=target.seed)
        apart = leave_out_measured(
            target, find_examples("safety", self.config.harmful, seed=0), text=lambda row: row.prompt
        )
        if not apart.kept:
            raise DataError(
                f"Expected `harmful` to hold requests that are not measured, but got {apart.num_left_out} that are. "
                "Name other requests."
            )
        rows = apart.kept, find_examples("benign", self.config.harmless, seed=0)
        harmful, ordinary = ([encoder.encode_prompt(row.messages) for row in one] for one in rows)
        prompts = build_prompts(harmful, ordinary, given)
        projections = find_projections(model)
        sites = [s for s in find_sites(projections) if self.config.layers is None or s.layer < self.config.layers]
        used = {site.module: projections[site.module] for site in sites}
        pad_id: Any = loaded.tokenizer.pad_token_id
        features = pooled_activations(model, used, prompts.ids, pad_id=pad_id)
        if self.config.score == "probe":
            found = score_sites(features, sites, prompts, given)
            scores = {
                key: one.z if one.is_convincing else torch.full_like(one.z, -torch.inf) for key, one in found.items()
            }
        else:
            scores = weighted_differences(model, features, sites, prompts, used)
        return sites, scores, apart.num_left_out


def weighted_differences(
    model: nn.Module,
    features: Mapping[str, torch.Tensor],
    sites: Sequence[Site],
    prompts: PromptSet,
    projections: Mapping[str, Projection],
) -> dict[str, torch.Tensor]:
    """Return by site the difference of mean activations times the norm of what the neuron writes with.

    Args:
        model: plain.
        features: ``(prompts, neurons)`` by projection.
        sites: to score.
        prompts: as the features were made of.
        projections: by clean name.

    Returns:
        float64 ``(neurons,)`` by key; minus infinity where the difference is not above 0.

    Raises:
        WiringError: an MLP has no known output.
    """
    outputs = {
        name.rpartition(".")[0]: weight.oriented
        for name, weight in linear_weights(model).items()
        if name.rpartition(".")[2] in WRITERS
    }
    found = {}
    for site in sites:
        block = clean_name(f"{projections[site.module].name}.").rstrip(".").rpartition(".")[0]
        if block not in outputs or outputs[block].shape[1] != site.stop - site.start:
            raise WiringError(
                f"Expected the MLP of `{site.module}` to have an output named like one of {', '.join(WRITERS)}, but "
                "got none. Use `score: probe`."
            )
        values = features[site.module][None, :, site.start : site.stop]
        difference = mean_difference(values, prompts.labels).weights[0]
        score = difference * outputs[block].detach().double().norm(dim=0).cpu()
        found[site.key] = torch.where(score > 0, score, torch.full_like(score, -torch.inf))
    return found


def highest_rows(scores: Mapping[str, torch.Tensor], *, share: float) -> dict[str, torch.Tensor]:
    """Return the rows of every site that are among the highest of all, as many as a share of all rows.

    Args:
        scores: ``(rows,)`` by site; minus infinity is never taken.
        share: of the rows of all sites together, rounded to whole rows.

    Returns:
        int64, ascending, counted within the site.

    Example:
        >>> highest_rows({"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([2.0, 0.0])}, share=0.5)
        {'a': tensor([0]), 'b': tensor([0])}
    """
    joined = torch.cat(list(scores.values()))
    number = min(round(share * joined.numel()), int(torch.isfinite(joined).sum()))
    is_chosen = torch.zeros(joined.numel(), dtype=torch.bool)
    is_chosen[joined.sort(descending=True, stable=True).indices[:number]] = True
    parts = is_chosen.split([one.numel() for one in scores.values()])
    return {key: part.nonzero().flatten() for key, part in zip(scores, parts, strict=True)}


@torch.no_grad()
def zero_rows(model: nn.Module, sites: Sequence[Site], rows: Mapping[str, torch.Tensor]) -> int:
    """Zero the rows and their biases in place and return how many of them were not zero before.

    Args:
        model: plain.
        sites: of the model.
        rows: int64 by site, counted within it.
    """
    projections = find_projections(model)
    number = 0
    for site in sites:
        projection, places = projections[site.module], rows[site.key] + site.start
        oriented = projection.weight.T if projection.is_transposed else projection.weight
        held = oriented[places].any(dim=1)
        oriented[places] = 0.0
        bias: Any = getattr(projection.module, "bias", None)
        if bias is not None:
            held |= bias[places] != 0
            bias[places] = 0.0
        number += int(held.sum())
    return number


def _random(sites: Sequence[Site], chosen: Mapping[str, torch.Tensor], *, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {s.key: random_rows(chosen[s.key], size=s.stop - s.start, generator=generator) for s in sites}


def _by_layer(sites: Sequence[Site], rows: Mapping[str, torch.Tensor]) -> dict[str, int]:
    counted: dict[str, int] = {}
    for site in sites:
        counted[str(site.layer)] = counted.get(str(site.layer), 0) + int(rows[site.key].numel())
    return counted
