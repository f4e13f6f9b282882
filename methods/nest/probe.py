"""Activations of every neuron on every prompt, streamed, and the probes on them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from framework.errors import DataError, WiringError
from methods.nest.config import MIN_PROMPTS, MIN_TRAINED, NeSTConfig
from methods.nest.functional import (
    fit_probes,
    mean_difference,
    probe_accuracy,
    smallest_convincing,
    standardise,
    z_scores,
)
from methods.nest.sites import Projection, Site

__all__ = ["PromptSet", "SiteScores", "build_prompts", "pooled_activations", "score_sites"]

LEVEL = 0.01
"""Probability, over all modules together, that guessing passes for knowing."""
NOISE = 1e-4
"""Relative deviation of an activation in float32 that rounding alone can make."""
CHUNK_BYTES = 256 * 2**20
"""Float64 numbers that the probes of some modules may take at once."""


class PromptSet(NamedTuple):
    """Prompts of both classes as token ids, and which of them the probes are tested on."""

    ids: tuple[tuple[int, ...], ...]
    labels: torch.Tensor
    """bool ``(prompts,)``, True for harmful"""
    is_held_out: torch.Tensor
    """bool ``(prompts,)``"""


class SiteScores(NamedTuple):
    """How the neurons of a site speak for harm."""

    weights: torch.Tensor
    """float64 ``(neurons,)``"""
    z: torch.Tensor
    """float64 ``(neurons,)``, the same standardised"""
    accuracy: float
    """Share of held-out prompts the probe gets right."""
    is_convincing: bool
    """Whether guessing is ruled out."""


def build_prompts(harmful: Sequence[Sequence[int]], ordinary: Sequence[Sequence[int]], config: NeSTConfig) -> PromptSet:
    """Return as many prompts of each class, drawn by the seed, and a held-out part of each.

    Args:
        harmful: token ids of each prompt.
        ordinary: token ids of each prompt.
        config: how many, and the seed.

    Raises:
        DataError: a class has too few prompts, too few are left to train on, or a prompt stands in both.
    """
    classes = [list(dict.fromkeys(tuple(ids) for ids in prompts)) for prompts in (harmful, ordinary)]
    shared = set(classes[0]) & set(classes[1])
    if shared:
        raise DataError(
            f"Expected harmful and ordinary prompts to differ, but {len(shared)} stand in both classes. Remove them "
            "from one of the sets named in `safety` and `benign`."
        )
    count = min(len(one) for one in classes)
    if count < MIN_PROMPTS:
        raise DataError(
            f"Expected at least {MIN_PROMPTS} different prompts of each class to probe with, but got "
            f"{len(classes[0])} harmful and {len(classes[1])} ordinary ones. Name larger sets in `safety` and `benign`."
        )
    count = min(count, config.count or count)
    away = max(1, round(config.held_out * count))
    if count - away < MIN_TRAINED:
        raise DataError(
            f"Expected `held_out` to leave at least {MIN_TRAINED} of {count} prompts of each class to train the probes "
            f"on, but got {config.held_out:g}, which leaves {count - away}. Lower `held_out`, or name larger sets in "
            "`safety` and `benign`."
        )
    generator = torch.Generator().manual_seed(config.seed)
    ids: list[tuple[int, ...]] = []
    held: list[bool] = []
    for one in classes:
        order = torch.randperm(len(one), generator=generator)[:count].tolist()
        ids += [one[i] for i in order]
        held += [place < away for place in range(count)]
    labels = torch.arange(2 * count) < count
    return PromptSet(tuple(ids), labels, torch.tensor(held))


@torch.no_grad()
def pooled_activations(
    model: nn.Module,
    projections: Mapping[str, Projection],
    prompts: Sequence[Sequence[int]],
    *,
    pad_id: int,
    batch_tokens: int = 2048,
) -> dict[str, torch.Tensor]:
    """Return the largest output of every neuron over the tokens of each prompt, ``(prompts, neurons)`` by projection.

    Outputs are those of the linear module, before the activation function. They are reduced inside the forward pass, so
    that what is kept does not grow with the number of tokens; padding takes no part.

    Args:
        model: in the number format it computes in.
        projections: by clean name.
        prompts: token ids, none empty.
        pad_id: fills shorter prompts of a batch up.
        batch_tokens: of one forward pass, padding included; a longer prompt goes by itself.

    Raises:
        WiringError: a projection was not called, or sees something other than all tokens.
    """
    device = next(model.parameters()).device
    kept: dict[str, torch.Tensor] = {}
    state: dict[str, Any] = {}

    def keep(name: str, output: torch.Tensor) -> None:
        mask, places = state["mask"], state["places"]
        rows, tokens = mask.shape
        if output.numel() != rows * tokens * output.shape[-1]:
            raise WiringError(
                f"Expected `{name}` to see all {rows} x {tokens} tokens, but its output is {tuple(output.shape)}: "
                "part of the model sees part of the tokens. Leave it out of `targets`."
            )
        outputs = output.reshape(rows, tokens, -1).masked_fill(~mask[:, :, None], -torch.inf)
        pooled = outputs.amax(dim=1).cpu()
        if name not in kept:
            kept[name] = pooled.new_empty(len(prompts), pooled.shape[1])
        kept[name][places] = pooled

    with _hooked(projections, keep), _without_logits(model), _evaluating(model):
        for places in _batches([len(ids) for ids in prompts], batch_tokens):
            chosen = [prompts[place] for place in places]
            width = max(map(len, chosen))
            ids = torch.full((len(chosen), width), pad_id, dtype=torch.long)
            mask = torch.zeros((len(chosen), width), dtype=torch.bool)
            for row, prompt in enumerate(chosen):
                ids[row, : len(prompt)] = torch.tensor(prompt)
                mask[row, : len(prompt)] = True
            state.update(mask=mask.to(device), places=torch.tensor(places))
            model(input_ids=ids.to(device), attention_mask=mask.long().to(device), use_cache=False)
    missing = sorted(set(projections) - set(kept))
    if missing:
        raise WiringError(
            f"Expected every projection to be called in a forward pass, but {len(missing)} were not (`{missing[0]}` "
            "first). Leave them out of `targets`."
        )
    return kept


def score_sites(
    features: Mapping[str, torch.Tensor], sites: Sequence[Site], prompts: PromptSet, config: NeSTConfig
) -> dict[str, SiteScores]:
    """Return the scores of every site by key; sites of equal size are computed together.

    Args:
        features: ``(prompts, neurons)`` by projection.
        sites: to score.
        prompts: as the features were made of.
        config: which score.

    Raises:
        DataError: so few prompts are held out that no probe could convince.
        WiringError: no probe is better than guessing.
    """
    held = prompts.is_held_out
    number = int(held.sum())
    needed = smallest_convincing(number, share=0.5, level=LEVEL / len(sites))
    if needed > number:
        raise DataError(
            f"Expected enough held-out prompts to tell {len(sites)} probes from guessing, but got {number}. Name "
            "larger sets in `safety` and `benign`, or raise `held_out`."
        )
    found: dict[str, SiteScores] = {}
    noise = max(NOISE, 2.0 * max(torch.finfo(one.dtype).eps for one in features.values()))
    for chunk in _chunks(sites, prompts=len(held)):
        stacked = torch.stack([features[site.module][:, site.start : site.stop] for site in chunk]).double()
        train, test = stacked[:, ~held], stacked[:, held]
        if config.normalize == "zscore":
            values, mean, deviation = standardise(train, noise=noise)
            train, test = values, (test - mean) / deviation
        labels = prompts.labels[~held]
        fitted = fit_probes(train, labels, decay=config.probe_decay) if config.score == "probe" else None
        probes = mean_difference(train, labels) if fitted is None else fitted
        right = probe_accuracy(probes, test, prompts.labels[held])
        z = z_scores(probes.weights)
        for place, site in enumerate(chunk):
            correct = int(right[place])
            found[site.key] = SiteScores(probes.weights[place], z[place], correct / number, correct >= needed)
    if not any(scores.is_convincing for scores in found.values()):
        best = max(scores.accuracy for scores in found.values())
        raise WiringError(
            f"Expected probes that tell harmful from ordinary prompts, but none of {len(found)} gets more than "
            f"{best:.0%} of {number} held-out prompts right, no better than chance ({needed / number:.0%} would be): "
            "there are no neurons to select. Name other or larger sets in `safety` and `benign`."
        )
    return found


# ---- private -----------------------------------------------------------------------------------------------------


def _chunks(sites: Sequence[Site], *, prompts: int) -> Iterator[list[Site]]:
    """Yield sites of equal size, as many at once as fit."""
    for size in dict.fromkeys(site.stop - site.start for site in sites):
        alike = [site for site in sites if site.stop - site.start == size]
        # The activations three times (as they are, standardised, widened) and four matrices of prompts.
        fitting = max(1, CHUNK_BYTES // (8 * prompts * (3 * size + 4 * prompts)))
        for start in range(0, len(alike), fitting):
            yield alike[start : start + fitting]


def _batches(lengths: Sequence[int], limit: int) -> Iterator[list[int]]:
    """Yield places of prompts, of like length, whose padded batch stays within ``limit`` tokens."""
    batch: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: lengths[place]):
        if batch and (len(batch) + 1) * lengths[place] > limit:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


@contextlib.contextmanager
def _hooked(projections: Mapping[str, Projection], keep: Any) -> Iterator[None]:
    handles = []
    for name, projection in projections.items():

        def hook(module: nn.Module, inputs: Any, output: torch.Tensor, name: str = name) -> None:
            keep(name, output)

        handles.append(projection.module.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _without_logits(model: nn.Module) -> Iterator[None]:
    """Let the output head see one position only: nobody reads logits here, and they take more memory than the rest."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    if head is None:
        yield
        return
    handle = head.register_forward_pre_hook(lambda module, args: (args[0][:, :1], *args[1:]))
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True
