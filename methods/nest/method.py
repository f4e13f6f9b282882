"""NeST: find the neurons that tell harm, and train one shared vector for each cluster of them.

Formula: for every gate and up projection ``h = W x`` the feature of a prompt is ``max over its tokens of h_i``, i a row
of W. A linear probe with weights w on these features tells harmful from ordinary prompts; ``z = (w - mean w) / std w``
within the module, and the rows with ``z > threshold`` and ``w > 0`` are selected. k-means on the selected rows'
profiles gives clusters c(i); training learns one vector for each, ``W'_i = W_i + delta_c(i)``, all else frozen:
``h_i += x . delta_c(i)``. At the end the vectors are added into the rows.

Points: ``prepare`` (probe, select, cluster; stored once), ``prepare_model`` (the vectors, and a hook on each projection
that adds their product), ``select_parameters`` (with ``train: deltas`` nothing else is trained), ``edit_weights`` (the
fold; what nothing trained leaves with the digits of its file, also when it was loaded in 16 bits). With ``train:
all_but_neurons`` there are no vectors: the selected rows, their biases too, are put back after every step and in
``edit_weights``, which has to come after that of every other method.

Reference: NeST, arXiv:2602.16835 (abstracts and summaries; no code and no full text found). The detector follows
NeuroStrike, arXiv:2509.11864, code wu-lichao/NeuroStrike-Neuron-Level-Attacks-on-Aligned-LLMs (read only, re-derived).

Deviations: padding takes no part in the maximum; activations are standardised before the probe (``normalize: none``
leaves them); the probe is the optimum that the reference's 5000 epochs of Adam approach, found for all modules at once;
it is fitted on 80 % of the prompts and tested on the rest, and a module whose probe is no better than chance gives no
neurons; the gate and up halves of a fused projection are standardised apart; the number of clusters, learning rate and
length of training are not published, and ours. Experts that see only part of the tokens are left out.

Cost: one forward pass a prompt in ``prepare`` without logits, two bytes (float32: four) a neuron and prompt, and a
probe a module in the space of prompts. In training two thin products a projection, ``(tokens, in) x (in, k)`` and
``(tokens, k) x (k, rows)``; gradients and optimizer state only for the ``k in`` numbers of the vectors. No cost after
the fold.

Logged: ``rows``, ``vectors``, ``accuracy`` (held-out, mean over modules) and ``accuracy/layer_<n>``. Counted:
``patches_left_out`` where ``train: deltas`` gives no patch, because the finished model is not the start model with the
vectors alone: another method edits weights, or something else was trained.

Composes with methods that edit the finished weights when it comes first among them (`order`), for they know plain
weights only; with `train: all_but_neurons` when it comes last.

Does not compose with: a second method that needs the model without its vectors from a switched-off adapter; quantised
weights, whose rows nothing can be folded into; strategies that cut the weights.

Defaults: ``threshold`` 3 as in the reference; all others are ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytorch_lightning as pl
import torch
from torch import nn

from framework.errors import NoEffectError, WiringError
from framework.files import fingerprint
from framework.method import Method, MethodStore
from framework.model_files import model_fingerprint
from framework.parameters import lora_pairs
from framework.reference import on_fast_device
from framework.registry import register_method
from framework.weight_edits import edit_parameters, plain_parameters, restore_digits
from framework.weight_files import WeightFiles
from methods.nest.config import NeSTConfig
from methods.nest.functional import add_shared_vectors, fold_rows
from methods.nest.held import HeldRows, find_held, put_back
from methods.nest.patch import Patch, build_patch, write_patch
from methods.nest.probe import PromptSet, build_prompts
from methods.nest.selection import Neurons, Selection, find_neurons, load_selection, save_selection
from methods.nest.sites import find_projections

__all__ = ["NeST"]

ARTEFACT, RESULT = "nest_neurons", "neurons.json"
FORMAT = 1
"""Raise it when stored selections change their meaning."""
CONTAINER = "nest_vectors"
DECISIVE = frozenset(NeSTConfig.__dataclass_fields__) - {
    "train", "safety", "benign", "count", "held_out", "batch_tokens", "store_originals",
}  # fmt: skip
"""Settings that decide the selection, given the prompts and which of them are held out."""


@register_method("nest", config=NeSTConfig)
class NeST(Method):
    """NeST: probing, clustering, training and folding."""

    config: NeSTConfig

    def __init__(self, config: NeSTConfig) -> None:
        """Keep the settings; the neurons come with ``prepare``."""
        super().__init__(config)
        self._selection: Selection | None = None
        self._start: Path | None = None
        self._patch: Patch | None = None
        self._held: list[HeldRows] = []
        self._has_other_editors = False

    @property
    def points(self) -> tuple[str, ...]:
        """The points this way of training fills: only the vectors alone freeze."""
        return tuple(p for p in super().points if p != "select_parameters" or self.config.train == "deltas")

    @property
    def edit_place(self) -> Literal["first", "last"]:
        """Vectors are folded before others edit, who know plain weights only; held rows are put back after them."""
        return "last" if self.config.train == "all_but_neurons" else "first"

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Look who else edits the finished weights: no point is told, and a patch or held rows depend on it."""
        if stage == "fit":
            self._look_for_editors(trainer.callbacks)  # type: ignore[attr-defined]
        super().setup(trainer, pl_module, stage)

    def prepare(self, model: nn.Module, datamodule: Any, store: MethodStore) -> None:
        """Probe the model, select and cluster, or find what an earlier run found."""
        if datamodule is None:
            raise WiringError("Method `nest` needs the stage's data module for its prompts, but got none.")
        prompts = self._prompts(datamodule)
        self._start = store.model("start", method=self.name)
        key = {
            "format": FORMAT,
            "start": model_fingerprint(self._start),
            "dtype": str(next(model.parameters()).dtype),
            "modules": sorted(find_projections(model, self.config.targets or ())),
            "prompts": fingerprint([prompts.ids, prompts.labels.tolist(), prompts.is_held_out.tolist()]),
            "settings": {name: getattr(self.config, name) for name in DECISIVE},
        }
        found = store.artifacts.find(ARTEFACT, key)
        if found is None:
            with store.artifacts.writing(ARTEFACT, key) as folder, on_fast_device(model):
                pad_id = int(datamodule.encoder.tokenizer.pad_token_id)
                save_selection(find_neurons(model, prompts, self.config, pad_id=pad_id), folder / RESULT)
            found = store.artifacts.path(ARTEFACT, key)
        self._selection = load_selection(found / RESULT)

    def prepare_model(self, model: nn.Module) -> None:
        """Register the vectors and add their product to the projections; or remember the rows that are held."""
        selection = self._found()
        self._report(selection)
        if self.config.train == "all_but_neurons":
            self._hold(model, selection)
            return
        projections = find_projections(model, self.config.targets or ())
        device = next(model.parameters()).device
        vectors = nn.ParameterDict(
            {
                _escaped(group.key): nn.Parameter(torch.zeros(group.num_clusters, group.width, device=device))
                for group in selection.groups
            }
        )
        model.add_module(CONTAINER, vectors)
        for name, projection in projections.items():
            parts = [one for one in selection.neurons if one.site.module == name and one.rows]
            if not parts:
                continue
            shares = [_share_of(one, vectors[_escaped(one.group)]) for one in parts]
            # Not through `add_hook`: this hook takes tokens in any layout, so rows may go on sharing prefixes.
            self._hooks.append(projection.module.register_forward_hook(_AddVectors(vectors, shares)))
            self.count("modules_matched")
        self.count("rows_selected", selection.num_rows)

    def select_parameters(self, names: frozenset[str]) -> set[str]:
        """Keep nothing: the vectors are trained alone."""
        if not names:  # without an adapter nothing but the vectors is trained anyway
            self.count("parameters_frozen")
        return set()

    def edit_weights(self, model: nn.Module) -> None:
        """Add the vectors into their rows and take them off the model; or put held rows back where they were."""
        if self._start is None:
            raise WiringError("Method `nest` does not know its start model. Call `prepare_methods` before `fit`.")
        selection, files = self._found(), WeightFiles(self._start)
        if self.config.train == "all_but_neurons":
            restore_digits(model, files)
            put_back(self._held, files)
            return
        vectors = getattr(model, CONTAINER)
        deltas = {group.key: vectors[_escaped(group.key)].detach().float().cpu() for group in selection.groups}
        self._remove_hooks()
        delattr(model, CONTAINER)
        self.count("parameters_folded", sum(delta.numel() for delta in deltas.values()))
        is_start = not restore_digits(model, files) and not _has_more(model, files)
        projections = find_projections(model, self.config.targets or ())
        transposed = frozenset(name for name, one in projections.items() if one.is_transposed)
        updates = _updates(selection, deltas)

        def change(name: str, value: torch.Tensor) -> torch.Tensor | None:
            module = name.removesuffix(".weight")
            if module not in updates:
                return None
            rows, update = (tensor.to(value.device) for tensor in updates[module])
            return fold_rows(value, rows, update, is_transposed=module in transposed)

        changed = edit_parameters(model, change, files=files)
        self.count("tensors_folded", changed)
        if not changed and not self.allow_no_effect:
            raise NoEffectError(
                "Method `nest` did nothing: its vectors are still zero after training. Check the learning rate, or set "
                "`allow_no_effect: true` if that is what you want to measure."
            )
        if self.config.train != "deltas":
            return
        # A model inside a wrapper of another name has no file of its own to be patched.
        if is_start and not self._has_other_editors and all(f"{module}.weight" in files for module in updates):
            self._patch = self._build_patch(deltas, files, transposed)
        else:
            self.count("patches_left_out")

    def write_files(self, folder: Path) -> None:
        """Write the patch, when the vectors are all that was trained."""
        if self._patch is not None:
            write_patch(self._patch, folder / "nest.safetensors")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Put held rows back after a step; a point for it would count as filled in every way to train."""
        put_back([one for one in self._held if one.is_trained])
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    # ---- private -------------------------------------------------------------------------------------------------

    def _prompts(self, datamodule: Any) -> PromptSet:
        def ids(kind: str, names: tuple[str, ...]) -> list[list[int]]:
            examples = [example for name in names for example in datamodule.find_examples(kind, name)]
            encode = datamodule.encoder.encode_prompt
            return [encode(example.messages)[-datamodule.max_length :] for example in examples]

        return build_prompts(ids("safety", self.config.safety), ids("benign", self.config.benign), self.config)

    def _found(self) -> Selection:
        if self._selection is None:
            raise WiringError(
                "Method `nest` has not found its neurons yet. Call `prepare_methods(methods, model, datamodule, "
                "store)` before `fit`."
            )
        return self._selection

    def _report(self, selection: Selection) -> None:
        layers = selection.accuracy_by_layer
        self.report("rows", selection.num_rows)
        self.report("vectors", sum(group.num_clusters for group in selection.groups))
        self.report("accuracy", sum(one.accuracy for one in selection.neurons) / len(selection.neurons))
        for layer, accuracy in layers.items():
            self.report(f"accuracy/layer_{layer}", accuracy)
        self.count("modules_at_chance", sum(not one.is_convincing for one in selection.neurons))

    def _hold(self, model: nn.Module, selection: Selection) -> None:
        """Remember the selected rows of every tensor they lie in; something has to train some of them."""
        self._held = find_held(model, selection, self.config.targets or ())
        trained = {one.name.removesuffix(".weight").removesuffix(".bias") for one in self._held if one.is_trained}
        self.count("modules_matched", len(trained))
        if not trained:
            raise WiringError(
                "Expected the stage to train some of the selected rows with `train: all_but_neurons`, but its adapter "
                "lies elsewhere: there is nothing to hold. Add gate_proj and up_proj to `adapter.targets`."
            )
        self.count("rows_held", selection.num_rows)

    def _look_for_editors(self, callbacks: Sequence[pl.Callback]) -> None:
        """Remember whether other methods edit the finished weights."""
        others = [c for c in callbacks if isinstance(c, Method) and c is not self and "edit_weights" in c.points]
        self._has_other_editors = bool(others)

    def _build_patch(self, deltas: Mapping[str, torch.Tensor], files: WeightFiles, transposed: frozenset[str]) -> Patch:
        return build_patch(
            self.name,
            asdict(self._found()),
            deltas,
            base=model_fingerprint(files.folder),
            files=files,
            transposed=transposed,
            has_originals=self.config.store_originals,
        )

    def _acted(self, point: str) -> bool:
        if point == "edit_weights" and self.config.train == "all_but_neurons":
            return self.effects["rows_held"] > 0  # rows that nobody else edits are put back where they are
        return super()._acted(point)


def _has_more(model: nn.Module, files: WeightFiles) -> bool:
    """Return whether a model computes with trained numbers beside those of its files."""
    if any(bool(pair.B.any()) for pair in lora_pairs(model).values()):
        return True
    return any(p.requires_grad and name not in files for name, p in plain_parameters(model).items())


def _escaped(key: str) -> str:
    """Return a group's key as a name in the module tree, which takes no dots."""
    return key.replace(".", "/")


def _updates(selection: Selection, deltas: Mapping[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return by projection its selected rows, and what is added to each of them."""
    found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for one in selection.neurons:
        if one.rows:
            pair = torch.tensor(one.rows), deltas[one.group][list(one.clusters)]
            earlier = found.get(one.site.module)
            found[one.site.module] = (
                pair
                if earlier is None
                else (
                    torch.cat([earlier[0], pair[0]]),
                    torch.cat([earlier[1], pair[1]]),
                )
            )
    return found


class _Share(NamedTuple):
    """Which vectors are added to which rows of a projection."""

    key: str
    """Of the vectors."""
    rows: torch.Tensor
    """int64 ``(rows,)``"""
    membership: torch.Tensor
    """``(clusters, rows)``, 1 where a row belongs to a cluster"""


def _share_of(neurons: Neurons, vectors: torch.Tensor) -> _Share:
    device = vectors.device
    membership = torch.zeros(vectors.shape[0], len(neurons.rows), device=device)
    membership[list(neurons.clusters), list(range(len(neurons.rows)))] = 1.0
    return _Share(_escaped(neurons.group), torch.tensor(neurons.rows, device=device), membership)


class _AddVectors:
    """The hook that adds the product of shared vectors to the output of a projection.

    An object and no closure: a copy of the model then has a copy of the vectors.
    """

    def __init__(self, vectors: nn.ParameterDict, shares: list[_Share]) -> None:
        self.vectors = vectors
        self.shares = shares

    def __call__(self, module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        for place, share in enumerate(self.shares):
            if share.rows.device != output.device:
                # Kept for later passes: a tensor made under inference mode could not be saved for a backward pass.
                with torch.inference_mode(False):
                    rows, membership = share.rows.to(output.device), share.membership.to(output.device)
                share = share._replace(rows=rows, membership=membership)
                self.shares[place] = share
            output = add_shared_vectors(output, inputs[0], self.vectors[share.key], share.rows, share.membership)
        return output
