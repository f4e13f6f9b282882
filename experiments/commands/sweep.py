"""``seawall sweep``: search the settings of a recipe, by a W&B sweep file."""

from __future__ import annotations

import argparse
from typing import Any

from experiments.commands.output import add_settings, clean_stdout, known_names, print_json

__all__ = ["SUMMARY", "add_arguments", "command"]

SUMMARY = "search settings by a W&B sweep file: here through Optuna, or with W&B's agents"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("sweep", metavar="SWEEP", help="a W&B sweep file or the name of a sweep, e.g. weights")
    parser.add_argument("--print-wandb", action="store_true", help="print the commands of W&B's agents; run nothing")
    parser.add_argument("--dry-run", action="store_true", help="print the budget of every method; run nothing")
    parser.add_argument("--recipe", metavar="RECIPE", help="what is run (default: the recipe of the file's command)")
    goal = "metric:minimize or metric:maximize instead of the file's metric; repeatable, for several at once"
    parser.add_argument("--objective", action="append", default=[], metavar="GOAL", help=goal)
    trials = "trials of each method (default: run_cap divided by the methods, the whole grid, or 20)"
    parser.add_argument("--trials", type=int, metavar="N", help=trials)
    parser.add_argument("--sampler", metavar="NAME", help="grid, random or tpe (default: what the file's method says)")
    parser.add_argument("--storage", metavar="URL", help="database of the trials (default: SQLite beside the results)")
    parser.add_argument("--prune", action="store_true", help="end trials whose refusal margin falls behind in training")
    parser.add_argument("--full-grid", action="store_true", help="let every method have its whole grid, however large")
    parser.add_argument("--retry-lost", action="store_true", help="run again what other machines left running")
    parser.add_argument("--seed", type=int, default=0, help="of the sampler (default: 0)")
    add_settings(parser)


def command(arguments: argparse.Namespace) -> int:
    """Check the sweep, run what is missing of it, and show its trials; returns the exit code."""
    from pathlib import Path

    from rich.console import Console

    from experiments.sweep import SweepOptions, check_sweep, run_sweep, trial_config
    from experiments.sweep_files import agent_lines, load_sweep
    from framework.registry import validate_methods

    sweep = load_sweep(arguments.sweep, recipe=arguments.recipe, goals=[_goal(text) for text in arguments.objective])
    options = SweepOptions(
        trials=arguments.trials,
        sampler=arguments.sampler,
        storage=arguments.storage,
        prune=arguments.prune,
        full_grid=arguments.full_grid,
        retry_lost=arguments.retry_lost,
        seed=arguments.seed,
        overrides=tuple(arguments.overrides),
    )
    if arguments.print_wandb:
        print("\n".join(agent_lines(sweep)))
        return 0
    budgets = check_sweep(sweep, options, known=known_names(), validate_methods=validate_methods)
    if arguments.dry_run:
        _show_budgets(budgets, is_json=arguments.json)
        return 0
    output = trial_config(sweep, options, next(iter(budgets)), {}).output
    with clean_stdout(arguments.json):
        folder = Path(output) / "sweep" / sweep.name
        results = run_sweep(sweep, options, budgets=budgets, folder=folder, console=Console(stderr=True))
    if arguments.json:
        print_json(results)
    else:
        _show(results, Console())
    return 1 if any(trial["state"] == "fail" for one in results["methods"] for trial in one["trials"]) else 0


def _goal(text: str) -> Any:
    from experiments.sweep_files import SweepGoal
    from framework.errors import ConfigError

    name, _, goal = text.rpartition(":")
    if not name or goal not in ("minimize", "maximize"):
        raise ConfigError(f"Expected `--objective` to be metric:minimize or metric:maximize, but got {text!r}.")
    return SweepGoal(name, goal)  # type: ignore[arg-type]


def _show_budgets(budgets: dict[str | None, int], *, is_json: bool) -> None:
    if is_json:
        print_json([{"method": method, "trials": budget} for method, budget in budgets.items()])
        return
    for method, budget in budgets.items():
        print(f"{method or 'the recipe'}: {budget} trials")


def _show(results: dict[str, Any], console: Any) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    goals = [goal["name"] for goal in results["goals"]]
    for one in results["methods"]:
        title = f"{results['name']}: {one['method'] or 'the recipe'}, {len(one['trials'])} of {one['budget']} trials"
        table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
        for column in ("trial", "values", *goals, "state"):
            table.add_column(column, overflow="fold")
        for trial in one["trials"]:
            values = ", ".join(
                f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
                for key, value in trial["values"].items()
            )
            reached = [f"{trial['reached'][goal]:.4g}" if goal in trial["reached"] else "" for goal in goals]
            state = "best" if trial["is_best"] else trial["state"]
            table.add_row(str(trial["number"]), Text(values), *reached, state, style="bold" if trial["is_best"] else "")
        console.print(table)
    console.print(Text(f"Results: {results['folder']}"), soft_wrap=True)
