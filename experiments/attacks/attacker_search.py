"""An attacker who tunes: settings of one attack, searched within a number of trials.

Optuna (``TPESampler``, seeded) draws settings; a trial is the whole attack with these settings on a part of the
requests, and its value the attack success of its best point that keeps the model's utility, 0 if none does. The best
setting is then measured on the other requests. On the requests it was chosen by, its success is the largest of many
noisy rates and too high; on the others it is not, and only that is the attack's result.

Nothing is kept here: with the same seed the same settings are drawn again, so that a search that was interrupted goes
on where it was if ``run_one`` finds its finished attacks again.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.attacks.interface import AttackOutcome
from experiments.attacks.worst_case import AttackedPoint, worst_case
from experiments.sweep_files import schema_problems
from experiments.sweep_space import Parameter, read_parameters
from framework.errors import ConfigError, DataError, SeawallError, StorageError
from framework.examples import Prompt
from framework.fields import COUNT, SHARE, check_instance, setting
from framework.files import to_plain

__all__ = [
    "SearchConfig",
    "SearchResult",
    "Trial",
    "search_and_measure",
    "search_settings",
    "space_problems",
    "split_requests",
]

RunOne = Callable[[Mapping[str, Any]], AttackOutcome]
"""Settings to the outcome of the attack on the validation requests."""
FEWEST = 2
"""Requests on either side of the split."""
DRAWS = 20
"""Draws for each trial, at most."""


@dataclass(frozen=True)
class SearchConfig:
    """How an attack's settings are searched."""

    trials: int = setting(rule=COUNT)
    """Attacks made, the one with the suite's own settings included."""
    space: dict[str, Any] = setting(factory=dict)  # noqa: RUF009
    """Setting to its values, as in the ``parameters`` of a sweep file: ``values: [...]``, or ``min`` and ``max`` with a
    ``distribution``."""
    validation_share: float = setting(0.5, rule=SHARE)
    """Share of the requests by which the settings are chosen; the others measure what was chosen."""

    def __post_init__(self) -> None:
        """Raise ConfigError listing every field that has the wrong type or breaks its rule."""
        check_instance(self)
        problems = space_problems(self.space)
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True)
class Trial:
    """One setting that was tried."""

    settings: Mapping[str, Any]
    value: float
    """Attack success of the best point that keeps the utility; 0 if none does."""
    best: AttackedPoint | None
    error: str | None = None
    """Why the attack failed with these settings."""


@dataclass(frozen=True)
class SearchResult:
    """What a search found."""

    settings: Mapping[str, Any]
    """The best ones, laid over those the search started from."""
    trials: tuple[Trial, ...]
    best: AttackedPoint
    """Reached on the requests the settings were chosen by: too high, being the largest of many."""

    @property
    def note(self) -> str:
        """What to know of the result, as a sentence."""
        num_failed = sum(trial.error is not None for trial in self.trials)
        failed = f" {num_failed} of them failed." if num_failed else ""
        return (
            f"The settings are the best of {len(self.trials)} by {self.best.rate.denominator} requests, on which they "
            f"reached {self.best.rate.value:.1%}; that is the largest of several noisy rates and too high. What counts "
            f"was measured on the other requests.{failed}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, the note included."""
        return {**to_plain(self), "note": self.note}


def split_requests(
    requests: Sequence[Prompt], *, share: float = 0.5, seed: int = 0
) -> tuple[list[Prompt], list[Prompt]]:
    """Return the requests to choose settings by, and those to measure the choice on; both in their order.

    Args:
        requests: ids unique.
        share: of the first part.
        seed: decides who is where.

    Raises:
        DataError: one part would have fewer than two requests.
    """
    count = round(share * len(requests))
    if min(count, len(requests) - count) < FEWEST:
        raise DataError(
            f"Expected a search to have at least {FEWEST} requests to choose by and as many to measure on, but got "
            f"{count} and {len(requests) - count}. Raise the number of requests or change `validation_share`."
        )
    chosen = set(random.Random(f"attacker search {seed}").sample([request.id for request in requests], count))
    return [one for one in requests if one.id in chosen], [one for one in requests if one.id not in chosen]


def space_problems(space: Mapping[str, Any]) -> list[str]:
    """Return everything that is wrong with a search space, empty when nothing is.

    Args:
        space: as in ``SearchConfig``.
    """
    if not space:
        return ["Expected `space` to name at least one setting, but got none."]
    problems = schema_problems({"method": "bayes", "metric": {"name": "attack_success"}, "parameters": dict(space)})
    if problems:
        return problems
    try:
        read_parameters(space)
    except ConfigError as error:
        return error.problems
    return []


def search_settings(
    run_one: RunOne,
    space: Mapping[str, Any],
    trials: int,
    seed: int,
    *,
    start: Mapping[str, Any] | None = None,
    floor: float | None = None,
    progress: Callable[[Trial], None] | None = None,
) -> SearchResult:
    """Return the settings with which an attack succeeds most often without breaking the model.

    Settings with which the attack fails (any ``SeawallError`` but ``StorageError``) count as trials without success.
    Settings that are drawn again are no new trial, so that a space of few settings may end before its trials do.

    Args:
        run_one: makes the attack with some settings on the validation requests.
        space: setting to its values, as in ``SearchConfig``; names with dots are settings inside settings.
        trials: attacks made.
        seed: of the sampler.
        start: the first trial's settings, which those drawn are laid over; so a search never ends below them.
        floor: share of the unattacked model's utility that must be left.
        progress: called with each trial.

    Raises:
        ConfigError: the space is wrong, ``trials`` is below 1, or no trial could be made.
        DataError: the outcome does not say which requests were broken.
        StorageError: a folder cannot be written.
    """
    problems = space_problems(space)
    if trials < 1:
        problems.append(f"Expected `trials` to be a whole number >= 1, but got {trials!r}.")
    if problems:
        raise ConfigError(problems)
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
    parameters = read_parameters(space)
    done: list[Trial] = []
    if start is not None:
        done.append(_tried(run_one, dict(start), floor))
        _report(done[-1], progress)
    for _ in range(trials * DRAWS):
        if len(done) == trials:
            break
        drawn = study.ask()
        settings = _laid_over(start or {}, _suggested(parameters, drawn))
        trial = next((one for one in done if one.settings == settings), None)
        if trial is None:
            trial = _tried(run_one, settings, floor)
            done.append(trial)
            _report(trial, progress)
        study.tell(drawn, trial.value)
    return _result(done)


def search_and_measure(
    run: Callable[[Mapping[str, Any], Sequence[Prompt]], AttackOutcome],
    requests: Sequence[Prompt],
    search: SearchConfig,
    *,
    seed: int,
    start: Mapping[str, Any] | None = None,
    floor: float | None = None,
    progress: Callable[[Trial], None] | None = None,
) -> tuple[SearchResult, AttackOutcome]:
    """Return what a search found on a part of the requests, and the attack with it on the others.

    Args:
        run: makes the attack with some settings on some requests.
        requests: of the suite.
        search: trials, space and split.
        seed: of split and sampler.
        start: settings of the suite.
        floor: share of the unattacked model's utility that must be left.
        progress: called with each trial.

    Raises:
        ConfigError: as ``search_settings``.
        DataError: too few requests.
    """
    chosen_by, rest = split_requests(requests, share=search.validation_share, seed=seed)
    result = search_settings(
        lambda settings: run(settings, chosen_by),
        search.space,
        search.trials,
        seed,
        start=start,
        floor=floor,
        progress=progress,
    )
    return result, run(result.settings, rest)


def _result(done: Sequence[Trial]) -> SearchResult:
    made = [(trial, trial.best) for trial in done if trial.best is not None]
    if not made:
        reasons = list(dict.fromkeys(trial.error or "the model lost its utility" for trial in done))
        raise ConfigError(
            f"Expected at least one of {len(done)} trials to leave a useful model, but got none: {'; '.join(reasons)}."
        )
    best, point = max(made, key=lambda pair: pair[0].value)  # the first of equals
    return SearchResult(best.settings, tuple(done), point)


def _tried(run_one: RunOne, settings: dict[str, Any], floor: float | None) -> Trial:
    try:
        outcome = run_one(settings)
    except StorageError:
        raise  # no other settings would help
    except SeawallError as error:
        return Trial(settings, 0.0, None, str(error))
    found = worst_case([outcome], floor=floor, resamples=1).leading
    return Trial(settings, 0.0 if found is None else found.rate.value, found)


def _suggested(parameters: Sequence[Parameter], trial: Any) -> dict[str, Any]:
    return {parameter.key: parameter.suggest(trial, parameter.key) for parameter in parameters}


def _laid_over(start: Mapping[str, Any], drawn: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = dict(start)
    for key, value in drawn.items():
        *parents, name = key.split(".")
        place = found
        for parent in parents:
            place[parent] = dict(place.get(parent) or {})
            place = place[parent]
        place[name] = value
    return found


def _report(trial: Trial, progress: Callable[[Trial], None] | None) -> None:
    if progress is not None:
        progress(trial)
