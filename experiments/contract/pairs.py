"""Any two methods either run together or are refused with a reason before training."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich import box
from rich.table import Table
from rich.text import Text

from experiments.contract.fitting import FitSpec, Recorder, fit, quiet
from experiments.contract.runner import ContractReport, Progress, fixed_conditions, run_subjects
from experiments.contract.subject import Subject, registered_subject
from experiments.contract.workbench import CaseConflict, Workbench
from framework.errors import ConfigError, SeawallError, WiringError
from framework.method import NON_COMMUTING, Method
from framework.registry import known_methods

__all__ = ["PairResult", "compose_pair", "pairs_table", "representative_pairs", "run_pair_contracts", "run_pairs"]

STEPS = 3


@dataclass(frozen=True)
class PairResult:
    """What two methods do together."""

    first: str
    second: str
    status: Literal["together", "refused", "fail"]
    """together: both acted; refused: by a method or the seam (wiring, settings), before the first step; fail: anything
    else, such as two cases that cannot be tried out together."""
    detail: str


def compose_pair(first: Subject, second: Subject, folder: Path) -> PairResult:
    """Return whether two methods run together, ``first`` first, for two steps.

    Args:
        first: comes first where the order matters.
        second: comes second.
        folder: for models and artefacts.
    """
    bench = Workbench((first, second), folder)
    recorder = Recorder()
    try:
        with quiet():
            detail = _run_together(bench, recorder)
    except CaseConflict as error:  # of the cases, not of the methods: these have not been tried
        return PairResult(first.name, second.name, "fail", f"{type(error).__name__}: {error}")
    except SeawallError as error:
        is_refusal = isinstance(error, (WiringError, ConfigError)) and not recorder.steps
        status: Literal["refused", "fail"] = "refused" if is_refusal else "fail"
        return PairResult(first.name, second.name, status, f"{type(error).__name__}: {error}")
    except Exception as error:
        return PairResult(first.name, second.name, "fail", f"crashed with {type(error).__name__}: {error}")
    return PairResult(first.name, second.name, "together", detail)


def run_pairs(names: Sequence[str] = (), *, progress: Progress | None = None) -> list[PairResult]:
    """Return what every pair of registered methods does together; a method without a case fails in all its pairs.

    Args:
        names: only pairs with one of these methods; none takes all.
        progress: called before every pair.
    """
    known = list(known_methods())
    chosen = [pair for pair in itertools.combinations(known, 2) if not names or set(pair) & set(names)]
    results = []
    with tempfile.TemporaryDirectory(prefix="seawall-pairs-") as folder, fixed_conditions(Path(folder)):
        for number, (first, second) in enumerate(chosen):
            if progress is not None:
                progress(f"{first} + {second}", number, len(chosen))
            try:
                subjects = registered_subject(first), registered_subject(second)
            except SeawallError as error:
                results.append(PairResult(first, second, "fail", str(error)))
                continue
            # A folder each: two cases may mean different models by one role.
            results.append(compose_pair(*subjects, Path(folder) / f"{first}+{second}"))
    return results


def representative_pairs(results: Sequence[PairResult]) -> list[tuple[str, str]]:
    """Return one pair that runs together for every combination of contribution points in training."""
    points = {name: frozenset(entry.points) - {"prepare"} for name, entry in known_methods().items()}
    found: dict[frozenset[frozenset[str]], tuple[str, str]] = {}
    for result in results:
        if result.status == "together":
            combination = frozenset((points[result.first], points[result.second]))
            found.setdefault(combination, (result.first, result.second))
    return list(found.values())


def run_pair_contracts(results: Sequence[PairResult], *, clauses: Sequence[str] = ()) -> list[ContractReport]:
    """Run the clauses on one pair for every combination of contribution points.

    Args:
        results: what ``run_pairs`` found.
        clauses: names of clauses; none takes all.
    """
    return [
        run_subjects([registered_subject(first), registered_subject(second)], clauses=clauses)
        for first, second in representative_pairs(results)
    ]


def pairs_table(results: Sequence[PairResult]) -> Table:
    """Return the pairs as a table: who, what happened, and what both did or why not."""
    counts = {status: sum(r.status == status for r in results) for status in ("together", "refused", "fail")}
    title = f"{len(results)} pairs: " + ", ".join(f"{number} {status}" for status, number in counts.items())
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    for column in ("first", "second", "verdict"):
        table.add_column(column, no_wrap=True)
    table.add_column("what they did, or why not", ratio=1)
    styles = {"together": "green", "refused": "yellow", "fail": "bold red"}
    for result in results:
        verdict = Text(result.status, style=styles[result.status])
        table.add_row(result.first, result.second, verdict, Text(result.detail))
    return table


def _run_together(bench: Workbench, recorder: Recorder) -> str:
    methods = bench.create()
    if bench.is_edit_only:
        bench.edited(methods)
    else:
        fit(FitSpec(adapter=bench.adapter, steps=STEPS), methods, bench.store, order=bench.order, recorder=recorder)
        if recorder.steps != STEPS:
            raise RuntimeError(f"expected {STEPS} steps, but the run took {recorder.steps}")
    shared = [point for point in NON_COMMUTING if all(point in method.points for method in methods)]
    texts = [f"{method.name}: {_effects(method)}" for method in methods]
    return "; ".join([*texts, *([f"`order` needed for {', '.join(shared)}"] if shared else [])])


def _effects(method: Method) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(method.effects.items()) if count)
