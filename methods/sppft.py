"""SPPFT: freeze the layers in which a model begins to tell harmful from ordinary requests.

Formula: ``h_l(x)`` is the hidden state after layer ``l`` at the last token of prompt ``x``; with ordinary prompts ``n``
and harmful prompts ``m``, ``gap_l = mean angle(h_l(n_i), h_l(m_i)) - mean angle(h_l(n_i), h_l(n_i+1))``. Frozen are the
layers from the first one whose gap reaches ``onset`` of the largest gap to the first one that reaches ``plateau`` of
it, adapters on them included.

Points: ``prepare`` (the scan, stored once), ``select_parameters``.

Reference: Safety Layers in Aligned LLMs, Li et al., ICLR 2025, arXiv:2408.17003, sections 3 and 4 (read as a formula,
re-derived; no code was available).

Deviations: the paper reads the onset off a curve and then moves both ends by scaling the parameters of layers and
counting over-refusals; here two shares of the largest gap decide, without generating anything.

Cost: one forward pass a prompt in ``prepare``; training is cheaper than plain training.

Does not compose with: a second method whose selection leaves nothing to train.

Defaults: ``count`` 32 prompts of each kind, ``onset`` 0.1 and ``plateau`` 0.9 are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count as numbers
from typing import Any

import torch
from torch import nn

from framework.errors import ConfigError, WiringError
from framework.files import fingerprint, read_json, write_json
from framework.layer_states import numbered_layers
from framework.method import Method, MethodStore
from framework.model_files import model_fingerprint
from framework.registry import register_method
from methods.layer_freezing import layer_of

__all__ = ["SPPFT", "SPPFTConfig", "layer_gaps", "safety_layers"]

ARTEFACT, RESULT = "safety_layers", "layers.json"


@dataclass(frozen=True)
class SPPFTConfig:
    """Settings of SPPFT."""

    safety: str = "embedded"
    """Harmful prompts: ``embedded``, a registered set or a file of pairs."""
    benign: str = "embedded"
    """Ordinary prompts, spelt the same way."""
    count: int = 32
    """Prompts of each kind, >= 2; all when there are fewer."""
    onset: float = 0.1
    """Share of the largest gap at which the safety layers begin, in (0, 1]."""
    plateau: float = 0.9
    """Share of the largest gap at which they end, in [onset, 1]."""

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: lists every problem.
        """
        problems = []
        for name in ("safety", "benign"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                problems.append(f"Expected `{name}` to be a set's name or a file, but got {getattr(self, name)!r}.")
        if isinstance(self.count, bool) or not isinstance(self.count, int) or self.count < 2:
            problems.append(f"Expected `count` to be a whole number >= 2, but got {self.count!r}.")
        shares = (self.onset, self.plateau)
        if any(isinstance(s, bool) or not isinstance(s, (int, float)) for s in shares) or not (
            0 < self.onset <= self.plateau <= 1
        ):
            problems.append(
                f"Expected `onset` and `plateau` to be shares with 0 < onset <= plateau <= 1, but got {self.onset!r} "
                f"and {self.plateau!r}."
            )
        if problems:
            raise ConfigError(problems)


def layer_gaps(ordinary: torch.Tensor, harmful: torch.Tensor) -> torch.Tensor:
    """Return how much further apart ordinary and harmful prompts lie than ordinary ones among themselves, by layer.

    Args:
        ordinary: hidden states ``(prompts, layers, hidden)``, at least two prompts.
        harmful: the same number of harmful prompts, paired by place.

    Returns:
        ``(layers,)`` in degrees.

    Example:
        >>> state = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]]])
        >>> layer_gaps(state, state.flip(-1)).tolist()
        [90.0]
    """
    return (_angles(ordinary, harmful) - _angles(ordinary, ordinary.roll(-1, dims=0))).mean(dim=0)


def safety_layers(gaps: torch.Tensor, *, onset: float, plateau: float) -> range:
    """Return the layers in which the gap grows.

    Args:
        gaps: ``(layers,)`` in degrees.
        onset: share of the largest gap at which they begin.
        plateau: share of it at which they end.

    Raises:
        WiringError: no layer has a gap.

    Example:
        >>> safety_layers(torch.tensor([0.1, 2.0, 6.0, 9.5, 10.0]), onset=0.1, plateau=0.9)
        range(1, 4)
    """
    largest = float(gaps.max())
    if largest <= 0:
        raise WiringError(
            f"Expected some layer to tell harmful from ordinary prompts, but the largest gap is {largest:.2f} degrees. "
            "Name other prompts with `safety` and `benign`, or freeze layers by number with layer_freezing."
        )
    values = gaps.tolist()
    first = next(layer for layer in numbers() if values[layer] >= onset * largest)
    last = next(layer for layer in numbers(first) if values[layer] >= plateau * largest)
    return range(first, last + 1)


@register_method("sppft", config=SPPFTConfig)
class SPPFT(Method):
    """Freeze the safety layers found by a scan."""

    config: SPPFTConfig

    def __init__(self, config: SPPFTConfig) -> None:
        """Keep the settings; the layers come with ``prepare``."""
        super().__init__(config)
        self._found: dict[str, Any] | None = None

    def prepare(self, model: nn.Module, datamodule: Any, store: MethodStore) -> None:
        """Scan the layers and store which were chosen."""
        if datamodule is None:
            raise WiringError("Method `sppft` needs the stage's data module for its prompts, but got none.")
        prompts = [self._prompts(datamodule, kind) for kind in ("benign", "safety")]
        length = min(self.config.count, *(len(one) for one in prompts))
        if length < 2:
            raise WiringError(f"Expected at least 2 prompts of each kind, but got {length}. Name larger sets.")
        key = {
            "start": model_fingerprint(store.model("start", method=self.name)),
            "prompts": fingerprint([one[:length] for one in prompts]),
            "onset": self.config.onset,
            "plateau": self.config.plateau,
            "layers": "text",
        }
        folder = store.artifacts.find(ARTEFACT, key)
        if folder is None:
            with store.artifacts.writing(ARTEFACT, key) as partial:
                gaps = layer_gaps(*(_last_states(model, one[:length]) for one in prompts))
                chosen = safety_layers(gaps, onset=self.config.onset, plateau=self.config.plateau)
                write_json(partial / RESULT, {"gaps": gaps.tolist(), "layers": list(chosen)})
            folder = store.artifacts.path(ARTEFACT, key)
        self._found = read_json(folder / RESULT)

    def select_parameters(self, names: frozenset[str]) -> set[str]:
        """Keep what lies outside the safety layers."""
        if self._found is None:
            raise WiringError(
                "Method `sppft` has not scanned the layers yet. Call `prepare_methods(methods, model, datamodule, "
                "store)` before `fit`."
            )
        chosen = set(self._found["layers"])
        self.report("first_layer", min(chosen))
        self.report("last_layer", max(chosen))
        self.report("largest_gap", max(self._found["gaps"]))
        return {name for name in names if layer_of(name) not in chosen}

    def _prompts(self, datamodule: Any, kind: str) -> list[list[int]]:
        examples = datamodule.find_examples(kind, getattr(self.config, kind))[: self.config.count]
        return [datamodule.encoder.encode_prompt(example.messages)[-datamodule.max_length :] for example in examples]


@torch.no_grad()
def _last_states(model: nn.Module, prompts: list[list[int]]) -> torch.Tensor:
    """Return the hidden states after every layer at the last token, float64 ``(prompts, layers, hidden)``."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    states, seen = [], list[torch.Tensor]()

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        state = output[0] if isinstance(output, tuple) else output
        seen.append(state[0, -1].double().cpu())

    # Hooks of our own: transformers leaves those behind `output_hidden_states` on the model.
    hooks = [module.register_forward_hook(keep) for module in numbered_layers(model, method="sppft")]
    try:
        for ids in prompts:
            seen.clear()
            model(input_ids=torch.tensor([ids], device=device), use_cache=False)
            states.append(torch.stack(seen))
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)
    return torch.stack(states)


def _angles(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    cosines = torch.nn.functional.cosine_similarity(ours, theirs, dim=-1)
    return torch.rad2deg(torch.acos(cosines.clamp(-1.0, 1.0)))
