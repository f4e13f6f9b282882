"""Settings of the guard: what it watches while a stage trains, and what it does when a threshold is crossed."""

# ruff: noqa: RUF009 - `setting` is dataclasses.field with a rule, which ruff does not know.

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from framework.fields import COUNT, NOT_EMPTY, NOT_NEGATIVE, POSITIVE, Problem, Rule, check_instance, setting

__all__ = ["GUARD_METRICS", "GuardSettings", "Threshold", "guard_problems"]

GuardAction = Literal["watch", "stop", "roll_back", "raise_weight"]
FACTOR = Rule("a number above 0 and at most 1", lambda value: 0 < value <= 1)
PAIRS = Rule("a whole number ≥ 4", lambda value: value >= 4)
COSINE = Rule("a number between -1 and 1", lambda value: -1 <= value <= 1)
SHARE = Rule("a share between 0 and 1", lambda value: 0 <= value <= 1)

GUARD_METRICS = ("refusal_margin", "direction_cosine", "direction_auroc", "kl_to_start")
"""What is measured, in the order it is reported."""


@dataclass(frozen=True)
class Threshold:
    """One bound on a metric."""

    metric: str
    bound: float
    is_lower: bool
    """True where the metric must not fall below the bound."""

    def violation(self, value: float) -> float:
        """Return how far ``value`` is on the wrong side; below 0 where it is on the right one.

        Example:
            >>> Threshold("refusal_margin", 0.5, is_lower=True).violation(0.2)
            0.3
        """
        return self.bound - value if self.is_lower else value - self.bound


@dataclass(frozen=True)
class GuardSettings:
    """Thresholds on the safety of the model in training, and what follows when one is crossed."""

    every_n_steps: int = setting(10, rule=COUNT)
    """Steps between two measurements; the first comes before training, another one after the last step."""
    stages: list[Literal["align", "finetune", "repair"]] = setting(factory=lambda: ["finetune"], rule=NOT_EMPTY)
    """Stages that are guarded."""
    min_refusal_margin: float | None = None
    """Least refusal margin on harmful prompts, nats per token."""
    min_direction_cosine: float | None = setting(None, rule=COSINE)
    """Least cosine of the model's refusal direction with that of the model that entered the stage."""
    min_direction_auroc: float | None = setting(None, rule=SHARE)
    """Least AUROC with which the entering model's refusal direction tells harmful from harmless prompts."""
    max_kl: float | None = setting(None, rule=NOT_NEGATIVE)
    """Largest divergence of the first reply token from the entering model's, on harmful prompts, nats."""
    action: GuardAction = "stop"
    """watch: measure only; stop: end the stage with what it has; roll_back: return to the last state at which every
    threshold held; raise_weight: raise a method's weight."""
    prompts: int = setting(12, rule=PAIRS)
    """Harmful prompts measured on, and as many harmless look-alikes; never trained on."""
    layer: float = setting(0.6, rule=SHARE)
    """Depth at which the refusal direction is read, as a share of the layers."""
    after_roll_back: Literal["stop", "go_on"] = "stop"
    """What follows a roll back; go_on trains on at a lower learning rate."""
    rate_factor: float = setting(0.5, rule=FACTOR)
    """What each roll back multiplies the learning rate by."""
    max_roll_backs: int = setting(3, rule=COUNT)
    """Roll backs after which the stage stops all the same."""
    method: str | None = None
    """Method whose weight is raised."""
    weight_step: float = setting(1.0, rule=POSITIVE)
    """Weight added per unit of the largest violation, at every measurement."""
    min_weight: float | None = setting(None, rule=POSITIVE)
    """The weight falls no lower when thresholds hold; null takes the method's own weight."""
    max_weight: float = setting(10.0, rule=POSITIVE)
    """The weight rises no higher."""

    def __post_init__(self) -> None:
        """Raise ConfigError listing every field that has the wrong type or breaks its rule."""
        check_instance(self)

    @property
    def thresholds(self) -> tuple[Threshold, ...]:
        """The bounds that are set."""
        lower = zip(
            GUARD_METRICS, (self.min_refusal_margin, self.min_direction_cosine, self.min_direction_auroc), strict=False
        )
        found = [Threshold(metric, bound, is_lower=True) for metric, bound in lower if bound is not None]
        if self.max_kl is not None:
            found.append(Threshold(GUARD_METRICS[3], self.max_kl, is_lower=False))
        return tuple(found)

    @property
    def acts(self) -> bool:
        """Whether it may change what a stage gives."""
        return self.action != "watch"

    def guards(self, stage: str) -> bool:
        """Return whether a stage is guarded."""
        return stage in self.stages


def guard_problems(
    guard: GuardSettings | None, methods: Mapping[str, Collection[str]], *, trained: Collection[str]
) -> Iterator[Problem]:
    """Yield every problem between the settings of a guard and the run.

    Args:
        guard: None has none.
        methods: names of the methods by stage of the run.
        trained: stages of the run that take optimizer steps.
    """
    if guard is None:
        return
    path = "trainer.guard"
    if guard.acts and not guard.thresholds:
        text = f"Expected `{path}` to set a threshold, but got none for the action {guard.action!r}."
        remedy = "Set min_refusal_margin, min_direction_cosine, min_direction_auroc or max_kl, or action: watch."
        yield Problem(path, f"{text} {remedy}")
    for stage in guard.stages:
        if stage not in trained:
            known = ", ".join(trained) or "none"
            text = f"Expected `{path}.stages` to name stages of this run that train ({known}), but got {stage!r}."
            yield Problem(f"{path}.stages", text)
    yield from _unused(guard, path)
    yield from _weight_problems(guard, methods, path=path, guarded=[s for s in guard.stages if s in trained])


USED_BY = {
    "roll_back": ("after_roll_back", "rate_factor", "max_roll_backs"),
    "raise_weight": ("method", "weight_step", "min_weight", "max_weight"),
}
"""Settings that mean nothing with another action."""


def _unused(guard: GuardSettings, path: str) -> Iterator[Problem]:
    plain = GuardSettings()
    for action, names in USED_BY.items():
        for name in names if guard.action != action else ():
            value, default = getattr(guard, name), getattr(plain, name)
            if value != default:
                text = f"Expected `{path}.{name}` to be left out unless the action is {action}, but got {value!r} with"
                yield Problem(
                    f"{path}.{name}", f"{text} {guard.action!r}. Write {path}.action={action}, or leave it out."
                )


def _weight_problems(
    guard: GuardSettings, methods: Mapping[str, Collection[str]], *, path: str, guarded: list[str]
) -> Iterator[Problem]:
    if guard.action != "raise_weight":
        return
    if guard.method is None:
        text = f"Expected `{path}.method` to name the method whose weight is raised, but got None."
        yield Problem(f"{path}.method", text)
        guarded = []
    for stage in guarded:
        if guard.method not in methods.get(stage, ()):
            got = f"{guard.method!r}, and `{stage}` has {sorted(methods.get(stage, ())) or 'none'}"
            text = f"Expected `{path}.method` to be a method of every guarded stage, but got {got}."
            yield Problem(f"{path}.method", text)
    if guard.min_weight is not None and guard.min_weight > guard.max_weight:
        text = f"to be at most `max_weight` ({guard.max_weight:g}), but got {guard.min_weight:g}."
        yield Problem(f"{path}.min_weight", f"Expected `{path}.min_weight` {text}")
