"""A method: one Lightning callback with eight optional contribution points.

Lightning ignores what a callback returns, so a method cannot contribute through plain hooks. The base class overrides
the hooks once and calls the points; authors write the points and nothing else. A point that is not overridden costs
nothing. What a method did is counted, and a method that did nothing ends the run with ``NoEffectError``.
"""

from __future__ import annotations

import contextlib
import difflib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from framework.errors import NoEffectError, WiringError
from framework.files import ArtifactStore
from framework.parameters import checksum, clean_name
from framework.processes import gather

if TYPE_CHECKING:
    from framework.composition import StepContext

__all__ = ["NON_COMMUTING", "POINTS", "Method", "MethodStore", "points_of"]

POINTS = (
    "prepare",
    "prepare_model",
    "select_parameters",
    "configure_data",
    "loss_term",
    "edit_gradients",
    "project_weights",
    "edit_weights",
)
NON_COMMUTING = ("prepare_model", "edit_gradients", "project_weights", "edit_weights")
_OFFERED = {
    "add_hook",
    "count",
    "note_term",
    "override_weight",
    "report",
    "require_effect",
    "weights_restored",
    "write_files",
}


@dataclass(frozen=True)
class MethodStore:
    """What a method may read while it prepares: the store of artefacts and where the models of the run lie."""

    artifacts: ArtifactStore
    models: Mapping[str, Path] = field(default_factory=dict)
    """Folders by role: ``start`` (the model about to be trained), ``base`` (the model that entered ``align``)."""
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    """Fingerprints of the same models by role."""

    def model(self, role: str, *, method: str) -> Path:
        """Return a model's folder.

        Raises:
            WiringError: no model of that role is known.
        """
        if role not in self.models:
            raise WiringError(
                f"Method `{method}` needs the `{role}` model, but the run knows only {sorted(self.models) or 'none'}. "
                f"Name its folder in the method's settings, or add the stage that makes it."
            )
        return self.models[role]


def points_of(method_class: type[Method]) -> tuple[str, ...]:
    """Return the contribution points a class fills, in the order they run."""
    return tuple(point for point in POINTS if getattr(method_class, point) is not getattr(Method, point))


class Method(pl.Callback):
    """Base class of every method.

    The points, all optional (hook that runs them):

    * ``prepare(model, datamodule, store)``: offline, before ``fit``; probing, caches, mining.
    * ``prepare_model(model)``: add parameters, forward hooks (``setup``).
    * ``configure_data(datamodule)``: add a source or a transform (``setup``).
    * ``select_parameters(names)``: base parameters to keep trainable (``setup``, after all ``prepare_model``).
    * ``loss_term(ctx)``: a float32 scalar; the seam multiplies it by ``weight`` (inside ``training_step``).
    * ``edit_gradients(params)``: in place, once per step (``on_before_optimizer_step``).
    * ``project_weights(params)``: in place, after a step (``on_train_batch_end``).
    * ``edit_weights(model)``: fold, merge, project (``on_train_end``).
    """

    name: ClassVar[str] = ""
    config_class: ClassVar[type[Any]]
    supports: ClassVar[frozenset[str]] = frozenset({"single", "ddp"})
    """Strategies: ``single``, ``ddp``, ``fsdp``, ``fsdp2`` (``model_parallel``), ``deepspeed``."""
    allow_no_effect: bool = False

    def __init__(self, config: Any) -> None:
        """Keep the settings; nothing else happens before ``prepare`` or ``setup``."""
        self.config = config
        self.effects: Counter[str] = Counter()
        self._largest: torch.Tensor | None = None
        self.reports: dict[str, float] = {}
        self.planned_order: tuple[str, ...] | None = None
        self.declared_order: tuple[str, ...] = ()
        self._pending: dict[str, float] = {}
        self._hooks: list[RemovableHandle] = []
        self._last_step = 0
        self._trained = False
        self._overriding_weight: float | None = None
        self.cut_short = False
        """Whether a guard ended the training, maybe before a point had its turn."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse a public function that is no contribution point and no Lightning hook: it would never be called."""
        super().__init_subclass__(**kwargs)
        legal = set(POINTS) | {n for n in dir(pl.Callback) if not n.startswith("_")} | _OFFERED
        for attribute, value in vars(cls).items():
            if attribute.startswith("_") or attribute in legal or not isinstance(value, FunctionType):
                continue
            near = difflib.get_close_matches(attribute, sorted(legal), n=1, cutoff=0.5)
            hint = f"did you mean `{near[0]}`?" if near else "helpers are module functions or start with `_`."
            raise WiringError(
                f"`{cls.__name__}.{attribute}` is no contribution point and would never be called: {hint}"
            )

    # ---- contribution points -------------------------------------------------------------------------------------

    def prepare(self, model: nn.Module, datamodule: Any, store: MethodStore) -> None:
        """Make what training needs (probes, caches, mined prompts), offline; artefacts go into ``store``."""

    def prepare_model(self, model: nn.Module) -> None:
        """Add parameters, forward hooks or adapters to ``model``."""

    def configure_data(self, datamodule: Any) -> None:
        """Add a named source or a transform to ``datamodule``; never replace one."""

    def select_parameters(self, names: frozenset[str]) -> set[str]:
        """Return which of the trainable base parameters ``names`` stay trainable."""
        return set(names)

    def loss_term(self, ctx: StepContext) -> torch.Tensor | None:
        """Return a float32 scalar connected to the graph, before weighting; None when this step has nothing to add."""
        return None

    def edit_gradients(self, params: Mapping[str, nn.Parameter]) -> None:
        """Change gradients in place: synchronised, unscaled, unclipped, once per optimizer step."""

    def project_weights(self, params: Mapping[str, nn.Parameter]) -> None:
        """Change weights in place after an optimizer step; doing it twice must equal doing it once."""

    def edit_weights(self, model: nn.Module) -> None:
        """Change the final weights; afterwards the model has its original key names again."""

    def write_files(self, folder: Path) -> None:
        """Write what belongs beside the finished model, such as a patch; no contribution point, called once at the end.

        Args:
            folder: the stage's, in which ``model`` and ``adapter`` are taken.
        """

    # ---- what authors call ---------------------------------------------------------------------------------------

    @property
    def weight(self) -> float:
        """Strength of the loss term: the config's ``weight``, 1.0 without one, unless a guard has set another."""
        return (
            float(getattr(self.config, "weight", 1.0)) if self._overriding_weight is None else self._overriding_weight
        )

    def override_weight(self, weight: float) -> None:
        """Let the loss term count with another weight from now on; who calls it keeps it over an interruption."""
        self._overriding_weight = weight

    def weights_restored(self, model: nn.Module) -> None:
        """Take anew what was kept of the weights: a guard has put earlier ones back."""

    @property
    def points(self) -> tuple[str, ...]:
        """The contribution points this method fills."""
        return points_of(type(self))

    @property
    def edit_place(self) -> Literal["first", "last"] | None:
        """Which place this method must have among those that edit the finished weights; None where any is right."""
        return None

    @property
    def task_loss_setting(self) -> str | None:
        """Setting that would leave the stage's own loss its factor; None where the method does, as most do."""
        return None

    def report(self, name: str, value: float | torch.Tensor) -> None:
        """Log ``value`` as ``train/<method>/<name>`` with the next training batch."""
        self._pending[name] = float(value.detach()) if isinstance(value, torch.Tensor) else float(value)

    def count(self, name: str, number: int = 1) -> None:
        """Add to an effect counter; counters go into the results."""
        self.effects[name] += number

    def add_hook(self, handle: RemovableHandle) -> None:
        """Keep a hook's handle, so that it is removed at the end and after an exception."""
        self._hooks.append(handle)
        self.count("hooks_added")

    def note_term(self, value: torch.Tensor) -> None:
        """Remember the largest absolute value of a loss term, without waiting for the device."""
        value = value.detach().abs()
        # fmax passes over NaN, which is refused elsewhere.
        self._largest = value if self._largest is None else torch.fmax(self._largest.to(value.device), value)

    @property
    def largest_term(self) -> float:
        """Largest absolute value of the weighted loss term so far; reading it waits for the device."""
        return 0.0 if self._largest is None else float(self._largest)

    def require_effect(self) -> None:
        """Raise when a point that is filled did nothing; where a guard cut training short, count it instead.

        Raises:
            NoEffectError: names the point, what was counted and the switch that allows it.
        """
        idle = {point: text for point, text in _IDLE.items() if point in self.points and not self._acted(point)}
        if self.cut_short and (early := idle.keys() & _IN_TRAINING):
            self.effects["points_without_turn"] = len(early)
            idle = {point: text for point, text in idle.items() if point not in early}
        if idle and not self.allow_no_effect:
            raise NoEffectError(
                f"Method `{self.name}` did nothing: {'; '.join(idle.values())}. Check its settings, or set "
                "`allow_no_effect: true` if that is what you want to measure."
            )

    def _acted(self, point: str) -> bool:
        if point == "loss_term":
            return self.largest_term > 0.0
        if point == "prepare_model":
            return any(self.effects[k] for k in ("parameters_added", "hooks_added", "modules_matched"))
        return self.effects[_COUNTERS[point]] > 0

    # ---- Lightning hooks, overridden once ------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """Key of this method's state in a checkpoint; two methods never share one."""
        return f"method/{self.name}"

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let the first method conduct the set-up of all (see ``framework.conductor``)."""
        if stage == "fit":
            self._trained = False
            from framework.conductor import conduct_setup

            conduct_setup(trainer, pl_module, self)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Run ``edit_gradients`` on the trainable parameters that have a gradient."""
        if "edit_gradients" not in self.points:
            return
        params = {clean_name(n): p for n, p in _model_of(pl_module).named_parameters() if p.grad is not None}
        with torch.no_grad(), self._counting("gradient_edits", [p.grad for p in params.values() if p.grad is not None]):
            self.edit_gradients(params)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Run ``project_weights`` once per optimizer step and log what was reported."""
        if "project_weights" in self.points and trainer.global_step != self._last_step:
            params = {clean_name(n): p for n, p in _model_of(pl_module).named_parameters() if p.requires_grad}
            with torch.no_grad(), self._counting("projections", list(params.values())):
                self.project_weights(params)
        self._last_step = trainer.global_step
        if self._pending:
            pl_module.log_dict({f"train/{self.name}/{key}": value for key, value in self._pending.items()})
            self.reports.update(self._pending)
            self._pending.clear()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Run ``edit_weights``; final numbers are measured on the exported model, after this."""
        self._trained = True
        self._edit(_model_of(pl_module))

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a method without effect, once everything it could do has been done."""
        if not self._trained:
            # No step was left (a finished run that was resumed, or none asked for): Lightning skips `on_train_end`.
            self._edit(_model_of(pl_module))
        self._remove_hooks()
        self._share_effects()
        self.require_effect()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Remove hooks: Lightning calls neither ``on_train_end`` nor ``teardown`` after an exception."""
        self._remove_hooks()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Remove hooks that are still there."""
        self._remove_hooks()

    def state_dict(self) -> dict[str, Any]:
        """Return the effect counters and what was reported, so that a resumed run counts on."""
        return {
            "effects": dict(self.effects),
            "largest_term": self.largest_term,
            "last_step": self._last_step,
            "reports": dict(self.reports),
            "pending": dict(self._pending),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the counters of the interrupted run, which counted this set-up already."""
        self.effects = Counter(state_dict["effects"])
        self._largest = torch.tensor(float(state_dict["largest_term"]))
        self._last_step = int(state_dict["last_step"])
        self.reports = dict(state_dict["reports"])
        self._pending = dict(state_dict["pending"])

    # ---- private -------------------------------------------------------------------------------------------------

    def _share_effects(self) -> None:
        """Take over the largest counts of all processes: an effect on any of them is one."""
        found = gather((dict(self.effects), self.largest_term))
        if len(found) > 1:
            names = {name for effects, _ in found for name in effects}
            self.effects = Counter({name: max(effects.get(name, 0) for effects, _ in found) for name in names})
            self._largest = torch.tensor(max(largest for _, largest in found))

    def _edit(self, model: nn.Module) -> None:
        if "edit_weights" not in self.points:
            return
        with torch.no_grad():
            before = _checksums(model)
            self.edit_weights(model)
            after = _checksums(model)
        self.count("weights_edited", len({name for name, _ in before.items() ^ after.items()}))

    @contextlib.contextmanager
    def _counting(self, counter: str, tensors: list[torch.Tensor]) -> Iterator[None]:
        before = checksum(tensors)
        yield
        self.count(counter, int(checksum(tensors) != before))

    def _remove_hooks(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()


_IN_TRAINING = {"loss_term", "edit_gradients", "project_weights"}
"""Points that some methods fill in a part of the steps only."""
_COUNTERS = {
    "configure_data": "sources_added",
    "select_parameters": "parameters_frozen",
    "edit_gradients": "gradient_edits",
    "project_weights": "projections",
    "edit_weights": "weights_edited",
}
_IDLE = {
    "prepare_model": "it added no parameter and no hook and matched no module",
    "configure_data": "it added no data source and no transform",
    "select_parameters": "it froze no parameter",
    "loss_term": "its loss term was zero on every step",
    "edit_gradients": "it never changed a gradient",
    "project_weights": "it never changed a weight after a step",
    "edit_weights": "it changed no tensor of the final model",
}


def _checksums(model: nn.Module) -> dict[str, tuple[float, float]]:
    state = model.state_dict()
    return dict(zip(state, checksum(state.values()), strict=True))


def _model_of(pl_module: pl.LightningModule) -> nn.Module:
    model = getattr(pl_module, "model", pl_module)
    return model if isinstance(model, nn.Module) else pl_module
