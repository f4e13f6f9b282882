"""``seawall mine``: the mining of a recipe, on its own."""

from __future__ import annotations

import argparse

from rich.console import Console

from experiments.commands.output import add_settings, clean_stdout, known_names, print_json

__all__ = ["SUMMARY", "add_arguments", "command"]

SUMMARY = "find the prompts a model sometimes fails, and its own safe replies to them"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("recipe", metavar="RECIPE", help="a recipe with the method smh, e.g. smh_align")
    add_settings(parser)


def command(arguments: argparse.Namespace) -> int:
    """Mine, and show which prompts are chosen and how often they break the model; returns the exit code."""
    from experiments.launch import check_methods
    from experiments.mining import mine_recipe, mining_lines, mining_table
    from framework.config import load_run_config
    from framework.registry import validate_methods

    config = load_run_config(
        arguments.recipe, arguments.overrides, known=known_names(), validate_methods=validate_methods
    )
    check_methods(config)
    with clean_stdout(arguments.json):
        results = mine_recipe(config, console=Console(stderr=True))
    if arguments.json:
        print_json(results)
        return 0
    console = Console()
    console.print(mining_table(results))
    for line in mining_lines(results):
        console.print(line, highlight=False)
    return 0
