"""The trials of a sweep in Optuna's database: who runs them, which count, and which were lost with their process."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from experiments.run_folder import config_differences
from framework.errors import ConfigError

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial

__all__ = [
    "CANCELLED",
    "RETRY",
    "claim_trials",
    "counted_trials",
    "create_pruner",
    "create_sampler",
    "open_storage",
    "rank_of",
    "requeue_lost",
    "sign_trial",
]

RETRY = "retry_of"
"""Note at a trial that replaces a lost one: which."""
CANCELLED = "cancelled"
"""Note at a trial that came when the budget was spent."""
WORKER = "worker"
"""Note at a trial: who runs it."""
SETTINGS = "settings"
"""Note at a study: what its trials have in common, as JSON."""
MIN_STEPS = 10
SHOWN = 8


def claim_trials(study: Study, settings: Mapping[str, Any]) -> None:
    """Note what the trials of a study have in common; refuse a study whose trials are of something else.

    Args:
        study: of Optuna.
        settings: as plain values.

    Raises:
        ConfigError: the settings differ; the differences are shown.
    """
    now = json.loads(json.dumps(settings, default=str))
    noted = study.user_attrs.get(SETTINGS)
    if noted is None:
        study.set_user_attr(SETTINGS, json.dumps(now))
        return
    differences = config_differences(json.loads(noted), now)
    if differences:
        shown = [*differences[:SHOWN], *([f"{len(differences) - SHOWN} more"] if len(differences) > SHOWN else [])]
        raise ConfigError(
            f"Expected the sweep {study.study_name!r} to be as its trials were made, but got other settings: "
            f"{'; '.join(shown)}. Give it another `name`, or put the settings back."
        )


def sign_trial(trial: Trial) -> None:
    """Note which process runs a trial."""
    trial.set_user_attr(WORKER, [platform.node(), os.getpid()])


def rank_of(study: Study, trial: Trial) -> int:
    """Return which of the counted trials this one is, from 0; a retry is the one it replaces."""
    number = trial.user_attrs.get(RETRY, trial.number)
    return [other.number for other in counted_trials(study)].index(number)


def counted_trials(study: Study) -> list[FrozenTrial]:
    """Return the trials that count against the budget, in order: each once, however often its process died."""
    trials = study.get_trials(deepcopy=False)
    return [trial for trial in trials if RETRY not in trial.user_attrs and not trial.user_attrs.get(CANCELLED)]


def requeue_lost(study: Study, *, all_running: bool = False) -> None:
    """Queue again what was running in a process that is gone.

    Args:
        study: of Optuna.
        all_running: take every running trial for lost, those of other machines too.
    """
    from optuna.trial import TrialState

    for trial in study.get_trials(states=(TrialState.RUNNING,)):
        host, process = trial.user_attrs.get(WORKER, [None, None])
        is_gone = host == platform.node() and process != os.getpid() and not _is_alive(process)
        if is_gone or all_running:
            study.tell(trial.number, state=TrialState.FAIL)
            if trial.user_attrs.get(CANCELLED):
                continue
            study.enqueue_trial(trial.params, user_attrs={RETRY: trial.user_attrs.get(RETRY, trial.number)})


def create_sampler(kind: str, *, seed: int, number: int) -> Any:
    """Return what draws the values of a trial.

    Args:
        kind: grid, random or tpe; the points of a grid are not drawn.
        seed: of the sweep.
        number: rank of the trial; the draws after an interruption are those without one.
    """
    import optuna

    own = seed * 100_003 + number
    return optuna.samplers.TPESampler(seed=own) if kind == "tpe" else optuna.samplers.RandomSampler(seed=own)


def create_pruner(*, prunes: bool, early_terminate: Mapping[str, Any]) -> Any:
    """Return what ends trials early.

    Args:
        prunes: whether any is ended.
        early_terminate: W&B's section, whose ``min_iter`` and ``eta`` become those of successive halving; without it
            a trial below the median of the others ends.
    """
    import optuna

    if not prunes:
        return optuna.pruners.NopPruner()
    if not early_terminate:
        return optuna.pruners.MedianPruner(n_startup_trials=4)
    return optuna.pruners.SuccessiveHalvingPruner(
        min_resource=int(early_terminate.get("min_iter", MIN_STEPS)),
        reduction_factor=max(2, int(early_terminate.get("eta", 3))),
    )


def open_storage(url: str) -> Any:
    """Return the database of a URL, made if it is not there.

    Raises:
        ConfigError: it cannot be opened.
    """
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    try:
        return optuna.storages.RDBStorage(url)
    except (SQLAlchemyError, ImportError, ValueError) as error:
        text = str(error).splitlines()[0]
        raise ConfigError(f"Expected `storage` to be the URL of a database, but got {url!r}: {text}.") from error


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
