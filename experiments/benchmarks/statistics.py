"""What the statistics promise, checked by simulation: coverage of intervals, false winners, p-values.

Run: ``python -m experiments.benchmarks.statistics [--rounds 400] [--seed 0] [--output FILE]``. Replies are drawn as in
studies: every prompt has a difficulty of its own, every seed of a method shifts all of them, and methods are equal
where nothing else is said.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from experiments.statistics import (
    compare_pair,
    decide,
    holm,
    mark_winner,
    mcnemar_exact,
    seed_interval,
    seed_p_value,
    wilson_interval,
)
from framework.files import write_atomic, write_json

__all__ = ["Figure", "main", "measure_figures"]

RATES = np.linspace(0.02, 0.98, 49)
SPREADS = (0.0, 0.02, 0.05, 0.1)
"""Standard deviations of the rate over seeds."""
PROMPTS = 80
EQUAL = ((2, 3, 0.0), (2, 3, 0.05), (2, 3, 0.1), (4, 3, 0.05), (4, 5, 0.1), (2, 10, 0.05))
"""Methods, seeds and spread of the studies in which nobody should win."""


class Figure(NamedTuple):
    """One simulated number and what it has to be."""

    name: str
    value: float
    wanted: str
    is_reached: bool


def measure_figures(*, rounds: int = 400, seed: int = 0) -> list[Figure]:
    """Return every figure.

    Args:
        rounds: simulated studies of each kind.
        seed: of the draws.
    """
    draw = np.random.default_rng(seed)
    found = [_wilson(draw, rounds, count) for count in (40, 80, 200)]
    found += [_seed_coverage(draw, rounds, 3, with_floor=with_floor) for with_floor in (True, False)]
    found.append(_seed_coverage(draw, rounds, 5, with_floor=True))
    wins = {kind: _false_winners(draw, rounds, *kind) for kind in EQUAL}
    for (methods, seeds, spread), share in wins.items():
        name = f"{methods} equal methods, {seeds} seeds, spread {spread:g}: false winners (%)"
        found.append(Figure(name, 100 * share, "see below", True))
    taste = _false_winners(draw, rounds, 2, 3, 0.05, taste=0.3)
    name = "2 equal methods, 3 seeds, spread 0.05, each better on prompts of its own: false winners (%)"
    found.append(Figure(name, 100 * taste, "≤ 5", taste <= 0.05))
    share = float(np.mean(list(wins.values())))
    found.append(Figure("equal methods, all kinds: false winners (%)", 100 * share, "≤ 5", share <= 0.05))
    found += [_false_verdicts(draw, rounds), _power(draw, rounds, 3), _power(draw, rounds, 5)]
    return [*found, *_p_values(draw)]


def draw_outcomes(
    draw: np.random.Generator, difficulties: NDArray[Any], *, seeds: int, spread: float, shift: float = 0.0
) -> NDArray[Any]:
    """Return outcomes ``(seeds, prompts)`` of one method.

    Args:
        draw: source of randomness.
        difficulties: chance of each prompt, ``(prompts,)``.
        seeds: of the method.
        spread: standard deviation of the shift of a seed.
        shift: of the method.
    """
    chances = np.clip(difficulties + shift + draw.normal(0, spread, size=(seeds, 1)), 0, 1)
    return (draw.random(chances.shape) < chances).astype(float)


def _wilson(draw: np.random.Generator, rounds: int, count: int) -> Figure:
    covered = []
    bounds = [wilson_interval(hits, count) for hits in range(count + 1)]
    for rate in RATES:
        hits = draw.binomial(count, rate, size=20 * rounds)
        covered.append(np.mean([bounds[hit].low <= rate <= bounds[hit].high for hit in hits]))
    value = 100 * float(np.mean(covered))
    return Figure(
        f"Wilson, {count} prompts: coverage over rates 0.02 to 0.98 (%)", value, "95 ± 1.5", abs(value - 95) <= 1.5
    )


def _seed_coverage(draw: np.random.Generator, rounds: int, seeds: int, *, with_floor: bool) -> Figure:
    """Rates are drawn around a mean as in training; the truth is the mean over infinitely many seeds."""
    covered = []
    for spread in SPREADS:
        for rate in RATES:
            truth = float(np.clip(rate + draw.normal(0, spread, size=20_000), 0, 1).mean())
            for _ in range(max(1, rounds // 20)):
                chances = np.clip(rate + draw.normal(0, spread, size=seeds), 0, 1)
                hits = draw.binomial(PROMPTS, chances)
                floor = wilson_interval(int(hits.sum()), seeds * PROMPTS) if with_floor else None
                found = seed_interval(list(hits / PROMPTS), floor=floor)
                covered.append(found is not None and found.low <= truth <= found.high)
    value = 100 * float(np.mean(covered))
    kind = "not inside the Wilson interval" if with_floor else "t interval alone"
    wanted, reached = ("≥ 93", value >= 93) if with_floor else ("for comparison", True)
    return Figure(f"interval over {seeds} seeds, {kind}: coverage (%)", value, wanted, reached)


def _false_winners(
    draw: np.random.Generator, rounds: int, methods: int, seeds: int, spread: float, *, taste: float = 0.0
) -> float:
    """Return the share of rounds with a winner; ``taste`` is how far a prompt's chance differs between methods."""
    wins = 0
    for _ in range(rounds):
        difficulties = draw.beta(0.7, 0.7, size=PROMPTS)
        tables = {
            str(number): draw_outcomes(
                draw, difficulties + draw.normal(0, taste, size=PROMPTS), seeds=seeds, spread=spread
            )
            for number in range(methods)
        }
        wins += mark_winner(tables, higher_is_better=True) is not None
    return wins / rounds


def _false_verdicts(draw: np.random.Generator, rounds: int) -> Figure:
    """Any of three methods called better or worse than an equal baseline."""
    wrong = 0
    for _ in range(rounds):
        difficulties = draw.beta(0.7, 0.7, size=PROMPTS)
        base, *others = (draw_outcomes(draw, difficulties, seeds=3, spread=0.05) for _ in range(4))
        found = [compare_pair(base, other, resamples=2) for other in others]
        corrected = holm([one.p_value if one.p_value is not None else 1.0 for one in found])
        verdicts = [decide(p, one.difference, higher_is_better=True) for p, one in zip(corrected, found, strict=True)]
        wrong += any(verdict != "unclear" for verdict in verdicts)
    return Figure(
        "3 methods equal to the baseline, 3 seeds: any verdict (%)", 100 * wrong / rounds, "≤ 5", wrong / rounds <= 0.05
    )


def _power(draw: np.random.Generator, rounds: int, seeds: int) -> Figure:
    wins = 0
    for _ in range(rounds):
        difficulties = draw.beta(2, 2, size=PROMPTS)
        tables = {
            "worse": draw_outcomes(draw, difficulties, seeds=seeds, spread=0.02),
            "better": draw_outcomes(draw, difficulties, seeds=seeds, spread=0.02, shift=0.2),
        }
        wins += mark_winner(tables, higher_is_better=True) == "better"
    return Figure(
        f"20 points better, {seeds} seeds, spread 0.02: winner (%)", 100 * wins / rounds, "for comparison", True
    )


def _p_values(draw: np.random.Generator) -> list[Figure]:
    """Return the largest differences from statsmodels and scipy on random cases."""
    from statsmodels.stats.contingency_tables import mcnemar
    from statsmodels.stats.multitest import multipletests
    from statsmodels.stats.proportion import proportion_confint

    worst = dict.fromkeys(("McNemar", "Holm", "paired t", "Wilson"), 0.0)
    for _ in range(100):
        first, second = (draw.random(60) < rate for rate in draw.random(2))
        table = [[int(((first == a) & (second == b)).sum()) for b in (True, False)] for a in (True, False)]
        worst["McNemar"] = max(
            worst["McNemar"], abs(mcnemar_exact(first, second).p_value - mcnemar(table, exact=True).pvalue)
        )
        means = draw.random((2, 5))
        expected = stats.ttest_rel(means[0], means[1]).pvalue
        worst["paired t"] = max(
            worst["paired t"], abs((seed_p_value(list(means[0]), list(means[1])) or 0.0) - expected)
        )
        hits, total = int(first.sum()), first.size
        bounds = np.subtract(wilson_interval(hits, total), proportion_confint(hits, total, method="wilson"))
        worst["Wilson"] = max(worst["Wilson"], float(np.abs(bounds).max()))
    for _ in range(10):  # each call collects garbage
        p_values = draw.random(6)
        gaps = np.subtract(holm(list(p_values)), multipletests(p_values, method="holm")[1])
        worst["Holm"] = max(worst["Holm"], float(np.abs(gaps).max()))
    return [
        Figure(f"{name}: difference from statsmodels or scipy", gap, "≤ 1e-12", gap <= 1e-12)
        for name, gap in worst.items()
    ]


def figure_table(figures: Sequence[Figure]) -> str:
    """Return the figures as a markdown table."""
    rows = [f"| {one.name} | {one.value:.3g} | {one.wanted} | {'yes' if one.is_reached else 'NO'} |" for one in figures]
    return "| figure | simulated | wanted | reached |\n| --- | ---: | ---: | --- |\n" + "\n".join(rows) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0 when every figure is reached."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--rounds", type=int, default=400, help="simulated studies of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="write <output>.json and <output>.md")
    given = parser.parse_args(arguments)
    figures = measure_figures(rounds=given.rounds, seed=given.seed)
    table = figure_table(figures)
    print(table)
    if given.output:
        record = {"rounds": given.rounds, "seed": given.seed, "figures": [one._asdict() for one in figures]}
        write_json(given.output.with_suffix(".json"), record)
        write_atomic(given.output.with_suffix(".md"), f"# Statistics, simulated\n\n{table}")
    return 0 if all(one.is_reached for one in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
