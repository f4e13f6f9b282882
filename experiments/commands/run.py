"""``seawall run``: the stages of a recipe and the measurements."""

from __future__ import annotations

import argparse

from experiments.commands.output import add_settings, distribute, known_names

__all__ = ["SUMMARY", "add_arguments", "command"]

SUMMARY = "run the stages of a recipe and measure the model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file or the name of a recipe, e.g. quickstart")
    add_settings(parser)


def command(arguments: argparse.Namespace) -> int:
    """Check everything, run the recipe and show its results; returns the exit code."""
    from experiments.launch import check_methods
    from experiments.run import run_recipe
    from framework.config import load_run_config
    from framework.registry import validate_methods

    config = load_run_config(
        arguments.recipe, arguments.overrides, known=known_names(), validate_methods=validate_methods
    )
    check_methods(config)
    return distribute(arguments, config.trainer, lambda console: run_recipe(config, console=console))
