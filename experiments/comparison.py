"""The compared table: methods side by side on the same prompts, with intervals, p-values and marks.

Runs are compared within a *group*: the same model, task and harmful share. Every difference is paired by prompt and
seed. With fewer than three seeds a group has neither an interval over seeds nor a verdict nor a winner, and says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.measured_runs import RATES, RunSamples, find_outcomes, prompt_key, read_run
from experiments.measured_runs import higher_is_better as is_better_higher
from experiments.power import detectable_seed_difference
from experiments.statistics import (
    MIN_SEEDS,
    Comparison,
    compare_pair,
    decide,
    holm,
    mark_winner,
    pooled_interval,
    seed_interval,
    seed_p_value,
    wilson_interval,
)
from experiments.tradeoff import analyse_tradeoff
from framework.errors import DataError

__all__ = ["FEW_SEEDS", "RunSamples", "compare_runs", "find_outcomes", "flipped", "read_run"]

FEW_SEEDS = f"fewer than {MIN_SEEDS} seeds: no seed-level interval and no winner"
FEW_PROMPTS = 100
COSTS = (
    "prepare_seconds",
    "train_seconds",
    "evaluate_seconds",
    "peak_memory_mib",
    "tokens_per_second",
    "trainable_parameters",
)
Methods = Mapping[str, Mapping[int, RunSamples]]
"""Label to seed to run."""


def compare_runs(runs: Sequence[RunSamples], *, reference: str, with_hierarchical: bool = True) -> list[dict[str, Any]]:
    """Return one table per model, task and harmful share.

    Args:
        runs: finished ones; several of a label are its seeds.
        reference: label the others are compared with.
        with_hierarchical: whether differences get the bootstrap over seeds and prompts too.

    Returns:
        Plain values: ``model``, ``task``, ``share``, ``reference``, ``seeds``, ``methods``, ``tradeoff``, ``notes``. A
        method has ``label``, ``is_reference``, ``seeds``, ``num_runs``, ``metrics`` and ``cost``; a metric ``value``,
        ``numerator``, ``denominator``, ``low`` and ``high`` (``pooled_interval``), ``seed_low`` and ``seed_high``,
        ``difference`` (a ``Comparison`` with ``adjusted_p``, ``adjusted_mcnemar_p`` and ``verdict``) and ``is_winner``.

    Raises:
        DataError: no runs, a label twice with one seed, or a group without the reference.
    """
    if not runs:
        raise DataError("Expected `runs` to be one or more finished runs, but got none.")
    groups: dict[tuple[str, str, float], list[RunSamples]] = {}
    for run in runs:
        groups.setdefault((run.model, run.task or "", run.share), []).append(run)
    return [_compare_group(group, reference, with_hierarchical=with_hierarchical) for group in groups.values()]


def flipped(first: RunSamples, second: RunSamples, rate: str) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Return the pairs of samples on which two runs' outcomes differ, in the order of the first run.

    Raises:
        DataError: a run whose replies were not read, or that has no such rate.
    """
    for run in (first, second):
        if not run.samples:
            raise DataError(f"Expected the replies of run {run.name!r}, but got none. Give its folder.")
        if rate not in run.outcomes:
            raise DataError(f"Expected run {run.name!r} to have the rate {rate!r}, but got {sorted(run.outcomes)}.")
    others = {prompt_key(sample): sample for sample in second.samples}
    before, after = first.outcomes[rate], second.outcomes[rate]
    return [
        (sample, others[key])
        for sample in first.samples
        if (key := prompt_key(sample)) in before and key in after and before[key] != after[key]
    ]


def _compare_group(runs: Sequence[RunSamples], reference: str, *, with_hierarchical: bool) -> dict[str, Any]:
    methods = _by_label(runs)
    if reference not in methods:
        raise DataError(f"Expected the reference {reference!r} among the runs, but got {sorted(methods)}.")
    notes: list[str] = []
    rates = {rate: _outcome_table(methods, rate, notes) for rate in _rates(runs)}
    rows = {label: _method_row(label, seeds, reference) for label, seeds in methods.items()}
    for rate, table in rates.items():
        if table:
            _add_rate(rows, rate, table, reference, with_hierarchical=with_hierarchical)
    _add_means(rows, methods, reference)
    seeds = sorted({seed for found in methods.values() for seed in found})
    if any(len(found) < MIN_SEEDS for found in methods.values()):
        notes.append(FEW_SEEDS)
    sizes = {rate: next(iter(table.values())).prompts for rate, table in rates.items() if table}
    few = [f"{rate} ({count})" for rate, count in sizes.items() if count < FEW_PROMPTS]
    if few:
        notes.append(f"fewer than {FEW_PROMPTS} prompts, so small differences cannot be seen: {', '.join(few)}")
    if not any(rates.values()):
        notes.append("the replies of these runs are gone: no paired tests")
    first = runs[0]
    return {
        "model": first.model,
        "task": first.task,
        "share": first.share,
        "reference": reference,
        "seeds": seeds,
        "methods": list(rows.values()),
        "tradeoff": _tradeoff(rows, reference),
        "notes": notes,
    }


class _Outcomes:
    """One method's outcomes of one rate: seeds in order, prompts in the group's order."""

    def __init__(self, tables: Mapping[int, Mapping[str, bool]], keys: Sequence[str]) -> None:
        self.seeds = sorted(tables)
        self.values: NDArray[Any] = np.array([[tables[seed][key] for key in keys] for seed in self.seeds], dtype=float)
        self.prompts = len(keys)

    def rows(self, seeds: Sequence[int]) -> NDArray[Any]:
        """Return ``(seeds, prompts)`` of the given seeds."""
        return self.values[[self.seeds.index(seed) for seed in seeds]]


def _rates(runs: Sequence[RunSamples]) -> list[str]:
    """Return the plain rates and those under attack that any run has."""
    return list(dict.fromkeys([*RATES, *(rate for run in runs for rate in run.outcomes)]))


def _by_label(runs: Sequence[RunSamples]) -> dict[str, dict[int, RunSamples]]:
    found: dict[str, dict[int, RunSamples]] = {}
    for run in runs:
        seeds = found.setdefault(run.label, {})
        if run.seed in seeds:
            raise DataError(
                f"Expected one run of {run.label!r} with seed {run.seed}, but got {seeds[run.seed].name!r} and "
                f"{run.name!r}."
            )
        seeds[run.seed] = run
    return found


def _outcome_table(methods: Methods, rate: str, notes: list[str]) -> dict[str, _Outcomes]:
    """Return label to outcomes on the prompts that every run answered; empty where some method has none."""
    tables = {
        label: {seed: run.outcomes.get(rate, {}) for seed, run in seeds.items()} for label, seeds in methods.items()
    }
    every = [table for seeds in tables.values() for table in seeds.values()]
    common = [key for key in every[0] if all(key in table for table in every)]
    if not common:
        if any(every):
            notes.append(f"{rate} is not paired: no prompt has an outcome in every run")
        return {}
    dropped = len({key for table in every for key in table}) - len(common)
    if dropped:
        notes.append(f"{rate} leaves out {dropped} prompts that have no outcome in some run")
    return {label: _Outcomes(seeds, common) for label, seeds in tables.items()}


def _method_row(label: str, seeds: Mapping[int, RunSamples], reference: str) -> dict[str, Any]:
    costs = {
        key: float(np.mean(known))
        for key in COSTS
        if (
            known := [
                run.row["cost"][key] for run in seeds.values() if (run.row.get("cost") or {}).get(key) is not None
            ]
        )
    }
    return {
        "label": label,
        "is_reference": label == reference,
        "seeds": sorted(seeds),
        "num_runs": len(seeds),
        "metrics": {},
        "cost": costs,
    }


def _add_rate(
    rows: Mapping[str, dict[str, Any]],
    rate: str,
    table: Mapping[str, _Outcomes],
    reference: str,
    *,
    with_hierarchical: bool,
) -> None:
    """Put value, intervals, differences, verdicts and the winner of one rate into the rows."""
    base, compared = table[reference], {}
    for label, found in table.items():
        rows[label]["metrics"][rate] = _rate_cell(found)
        common = [seed for seed in found.seeds if seed in base.seeds]
        if label != reference and common:
            pair = base.rows(common), found.rows(common)
            compared[label] = compare_pair(*pair, with_hierarchical=with_hierarchical)
    for label, cell in _corrected(compared, higher_is_better=is_better_higher(rate)).items():
        rows[label]["metrics"][rate]["difference"] = cell
    shared = [seed for seed in base.seeds if all(seed in found.seeds for found in table.values())]
    if len(shared) >= MIN_SEEDS and len(table) > 1:
        winner = mark_winner(
            {label: found.rows(shared) for label, found in table.items()}, higher_is_better=is_better_higher(rate)
        )
        if winner is not None:
            rows[winner]["metrics"][rate]["is_winner"] = True


def _rate_cell(found: _Outcomes) -> dict[str, Any]:
    hits, total = int(found.values.sum()), int(found.values.size)
    low, high = pooled = pooled_interval(found.values)
    over_seeds = seed_interval(list(found.values.mean(axis=1)), floor=pooled)
    return {
        "value": hits / total,
        "numerator": hits,
        "denominator": total,
        "low": low,
        "high": high,
        "seed_low": over_seeds.low if over_seeds else None,
        "seed_high": over_seeds.high if over_seeds else None,
        "difference": None,
        "is_winner": False,
    }


def _corrected(compared: Mapping[str, Comparison], *, higher_is_better: bool) -> dict[str, dict[str, Any]]:
    """Return the comparisons as plain values with p-values corrected over the methods, and verdicts."""
    if not compared:
        return {}
    prompts = dict(zip(compared, holm([found.mcnemar_p for found in compared.values()]), strict=True))
    known = {label: found.p_value for label, found in compared.items() if found.p_value is not None}
    decisive = dict(zip(known, holm(list(known.values())), strict=True)) if known else {}
    return {
        label: {
            **asdict(found),
            "adjusted_mcnemar_p": prompts[label],
            "adjusted_p": decisive.get(label),
            "verdict": decide(decisive.get(label), found.difference, higher_is_better=higher_is_better),
        }
        for label, found in compared.items()
    }


def _add_means(rows: Mapping[str, dict[str, Any]], methods: Methods, reference: str) -> None:
    """Put what is no rate of single prompts (likelihoods, margins, rates whose replies are gone) into the rows."""
    for label, seeds in methods.items():
        keys = dict.fromkeys(key for run in seeds.values() for key in run.row["metrics"])
        for key in keys:
            if key not in rows[label]["metrics"] and (values := _values(seeds, key)):
                base = _values(methods[reference], key) if label != reference else {}
                rows[label]["metrics"][key] = _mean_cell(values, seeds, key, base)


def _values(seeds: Mapping[int, RunSamples], key: str) -> dict[int, float]:
    found = {seed: run.row["metrics"].get(key) for seed, run in seeds.items()}
    return {
        seed: float(metric["value"])
        for seed, metric in found.items()
        if isinstance(metric, Mapping) and isinstance(metric.get("value"), (int, float))
    }


def _mean_cell(
    values: Mapping[int, float], seeds: Mapping[int, RunSamples], key: str, base: Mapping[int, float]
) -> dict[str, Any]:
    over_seeds = seed_interval(list(values.values()))
    single = next(iter(seeds.values())).row["metrics"][key] if len(values) == 1 and len(seeds) == 1 else {}
    shared = [seed for seed in values if seed in base]
    differences = [values[seed] - base[seed] for seed in shared]
    spread = seed_interval(differences)
    counts = [run.row["metrics"].get(key, {}) for run in seeds.values()]
    total: dict[str, Any] = {}
    if all(metric.get("numerator") is not None and metric.get("denominator") for metric in counts):
        hits, size = (int(sum(metric[part] for metric in counts)) for part in ("numerator", "denominator"))
        total = {"numerator": hits, "denominator": size, **wilson_interval(hits, size)._asdict()}
    return {
        "value": float(np.mean(list(values.values()))),
        "low": single.get("low"),
        "high": single.get("high"),
        **total,
        "seed_low": over_seeds.low if over_seeds else None,
        "seed_high": over_seeds.high if over_seeds else None,
        "seed_difference": {
            "difference": float(np.mean(differences)),
            "seed_low": spread.low if spread else None,
            "seed_high": spread.high if spread else None,
            "seed_p": seed_p_value([base[seed] for seed in shared], [values[seed] for seed in shared]),
            "detectable": detectable_seed_difference(differences),
        }
        if shared
        else None,
        "difference": None,
        "is_winner": False,
    }


def _fit_seconds(cost: Mapping[str, float]) -> dict[str, float | None]:
    """Return the time of the last stage: what a method mines, probes or caches before its first step counts too."""
    if "train_seconds" not in cost:
        return {}
    return {"cost/fit_seconds": cost["train_seconds"] + cost.get("prepare_seconds", 0.0)}


def _tradeoff(rows: Mapping[str, dict[str, Any]], reference: str) -> dict[str, Any]:
    values: dict[str, dict[str, float | None]] = {
        label: {
            **{key: metric["value"] for key, metric in row["metrics"].items()},
            **{f"cost/{key}": value for key, value in row["cost"].items()},
            **_fit_seconds(row["cost"]),
        }
        for label, row in rows.items()
    }
    found = analyse_tradeoff(values, reference=reference)
    return {
        "objectives": [objective._asdict() for objective in found.objectives],
        "hypervolume": found.hypervolume,
        "points": [{**asdict(point), "is_dominated": point.is_dominated} for point in found.points],
        "left_out": found.left_out,
    }
