"""NeST derived again: maxima prompt by prompt, probes in the space of neurons, silhouettes and folds by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from experiments.conformance_table import Deviation, relative_deviation
from experiments.contract.case import START
from experiments.contract.fitting import FitSpec, build_data
from framework.adapters import AdapterSpec, add_adapter
from framework.composition import prepare_methods
from framework.files import ArtifactStore
from framework.method import MethodStore
from methods.nest import NeST, NeSTConfig, Selection
from methods.nest.clusters import cluster_profiles
from methods.nest.method import CONTAINER
from methods.nest.probe import build_prompts, pooled_activations, score_sites
from methods.nest.sites import find_projections, find_sites

__all__ = ["deviations"]

CODE = "arXiv:2509.11864; code wu-lichao/NeuroStrike-Neuron-Level-Attacks-on-Aligned-LLMs"
PAPER = "arXiv:2602.16835, as in the card"
SETTINGS: dict[str, Any] = {"held_out": 0.5, "threshold": 1.5, "min_rows": 0}
DECAY = 1e-3
NEWTON = 60
COUNT = 30
MODULES = 4


def deviations(folder: Path) -> Iterator[Deviation]:
    """Yield how far features, probes, selection, clusters and the fold are off."""
    sets = _write_prompts(folder)
    START.build().save_pretrained(folder / "start")
    settings: dict[str, Any] = {**SETTINGS, **sets}
    method = NeST(NeSTConfig(**settings))
    model = add_adapter(START.build(), AdapterSpec(kind="none"))
    data = build_data(FitSpec())
    store = MethodStore(ArtifactStore(folder / "store"), models={"start": folder / "start"})
    prepare_methods([method], model, data, store)
    selection: Any = method._selection
    config = method.config
    ids = [
        [data.encoder.encode_prompt(e.messages) for e in data.find_examples(k, sets[k])] for k in ("safety", "benign")
    ]
    prompts = build_prompts(ids[0], ids[1], config)
    ours = pooled_activations(model, find_projections(model), prompts.ids, pad_id=0)
    theirs = _features(prompts.ids)
    off = max(relative_deviation(ours[name], theirs[name]) for name in theirs)
    yield Deviation("maximum of a neuron over the tokens of a prompt", CODE, off, 1e-5, len(theirs))
    worst, chosen = torch.zeros(()), 0
    scores = score_sites(ours, find_sites(find_projections(model)), prompts, config)
    train = ~prompts.is_held_out
    for one in selection.neurons:
        w = _probe(ours[one.site.module][train].double(), prompts.labels[train].double())
        off = relative_deviation(scores[one.site.key].weights, w)
        worst = torch.maximum(worst, torch.tensor(off))  # keeps a number that is none
        mean = sum(w.tolist()) / len(w)
        deviation = math.sqrt(sum((value - mean) ** 2 for value in w.tolist()) / len(w))
        rows = {i for i, value in enumerate(w.tolist()) if value > 0 and (value - mean) / deviation > 1.5}
        chosen += len(rows ^ set(one.rows)) if one.is_convincing else len(one.rows)
    yield Deviation("weights of the linear probe", f"{CODE}, its objective", float(worst), 1e-6, len(selection.neurons))
    yield Deviation("rows selected, mismatches", f"{CODE}, z > threshold and w > 0", chosen, 0, selection.num_rows)
    yield Deviation("clusters of the best silhouette, mismatches", PAPER, _cluster_mismatches(config), 0, 3)
    yield Deviation(
        "logits with vectors and with dense W + M delta", PAPER, _fold_deviation(method, model, selection), 1e-5, 1
    )


def _write_prompts(folder: Path) -> dict[str, str]:
    for name, letters in (("safety", "XZ"), ("benign", "ab")):
        rows = [{"prompt": f"{letters[i % 2] * 12} ask {i}", "response": "Yes."} for i in range(COUNT)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {name: str(folder / f"{name}.jsonl") for name in ("safety", "benign")}


def _features(prompts: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """Return the maxima of each projection, one prompt at a time, in float64 from the inputs of the MLPs."""
    model: Any = START.build().double()
    inputs: dict[int, torch.Tensor] = {}
    for number, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda module, args, n=number: inputs.update({n: args[0][0].detach()}))
    found: dict[str, list[torch.Tensor]] = {}
    for prompt in prompts:
        model(torch.tensor([list(prompt)]))
        for number, layer in enumerate(model.model.layers):
            for name in ("gate_proj", "up_proj"):
                weight = getattr(layer.mlp, name).weight.detach()
                maxima = torch.stack([weight @ x for x in inputs[number]]).max(dim=0).values
                found.setdefault(f"model.layers.{number}.mlp.{name}", []).append(maxima)
    return {name: torch.stack(rows) for name, rows in found.items()}


def _probe(X: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the probe by Newton's method over weights and bias, features standardised."""
    spread = X.std(dim=0, correction=0)
    # A neuron whose maximum lies on the template is the same for every prompt, and says nothing.
    is_alive = spread > 1e-4 * X.mean(dim=0).abs()
    X = torch.where(is_alive, (X - X.mean(dim=0)) / spread, torch.zeros_like(X))
    Z = torch.cat([X, torch.ones(len(X), 1, dtype=X.dtype)], dim=1)
    w = Z.new_zeros(Z.shape[1])
    for _ in range(NEWTON):
        p = torch.sigmoid(Z @ w)
        gradient = Z.T @ (p - y) / len(y) + DECAY * w
        hessian = (Z.T * (p * (1 - p))) @ Z / len(y) + DECAY * torch.eye(len(w), dtype=w.dtype)
        w = w - torch.linalg.solve(hessian, gradient)
    return w[:-1]


def _cluster_mismatches(config: NeSTConfig) -> int:
    """Return how many rows of well separated groups land in another cluster than their group, over three layouts."""
    wrong = 0
    for number, sizes in enumerate(((4, 6), (5, 3, 7), (4, 4, 4, 5))):
        generator = torch.Generator().manual_seed(number)
        centres = torch.randn(len(sizes), 40, generator=generator)
        groups = [label for label, size in enumerate(sizes) for _ in range(size)]
        profiles = centres[groups] + 0.05 * torch.randn(len(groups), 40, generator=generator)
        found = cluster_profiles(profiles, config).tolist()
        wrong += sum(ours != theirs for ours, theirs in zip(found, groups, strict=True))
    return wrong


def _fold_deviation(method: NeST, model: Any, selection: Selection) -> float:
    """Return how far logits with vectors are off those of dense weights ``W + M delta``."""
    method.prepare_model(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for vector in getattr(model, CONTAINER).values():
            vector.copy_(0.3 * torch.randn(vector.shape, generator=generator))
    ids = torch.arange(4, 24).reshape(2, 10)
    dense: Any = START.build().double()
    modules = dict(dense.named_modules())
    with torch.no_grad():
        for one in selection.neurons:
            if not one.rows:
                continue
            delta = getattr(model, CONTAINER)[one.group.replace(".", "/")].double()
            M = torch.zeros(64, len(delta), dtype=torch.float64)
            for row, label in zip(one.rows, one.clusters, strict=True):
                M[row, label] = 1.0
            modules[one.site.module].weight += M @ delta
        return relative_deviation(model(ids).logits, dense(ids).logits)
