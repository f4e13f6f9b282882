"""RMU (representation misdirection): steer the hidden states of harmful replies at one layer to a random direction.

Formula: ``forget + alpha retain`` with ``forget = mean || h_l - c u ||^2 / d`` over the reply tokens of harmful
requests with compliant replies, and ``retain = mean || h_l - h_l,start ||^2 / d`` over those of the retain rows;
``h_l`` is the hidden state after layer ``l``, ``d`` its size, ``u`` a random direction of length 1 with positive
entries. ``weight`` mixes: ``(1 - weight) task + weight (task_weight task + forget + alpha
retain)``.

Points: ``prepare`` (read the rows; the starting model's states on retain rows), ``select_parameters``, ``loss_term``.

Reference: The WMDP Benchmark, Li et al., ICML 2024, arXiv:2403.03218, section 4; code locuslab/open-unlearning
``trainer/unlearn/rmu.py`` (formula only, re-derived).

Deviations: a mean over rows, each by its own length, and a forget row drawn for each row of the stage, as the code
draws a retain row for each forget row. Layers are counted from 0. ``task_weight`` is ours.

Cost: two more forward passes a step up to the layer, with gradients, and one over the retain rows before training;
4 d bytes a reply token of theirs on disk. With ``reference: live`` a forward pass a step instead.

Does not compose with: strategies that cut the weights; ``live`` with full fine-tuning and with methods that train
something outside the adapter; whatever is to be learnt above the layer, which is frozen; with ``task_weight`` other
than 1 another method that changes the factor of the task loss.

Defaults: ``layer`` 7 of 32 and the two before it of the reference, scaled to the model's depth; ``c`` 2 and ``alpha``
1 of the code (the original: 6.5 and 1200 on a model of 7 billion). All modules of these layers are trained; the
original trains ``modules: [down_proj]``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import pytorch_lightning as pl
import torch
from torch import nn

from framework.batch import IGNORE, Batch, collate
from framework.chat import EncodedExample
from framework.composition import StepContext
from framework.errors import ConfigError, WiringError, describe_unknown
from framework.layer_states import check_layers, layer_states, numbered_layers, scaled_layer
from framework.method import MethodStore, _model_of
from framework.model_files import model_fingerprint
from framework.paired_rows import row_means
from framework.processes import main_first
from framework.reference import check_adapter_off, on_fast_device, reference_mode
from framework.reference_cache import CacheColumn, ReferenceRows, training_rows
from framework.registry import register_method
from framework.text_tower import text_prefix
from framework.unlearning import STAGE, Unlearning, number_problems, row_problems
from methods.layer_freezing import layer_of

__all__ = ["RMU", "RMUConfig", "control_direction", "kept_names", "state_distance"]

CACHE = "reference_states"
DEPTH = 7 / 32
"""Layer of the reference as a share of its model's layers."""
BEFORE = 2
"""Layers trained before that one."""
Reference = Literal["cached", "live"]


@dataclass(frozen=True)
class RMUConfig:
    """Settings of RMU."""

    weight: float = 1.0
    """Share of the unlearning loss, from 0 (plain training on the stage's rows) to 1."""
    source: str = "alpaca_mix"
    """Harmful requests with compliant replies: a registered set or a file of pairs."""
    count: int | None = None
    """Forget rows, >= 1; null takes all of the source."""
    retain: str = STAGE
    """Rows whose states are held: ``stage``, or ordinary requests with answers of a registered set or a file."""
    layer: int | None = None
    """Layer that is steered, from 0; null: 7 of 32, scaled to the model's depth."""
    train_layers: tuple[int, ...] | None = None
    """Layers that are trained, none above ``layer``; null: that one and the two before it."""
    modules: tuple[str, ...] = ()
    """Last parts of the names of the modules trained in them, such as down_proj; none: all."""
    c: float = 2.0
    """Length of the states to steer to, > 0."""
    alpha: float = 1.0
    """Strength with which the states of retain rows are held, >= 0."""
    task_weight: float = 0.0
    """Times the loss of the stage's rows, >= 0; 0 is the published loss."""
    reference: Reference = "cached"
    """Where the states of retain rows come from. cached: kept on disk; live: the model with its adapter off."""
    seed: int = 0
    """Decides the random direction."""

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: lists every problem.
        """
        for name in ("train_layers", "modules"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        problems = [
            *row_problems(self),
            *number_problems(self, positive=("c",), not_negative=("alpha", "task_weight")),
            *self._layer_problems(),
        ]
        if self.reference not in get_args(Reference):
            problems.append(describe_unknown("reference", str(self.reference), get_args(Reference)))
        if problems:
            raise ConfigError(problems)

    def _layer_problems(self) -> Iterator[str]:
        if self.layer is not None and not _is_count(self.layer):
            yield f"Expected `layer` to be a whole number >= 0 or null, but got {self.layer!r}."
        chosen = self.train_layers
        if chosen is not None and not (isinstance(chosen, tuple) and chosen and all(map(_is_count, chosen))):
            yield f"Expected `train_layers` to be a list of whole numbers >= 0 or null, but got {chosen!r}."
        if not isinstance(self.modules, tuple) or not all(isinstance(m, str) and m for m in self.modules):
            yield f"Expected `modules` to be a list of module names, but got {self.modules!r}."
        if not _is_count(self.seed):
            yield f"Expected `seed` to be a whole number >= 0, but got {self.seed!r}."


def control_direction(size: int, *, seed: int) -> torch.Tensor:
    """Return a direction of length 1 whose entries are drawn uniformly from 0 to 1, float64 ``(size,)``."""
    drawn = torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn / drawn.norm()


def state_distance(states: torch.Tensor, target: torch.Tensor, rows: torch.Tensor, *, num_rows: int) -> torch.Tensor:
    """Return ``|| h - target ||^2 / d``, averaged over the tokens of each row and then over rows.

    Args:
        states: ``(tokens, hidden)``, with their graph.
        target: of the same shape, or ``(hidden,)``.
        rows: int64 ``(tokens,)``, row of each token.
        num_rows: rows of the micro-batch.

    Example:
        >>> float(state_distance(torch.ones(2, 4), torch.zeros(4), torch.tensor([0, 1]), num_rows=2))
        1.0
    """
    wide = states if states.dtype == torch.float64 else states.float()
    distance = (wide - target.to(wide)).square().mean(-1)
    return row_means(distance, rows, num_rows=num_rows).mean()


def kept_names(names: frozenset[str], layers: Sequence[int], modules: Sequence[str]) -> set[str]:
    """Return the parameters in some layers and modules.

    Args:
        names: of parameters, adapters included.
        layers: numbers from 0.
        modules: last parts of module names; none means all.

    Raises:
        WiringError: there are none.
    """
    inside = {name for name in names if layer_of(name) in layers}
    kept = {name for name in inside if not modules or any(f".{module}." in f".{name}." for module in modules)}
    if not kept:
        raise WiringError(
            f"Expected something to train in layers {list(layers)} under {list(modules) or 'any module'}, but "
            "none of the trained parameters lies there for `rmu`. Name other `train_layers` or `modules`, or let the "
            "adapter sit on them (`adapter.targets`)."
        )
    return kept


@register_method("rmu", config=RMUConfig)
class RMU(Unlearning):
    """Representation misdirection for unlearning."""

    config: RMUConfig

    def __init__(self, config: RMUConfig) -> None:
        """Keep the settings; rows, layers and references come with ``prepare``."""
        super().__init__(config)
        self._layer = 0
        self._trained_layers: tuple[int, ...] = ()
        self._prefix = ""
        self._references: ReferenceRows | None = None
        self._has_selected = False

    def prepare(self, model: nn.Module, datamodule: Any, store: MethodStore) -> None:
        """Read the rows, find the layers, and keep the starting model's states on the retain rows."""
        super().prepare(model, datamodule, store)
        if self.weight == 0.0:
            return
        self._find_layers(len(numbered_layers(model, method=self.name)))
        self._prefix = text_prefix(model)
        if self.config.reference == "live" or self.config.alpha == 0.0:
            return
        key = {
            "model": model_fingerprint(store.model("start", method=self.name)),
            "dtype": str(next(model.parameters()).dtype),
            "layer": self._layer,
        }
        config: Any = model.config
        columns = (CacheColumn("state", (int(config.get_text_config().hidden_size),), "float32"),)
        self._references = ReferenceRows(store.artifacts, kind=CACHE, key=key, columns=columns)
        self._cover(model, self._retain.encoded if self._retain is not None else datamodule.encoded)

    def select_parameters(self, names: frozenset[str]) -> set[str]:
        """Keep what lies in the trained layers and modules."""
        if self.weight == 0.0:
            return set(names)
        self._forget_rows()  # the layers are known since `prepare`
        self._has_selected = True
        # The layers of a vision tower have the same numbers.
        inside = frozenset(name for name in names if name.startswith(self._prefix))
        return kept_names(inside, self._trained_layers, self.config.modules)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Look every retain row up once the data is complete: no point comes after ``configure_data`` of the others."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit" or self.weight == 0.0 or self.config.alpha == 0.0:
            return
        model = _model_of(pl_module)
        if self.config.reference == "live":
            check_adapter_off(model, method=self.name)
        elif self._references is not None:
            held = self._retain
            rows = held.encoded if held is not None else training_rows(trainer, method=self.name)
            self.count("rows_added_later", self._cover(model, rows))
            self._references.attach(rows)
            self.count("stored_bytes", self._references.bytes)

    def loss_term(self, ctx: StepContext) -> torch.Tensor | None:
        """Return the distance from the random direction, that of retain rows from the start, and the task's change."""
        given = self.config
        batch = self._forget_rows().batch(ctx.step, ctx.batch)
        states, rows, _ = self._reply_states(ctx.model, batch)
        target = given.c * control_direction(states.shape[-1], seed=given.seed)
        forget = state_distance(states, target, rows, num_rows=batch.input_ids.shape[0])
        others = self._task_parts(ctx, given.task_weight)
        if self._shows(ctx):
            self.report("forget_loss", forget)
            self.report("cosine", torch.cosine_similarity(states.detach().double().cpu(), target, dim=-1).mean())
        if given.alpha:
            retain = self._retain_loss(ctx)
            others.append(given.alpha * retain)
            if self._shows(ctx):
                self.report("retain_loss", retain)
        return self._joined(forget, others)

    def _retain_loss(self, ctx: StepContext) -> torch.Tensor:
        batch = ctx.batch if self._retain is None else self._retain.batch(ctx.step, ctx.batch)
        states, rows, positions = self._reply_states(ctx.model, batch)
        if self._references is not None:
            places = self._references.places(batch.example_ids, rows, positions)
            reference = self._references.take("state", places)
        else:
            with reference_mode(ctx.model):
                reference = self._reply_states(ctx.model, batch)[0]
        return state_distance(states, reference, rows, num_rows=batch.input_ids.shape[0])

    def _reply_states(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the states at the reply tokens ``(tokens, hidden)``, the row of each, and its place in the reply."""
        is_reply = batch.labels != IGNORE
        rows, columns = is_reply.nonzero(as_tuple=True)
        (states,) = layer_states(model, batch, [self._layer], method=self.name)
        return states[rows, columns], rows, columns - is_reply.int().argmax(dim=1)[rows]

    def _find_layers(self, depth: int) -> None:
        given = self.config
        self._layer = scaled_layer(DEPTH, depth) if given.layer is None else given.layer
        chosen = given.train_layers
        if chosen is None:
            chosen = tuple(range(max(0, self._layer - BEFORE), self._layer + 1))
        check_layers((self._layer,), depth=depth, name="layer")
        check_layers(chosen, depth=self._layer + 1, name="train_layers")
        self._trained_layers = chosen

    def _cover(self, model: nn.Module, rows: Sequence[EncodedExample]) -> int:
        references = self._references
        if references is None:
            return 0

        def compute(part: Sequence[EncodedExample]) -> Mapping[str, torch.Tensor]:
            with on_fast_device(model) as device, reference_mode(model):
                batch = collate(part, example_ids=range(len(part)), pad_id=0, step_reply_tokens=1).to(device)
                return {"state": self._reply_states(model, batch)[0].float()}

        return main_first(lambda: references.cover(rows, compute))

    def _acted(self, point: str) -> bool:
        # Where the trained layers are all there is to train, selecting them freezes nothing.
        return (point == "select_parameters" and self._has_selected) or super()._acted(point)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
