"""Lisa: alternate between alignment and task data, and hold each state near where the other one left the weights.

Formula: steps come in turns, ``alignment_steps`` on alignment data, then ``task_steps`` on the task's; each adds
``1/2 || w - w_switch ||^2`` with ``weight`` (the paper's rho) over the trainable parameters w, where ``w_switch`` are
the weights at the last switch, that is where the other state ended. The term is left out in the first ``skip_share`` of
the steps.

Points: ``configure_data`` (the alignment rows; the order of all rows), ``loss_term``. Also overrides
``on_train_start``, because which rows a step takes can only be said to the loader in use, which exists from there on,
and ``weights_restored``: where a guard puts earlier weights back, they are ``w_switch`` until the next switch.

Reference: Lisa, Huang et al., NeurIPS 2024, arXiv:2405.18641, algorithm 1; code git-disl/Lisa@2e9c24c, Apache-2.0
(read only, re-derived).

Deviations: alignment steps are taken from the steps of the run, they do not come on top; rows of a state come in seeded
passes of their own, where the reference shuffles anew; whatever is not an alignment row of this method counts as the
task's.

Cost: no extra forward pass; one copy of what is trained, in memory and in checkpoints.

Does not compose with: methods that set the order of the rows; strategies that cut the weights.

Defaults: ``weight`` 1.0 and ``skip_share`` 0.1 are those of the reference's script; 2 and 18 steps keep its ratio of
100 to 900 in runs of dozens of steps; all rows of the embedded refusals.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from framework.composition import StepContext
from framework.errors import ConfigError, WiringError
from framework.method import Method
from framework.parameters import clean_name
from framework.registry import register_method

__all__ = ["Lisa", "LisaConfig", "block_start", "half_square_distance", "is_alignment_step", "rows_of_steps"]

SOURCE = "lisa"


@dataclass(frozen=True)
class LisaConfig:
    """Settings of Lisa."""

    weight: float = 1.0
    """Strength of the proximal term (rho), >= 0; 0 alternates without it."""
    alignment_steps: int = 2
    """Optimizer steps in a row on alignment data, >= 0; 0 switches the method off."""
    task_steps: int = 18
    """Optimizer steps in a row on the task's data, >= 1."""
    skip_share: float = 0.1
    """Share of the run's steps, from its start, without the proximal term, in [0, 1)."""
    source: str = "embedded"
    """Alignment rows: ``embedded``, a registered set or a file of pairs."""
    count: int | None = None
    """Alignment rows, >= 1; null takes all."""

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: lists every problem.
        """
        problems = list(self._problems())
        if problems:
            raise ConfigError(problems)

    def _problems(self) -> Iterator[str]:
        if not _is_number(self.weight) or not 0 <= self.weight < math.inf:
            yield f"Expected `weight` to be a number >= 0, but got {self.weight!r}."
        for name, least in (("alignment_steps", 0), ("task_steps", 1), ("count", 1)):
            value = getattr(self, name)
            if name == "count" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                yield f"Expected `{name}` to be a whole number >= {least}, but got {value!r}."
        if not _is_number(self.skip_share) or not 0 <= self.skip_share < 1:
            yield f"Expected `skip_share` to be a share from 0 to 1, 1 left out, but got {self.skip_share!r}."
        if not isinstance(self.source, str) or not self.source:
            yield f"Expected `source` to be a set's name or a file, but got {self.source!r}."


def is_alignment_step(step: int, *, alignment_steps: int, task_steps: int) -> bool:
    """Return whether ``step`` (from 0) is one on alignment data; the run begins with these.

    Example:
        >>> [is_alignment_step(s, alignment_steps=1, task_steps=2) for s in range(5)]
        [True, False, False, True, False]
    """
    return step % (alignment_steps + task_steps) < alignment_steps


def block_start(step: int, *, alignment_steps: int, task_steps: int) -> int:
    """Return the first step of the state that ``step`` belongs to: the last switch.

    Example:
        >>> [block_start(s, alignment_steps=1, task_steps=2) for s in range(5)]
        [0, 1, 1, 3, 4]
    """
    place = step % (alignment_steps + task_steps)
    return step - place if place < alignment_steps else step - place + alignment_steps


def rows_of_steps(
    alignment: Sequence[int],
    task: Sequence[int],
    *,
    alignment_steps: int,
    task_steps: int,
    total_steps: int,
    batch_size: int,
    seed: int,
) -> list[int]:
    """Return the row numbers of all steps, one after the other: each state takes the next rows of its own passes.

    Args:
        alignment: numbers of the alignment rows, at least one.
        task: numbers of the other rows, at least one.
        alignment_steps: steps in a row on the first.
        task_steps: steps in a row on the second.
        total_steps: steps of the run.
        batch_size: rows of a step.
        seed: decides the order of every pass.
    """
    streams = {
        True: _passes(alignment, seed=f"lisa alignment {seed}"),
        False: _passes(task, seed=f"lisa task {seed}"),
    }
    rows = []
    for step in range(total_steps):
        stream = streams[is_alignment_step(step, alignment_steps=alignment_steps, task_steps=task_steps)]
        rows += [next(stream) for _ in range(batch_size)]
    return rows


def half_square_distance(weights: Mapping[str, torch.Tensor], anchor: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return ``1/2 sum || w - anchor ||^2`` over all tensors, in float32 or float64.

    Args:
        weights: by name, at least one.
        anchor: one for each, of the same shape.

    Example:
        >>> float(half_square_distance({"w": torch.tensor([1.0, 3.0])}, {"w": torch.tensor([0.0, 1.0])}))
        2.5
    """
    parts = [(_wide(w) - _wide(anchor[name])).square().sum() for name, w in weights.items()]
    return 0.5 * torch.stack(parts).sum()


@register_method("lisa", config=LisaConfig)
class Lisa(Method):
    """Two states with a proximal term between them."""

    config: LisaConfig

    def __init__(self, config: LisaConfig) -> None:
        """Keep the settings; the first anchor is taken in the first step."""
        super().__init__(config)
        self._anchor: dict[str, torch.Tensor] = {}
        self._anchored_at = -1

    @property
    def _turns(self) -> dict[str, int]:
        return {"alignment_steps": self.config.alignment_steps, "task_steps": self.config.task_steps}

    def configure_data(self, datamodule: Any) -> None:
        """Add the alignment rows, and keep the rows in an order that the steps can be laid out on."""
        given = self.config
        if given.alignment_steps == 0:
            return
        if datamodule.total_steps <= given.alignment_steps:
            raise WiringError(
                f"Method `lisa` needs a run longer than its first state: expected `alignment_steps` to be below the "
                f"{datamodule.total_steps} steps of the run, but got {given.alignment_steps}. Lower it; the published "
                "ratio to `task_steps` is 1 to 9."
            )
        found = datamodule.find_examples("safety", given.source)
        # Their own ids: another method may add the same set, and its rows are the task's.
        rows = [replace(row, id=f"{SOURCE}/{row.id}") for row in found]
        datamodule.add_source(SOURCE, rows, count=given.count)
        datamodule.set_order(list)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lay the rows out on the steps; none was served yet."""
        super().on_train_start(trainer, pl_module)
        if self.config.alignment_steps == 0:
            return
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        is_own = [row.id.startswith(f"{SOURCE}/") for row in datamodule.rows]
        numbers = {side: [i for i, own in enumerate(is_own) if own is side] for side in (True, False)}
        if not all(numbers.values()):
            raise WiringError(
                f"Method `lisa` needs alignment rows and others, but got {len(numbers[True])} and "
                f"{len(numbers[False])}. Give the stage data of its own."
            )
        rows = rows_of_steps(
            numbers[True],
            numbers[False],
            **self._turns,
            total_steps=datamodule.total_steps,
            batch_size=datamodule.batch_size,
            seed=datamodule.seed,
        )
        datamodule.reorder(0, rows)

    def loss_term(self, ctx: StepContext) -> torch.Tensor | None:
        """Return half the squared distance from the last switch, in float32; None in the first steps of the run."""
        if self.config.alignment_steps == 0:
            return None
        weights = _trained(ctx.model)
        start = block_start(ctx.step, **self._turns)
        if start != self._anchored_at:
            self._switch(weights, start)
        self.report("is_alignment", float(is_alignment_step(ctx.step, **self._turns)))
        if ctx.step < self.config.skip_share * ctx.module.trainer.datamodule.total_steps:  # type: ignore[attr-defined]
            return None
        device = next(iter(weights.values())).device
        # A resumed run has read the anchor from a file, to the CPU.
        self._anchor = {name: kept.to(device) for name, kept in self._anchor.items()}
        with torch.autocast(device.type, enabled=False):
            return half_square_distance(weights, self._anchor)

    def weights_restored(self, model: nn.Module) -> None:
        """Hold the rest of the state near the weights that were put back: the anchor may be what was rejected."""
        if self._anchor:
            self._anchor = {name: weight.detach().clone() for name, weight in _trained(model).items()}
            self.count("anchors_restored")

    def _switch(self, weights: Mapping[str, torch.Tensor], step: int) -> None:
        """Take the weights as the anchor of the state that begins with ``step``."""
        if self._anchor:
            before = {name: self._anchor[name].to(weight.device) for name, weight in weights.items()}
            with torch.no_grad():
                self.report("drift", (2 * half_square_distance(weights, before)).sqrt())
        self._anchor = {name: weight.detach().clone() for name, weight in weights.items()}
        self._anchored_at = step
        self.count("switches", int(step > 0))
        self.effects["stored_numbers"] = sum(weight.numel() for weight in weights.values())

    def state_dict(self) -> dict[str, Any]:
        """Return the anchor too: a resumed run stands in the middle of a state."""
        return {**super().state_dict(), "anchor": self._anchor, "anchored_at": self._anchored_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the anchor of the interrupted run."""
        super().load_state_dict(state_dict)
        self._anchor = dict(state_dict["anchor"])
        self._anchored_at = int(state_dict["anchored_at"])


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {clean_name(name): p for name, p in model.named_parameters() if p.requires_grad}


def _passes(rows: Sequence[int], *, seed: str) -> Iterator[int]:
    """Yield the rows for ever, each pass in an order of its own."""
    number = 0
    while True:
        order = list(rows)
        random.Random(f"{seed} {number}").shuffle(order)
        yield from order
        number += 1


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
