"""``seawall run``: the stages of a recipe and the measurements."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from experiments.commands.output import add_settings, distribute, known_names, say_page

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["SUMMARY", "add_arguments", "command"]

SUMMARY = "run the stages of a recipe and measure the model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file or the name of a recipe, e.g. quickstart")
    add_settings(parser)


def command(arguments: argparse.Namespace) -> int:
    """Check everything, run the recipe and show its results; returns the exit code."""
    from experiments.launch import check_methods
    from experiments.presentation import present_run
    from experiments.run import run_recipe
    from framework.config import load_run_config
    from framework.processes import on_main
    from framework.registry import validate_methods

    config = load_run_config(
        arguments.recipe, arguments.overrides, known=known_names(), validate_methods=validate_methods
    )
    check_methods(config)

    def work(console: Console) -> dict[str, Any]:
        results = run_recipe(config, console=console)
        on_main(lambda: say_page(console, present_run(results)))
        return results

    return distribute(arguments, config.trainer, work)
