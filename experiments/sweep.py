"""``seawall sweep``: a W&B sweep file run here, without an account, through Optuna.

A file that sweeps ``method`` gives every method an Optuna study of its own with the same number of trials. Trials lie
in a database (SQLite unless told otherwise), so a sweep can be stopped, started again, and worked on by several at
once. What a trial cannot finish because its process died is run again with the same values.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
from rich.console import Console
from rich.text import Text

from callbacks.telemetry import RefusalMarginProbe
from experiments.run import run_recipe
from experiments.sweep_files import SweepFile, SweepGoal, grid_points
from experiments.sweep_store import (
    CANCELLED,
    claim_trials,
    counted_trials,
    create_pruner,
    create_sampler,
    open_storage,
    rank_of,
    requeue_lost,
    sign_trial,
)
from experiments.tracking import summary_values
from framework.config import KnownNames, MethodCheck, RunConfig, load_run_config, read_config
from framework.errors import ConfigError, SeawallError, describe_unknown
from framework.files import fingerprint, to_plain, write_json

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import Trial

__all__ = ["PruneByMargin", "SweepOptions", "check_sweep", "run_sweep", "trial_config"]

DEFAULT_TRIALS = 20
PROBE_STEPS = 10


@dataclass(frozen=True)
class SweepOptions:
    """How a sweep is carried out."""

    trials: int | None = None
    """Of each method; null takes the file's ``run_cap`` divided by the methods, a whole grid, or 20."""
    sampler: str | None = None
    """grid, random or tpe; null takes what the file's ``method`` stands for."""
    storage: str | None = None
    """URL of a database; null takes SQLite in the sweep's folder."""
    prune: bool = False
    """Stop trials whose refusal margin falls behind; the file's ``early_terminate`` asks for it too."""
    full_grid: bool = False
    """Let every method have its whole grid, also where the grids differ in size."""
    retry_lost: bool = False
    """Take trials that run on other machines for lost."""
    seed: int = 0
    """Of the sampler."""
    overrides: tuple[str, ...] = ()
    """``key=value`` laid over the recipe before the parameters."""

    def __post_init__(self) -> None:
        """Raise ConfigError for a number of trials below 1 or an unknown sampler."""
        problems = []
        if self.trials is not None and self.trials < 1:
            problems.append(f"Expected `trials` to be a whole number ≥ 1, but got {self.trials!r}.")
        if self.sampler not in (None, "grid", "random", "tpe"):
            problems.append(describe_unknown("sampler", str(self.sampler), ("grid", "random", "tpe")))
        if problems:
            raise ConfigError(problems)


class PruneByMargin(pl.Callback):
    """Reports the refusal margin of training to a trial, and ends the trial when it falls behind the others'."""

    def __init__(self, trial: Trial, *, sign: float = 1.0) -> None:
        """Watch for one trial.

        Args:
            trial: of Optuna.
            sign: -1 where the study makes its objective small, for Optuna compares reports in the study's direction.
        """
        self._trial, self._sign, self._seen = trial, sign, 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Report what the probe has measured since."""
        probe = next((item for item in trainer.callbacks if isinstance(item, RefusalMarginProbe)), None)  # type: ignore[attr-defined]
        if probe is None or len(probe.history) == self._seen:
            return
        self._seen = len(probe.history)
        step, margin = probe.history[-1]
        self._trial.report(self._sign * margin, step)
        if self._trial.should_prune():
            import optuna

            raise optuna.TrialPruned(f"refusal margin {margin:.3f} at step {step}")


def check_sweep(
    sweep: SweepFile,
    options: SweepOptions,
    *,
    known: KnownNames | None = None,
    validate_methods: MethodCheck | None = None,
) -> dict[str | None, int]:
    """Return the budget of every method, after trying out the first values of each in the recipe.

    Raises:
        ConfigError: values the recipe refuses, pruning with several objectives, or a budget below one trial.
    """
    methods: tuple[str | None, ...] = sweep.methods or (None,)
    problems: dict[str, None] = {}
    for method in methods:
        point = {item.key: (item.choices or (None,))[0] for item in sweep.of_method(method)}
        first = {key: value for key, value in point.items() if value is not None}
        try:
            trial_config(sweep, options, method, first, known=known, validate_methods=validate_methods)
        except ConfigError as error:
            problems.update(dict.fromkeys(error.problems))
    if _prunes(sweep, options) and len(sweep.goals) > 1:
        problems["Expected one objective with pruning, but got several. Leave out --prune or `early_terminate`."] = None
    if problems:
        raise ConfigError(list(problems))
    return _budgets(sweep, options, methods)


def run_sweep(
    sweep: SweepFile,
    options: SweepOptions,
    *,
    budgets: Mapping[str | None, int],
    folder: Path,
    console: Console | None = None,
) -> dict[str, Any]:
    """Run what is missing of a sweep and return its trials.

    Args:
        sweep: the file.
        options: how.
        budgets: of ``check_sweep``.
        folder: of the sweep; gets the database and ``sweep.json``.
        console: told about every trial.

    Returns:
        ``{"name", "goals", "methods": [{"method", "budget", "trials", "best"}], "folder"}``.

    Raises:
        ConfigError: the database cannot be opened, its trials are of another sweep, or a goal is not among the numbers
            of a run.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder.mkdir(parents=True, exist_ok=True)
    storage = open_storage(options.storage or f"sqlite:///{(folder / 'trials.db').absolute()}")
    found = []
    for method, budget in budgets.items():
        study = optuna.create_study(
            storage=storage,
            study_name="/".join([sweep.name, *([method] if method else [])]),
            directions=[goal.goal for goal in sweep.goals],
            pruner=create_pruner(prunes=_prunes(sweep, options), early_terminate=sweep.early_terminate),
            load_if_exists=True,
        )
        claim_trials(study, _decisive(sweep, options, method))
        requeue_lost(study, all_running=options.retry_lost)
        while _run_one(study, sweep, options, method, budget, console):
            pass
        found.append(_summary(study, sweep, method, budget))
    result = {"name": sweep.name, "goals": [goal.__dict__ for goal in sweep.goals], "methods": found}
    write_json(folder / "sweep.json", result)
    return {**result, "folder": str(folder)}


def trial_config(
    sweep: SweepFile,
    options: SweepOptions,
    method: str | None,
    point: Mapping[str, Any],
    *,
    known: KnownNames | None = None,
    validate_methods: MethodCheck | None = None,
) -> RunConfig:
    """Return the run of one trial; its name follows from its values, so that it is found again.

    Raises:
        ConfigError: the recipe refuses the values.
    """
    own = [f"{key}={json.dumps(value)}" for key, value in point.items()]
    chosen = [f"method={method}"] if method else []
    name = "/".join(["sweep", sweep.name, *([method] if method else []), fingerprint(dict(point))])
    probe = [f"trainer.probe_every_n_steps={PROBE_STEPS}"] if _prunes(sweep, options) else []
    texts = [*probe, *options.overrides, *chosen, *own, f"name={name}"]
    return load_run_config(sweep.recipe, texts, known=known, validate_methods=validate_methods)


def goal_values(goals: Sequence[SweepGoal], metrics: Mapping[str, Mapping[str, Any]]) -> list[float]:
    """Return the numbers a run reached.

    Raises:
        ConfigError: a goal that the run did not measure; the known ones are listed.
    """
    summary = summary_values(metrics)
    names = {
        goal.name: next((key for key in (goal.name, f"eval/{goal.name}") if key in summary), None) for goal in goals
    }
    problems = [describe_unknown("metric", name, summary) for name, key in names.items() if key is None]
    if problems:
        raise ConfigError(problems)
    return [summary[str(names[goal.name])] for goal in goals]


def _run_one(
    study: Study,
    sweep: SweepFile,
    options: SweepOptions,
    method: str | None,
    budget: int,
    console: Console | None,
) -> bool:
    """Run one trial, if the budget has one left; return whether another may follow."""
    import optuna
    from optuna.trial import TrialState

    waiting = any(trial.state == TrialState.WAITING for trial in study.get_trials(deepcopy=False))
    if not waiting and len(counted_trials(study)) >= budget:
        return False
    trial = study.ask()
    rank = rank_of(study, trial)
    # By its own rank: two workers that ask at once draw different values, and a retry moves nobody's.
    study.sampler = create_sampler(options.sampler or sweep.sampler, seed=options.seed, number=rank)
    sign_trial(trial)
    if rank >= budget:
        trial.set_user_attr(CANCELLED, True)  # another worker took the last one in this moment
        study.tell(trial, state=TrialState.FAIL)
        return False
    point = _suggest(trial, study, sweep, options, method)
    trial.set_user_attr("values", json.dumps(point))
    try:
        values = _execute(trial, sweep, options, method, point, console)
    except optuna.TrialPruned as stop:
        study.tell(trial, state=TrialState.PRUNED)
        said = f"pruned: {stop}"
    except ConfigError:
        trial.set_user_attr(CANCELLED, True)  # not the values' fault: nothing in this sweep can succeed
        study.tell(trial, state=TrialState.FAIL)
        raise
    except SeawallError as error:
        trial.set_user_attr("error", str(error))
        study.tell(trial, state=TrialState.FAIL)
        said = f"failed: {error}"
    else:
        study.tell(trial, values)
        said = ", ".join(f"{goal.name} {value:.4g}" for goal, value in zip(sweep.goals, values, strict=True))
    if console is not None:
        console.print(Text(f"{study.study_name} trial {trial.number}: {said}"), soft_wrap=True)
    return True


def _execute(
    trial: Trial,
    sweep: SweepFile,
    options: SweepOptions,
    method: str | None,
    point: Mapping[str, Any],
    console: Console | None,
) -> list[float]:
    config = trial_config(sweep, options, method, point)
    last = config.active_stages()[-1][0] if config.active_stages() else None
    sign = -1.0 if sweep.goals[0].goal == "minimize" else 1.0

    def watchers(stage: str) -> tuple[pl.Callback, ...]:
        return (PruneByMargin(trial, sign=sign),) if stage == last and _prunes(sweep, options) else ()

    results = run_recipe(config, console=console, label=method, watchers=watchers, waits=True)
    return goal_values(sweep.goals, results["rows"][-1]["metrics"])


def _suggest(trial: Trial, study: Study, sweep: SweepFile, options: SweepOptions, method: str | None) -> dict[str, Any]:
    """Return the values of a trial; one that replaces a lost trial gets that one's."""
    parameters = sweep.of_method(method)
    if (options.sampler or sweep.sampler) != "grid":
        return {item.key: item.suggest(trial, item.key) for item in parameters}
    return _shuffled(grid_points(parameters), options.seed)[rank_of(study, trial)]


def _budgets(sweep: SweepFile, options: SweepOptions, methods: Sequence[str | None]) -> dict[str | None, int]:
    if (options.sampler or sweep.sampler) == "grid":
        sizes = {method: len(grid_points(sweep.of_method(method))) for method in methods}
        least = min(sizes.values())
        found = dict(sizes) if options.full_grid else dict.fromkeys(methods, least)
        cap = options.trials or (sweep.run_cap // len(methods) if sweep.run_cap else None)
        found = {method: min(size, cap) if cap is not None else size for method, size in found.items()}
    else:
        each = options.trials or (sweep.run_cap // len(methods) if sweep.run_cap else DEFAULT_TRIALS)
        found = dict.fromkeys(methods, each)
    if min(found.values()) < 1:
        raise ConfigError(
            f"Expected `run_cap` to leave every one of {len(methods)} methods a run, but got {sweep.run_cap}. Raise "
            "it, or give --trials."
        )
    return found


def _decisive(sweep: SweepFile, options: SweepOptions, method: str | None) -> dict[str, Any]:
    """Return what the trials of one study have in common; the budget may grow, and how values are drawn may change."""
    parameters = {item.key: to_plain(item.spec) for item in sweep.of_method(method)}
    goals = {goal.name: goal.goal for goal in sweep.goals}
    return {
        "recipe": {"name": sweep.recipe, "settings": read_config(sweep.recipe, kind="recipe")},
        "parameters": parameters,
        "goals": goals,
        "overrides": list(options.overrides),
        "early_terminate": dict(sweep.early_terminate),
        "prune": _prunes(sweep, options),
    }


def _prunes(sweep: SweepFile, options: SweepOptions) -> bool:
    return options.prune or bool(sweep.early_terminate)


def _shuffled(points: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Return the points in an order that is the same for every worker; a part of a grid is then a fair sample."""
    return sorted(points, key=lambda point: fingerprint([seed, json.dumps(point, sort_keys=True, default=str)]))


def _summary(study: Study, sweep: SweepFile, method: str | None, budget: int) -> dict[str, Any]:
    from optuna.trial import TrialState

    trials = [trial for trial in study.get_trials() if not trial.user_attrs.get(CANCELLED)]
    done = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    best = {trial.number for trial in study.best_trials} if done else set()
    return {
        "method": method,
        "budget": budget,
        "trials": [
            {
                "number": trial.number,
                "state": trial.state.name.lower(),
                "values": json.loads(trial.user_attrs.get("values", "{}")),
                "reached": dict(zip([goal.name for goal in sweep.goals], trial.values or [], strict=False)),
                "error": trial.user_attrs.get("error"),
                "is_best": trial.number in best,
            }
            for trial in trials
        ],
        "best": sorted(best),
    }
