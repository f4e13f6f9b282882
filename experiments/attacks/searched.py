"""An attack of a suite whose settings are searched: trials on a part of the requests, the result on the others.

Every trial is an attack like any other, kept in the artefact store under its settings and requests; a search that was
interrupted draws the same settings again and finds what it had finished.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from experiments.attacks.attacked_models import MeasuredModel
from experiments.attacks.attacker_search import SearchConfig, search_and_measure
from experiments.attacks.carrying_out import FinishedAttack, Stage, carry_out, equip
from experiments.attacks.interface import AttackOutcome, PromptAttack
from experiments.attacks.registry import create_attack
from experiments.attacks.suite import NamedAttack
from framework.errors import DataError
from framework.examples import Prompt

__all__ = ["carry_out_searched"]


def carry_out_searched(
    named: NamedAttack,
    search: SearchConfig,
    stage: Stage,
    *,
    plain: MeasuredModel | None,
    progress: Callable[[int], None] | None = None,
) -> FinishedAttack:
    """Return the attack with the best settings found, measured on the requests they were not chosen by.

    Its ``settings`` hold ``search``: all trials, and what to know of them.

    Args:
        named: the attack; its settings are the first trial.
        search: trials, space and split.
        stage: the rest of the suite.
        plain: what was measured of the unattacked model; None for an endpoint.
        progress: called with the generated tokens granted so far, over all trials.

    Raises:
        SeawallError: the attack cannot be made with any of the settings, or there are too few requests.
    """
    made: list[FinishedAttack] = []
    granted = _Granted(progress)

    def run(settings: Mapping[str, Any], requests: Sequence[Prompt]) -> AttackOutcome:
        attack = create_attack(named.attack.name, settings, path=f"attacks.{named.label}")
        part = replace(stage, requests=list(requests))
        if isinstance(attack, PromptAttack):
            equip(attack, part)
        made.append(carry_out(NamedAttack(named.label, attack, settings), part, plain=plain, progress=granted.report))
        granted.settle()
        return made[-1].outcome

    result, outcome = search_and_measure(
        run, stage.requests, search, seed=stage.suite.seed, start=named.settings, floor=stage.suite.utility_floor
    )
    if not made:
        raise DataError("Expected the search to make at least one attack, but got none.")
    # The rate its settings were chosen by is among the trials and nowhere else.
    told = json.loads(json.dumps(result.to_dict()))
    cost = _added([one.outcome.cost for one in made])
    outcome = replace(outcome, settings={**outcome.settings, "search": told}, cost=cost)
    return replace(made[-1], outcome=outcome, is_reused=all(one.is_reused for one in made))


class _Granted:
    """Adds up what attacks one after another report."""

    def __init__(self, progress: Callable[[int], None] | None) -> None:
        self._progress, self._before, self._now = progress, 0, 0

    def report(self, done: int) -> None:
        """Pass on what an attack reports, those before it included."""
        self._now = done
        if self._progress is not None:
            self._progress(self._before + done)

    def settle(self) -> None:
        """Take an attack for finished."""
        self._before, self._now = self._before + self._now, 0


def _added(costs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the sums; what only some attacks count is 0 in the others."""
    names = dict.fromkeys(name for cost in costs for name in cost)
    return {name: sum(cost.get(name, 0) for cost in costs) for name in names}
