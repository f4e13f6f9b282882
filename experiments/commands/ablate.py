"""``seawall ablate``: what each part of a run's methods is worth."""

from __future__ import annotations

import argparse

from experiments.commands.compare import add_execution, execute
from experiments.commands.output import add_settings, known_names

__all__ = ["SUMMARY", "add_arguments", "command"]

SUMMARY = "change each component and setting of a run's methods alone, leave each method out, and compare"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("recipe", metavar="RUN", help="a YAML file or the name of a recipe whose methods are ablated")
    seeds = "comma-separated (default: the run's own; verdicts need three)"
    parser.add_argument("--seeds", default="", metavar="LIST", help=seeds)
    only = "comma-separated methods or settings, e.g. asft or asft.weight (default: all)"
    parser.add_argument("--only", default="", metavar="LIST", help=only)
    add_execution(parser)
    add_settings(parser)


def command(arguments: argparse.Namespace) -> int:
    """Derive the ablations, say what is left out, and run them as a study; returns the exit code."""
    from rich.console import Console
    from rich.text import Text

    from experiments.ablation import ablation_study
    from framework.config import load_run_config
    from framework.errors import ConfigError
    from framework.registry import validate_methods
    from framework.study import study_cells

    config = load_run_config(
        arguments.recipe, arguments.overrides, known=known_names(), validate_methods=validate_methods
    )
    texts = [text.strip() for text in arguments.seeds.split(",") if text.strip()]
    if not all(text.isdigit() for text in texts):
        raise ConfigError(f"Expected `--seeds` to be whole numbers ≥ 0 with commas, but got {arguments.seeds!r}.")
    only = [text.strip() for text in arguments.only.split(",") if text.strip()]
    study, left_out = ablation_study(config, seeds=[int(text) for text in texts], only=only)
    console = Console(stderr=True)
    for name, reason in left_out.items():
        console.print(Text(f"not changed: {name}: {reason}", style="dim"), soft_wrap=True)
    return execute(arguments, study, study_cells(study, known=known_names(), validate_methods=validate_methods))
