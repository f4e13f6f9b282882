"""``seawall compare``: a grid of runs and their table."""

from __future__ import annotations

import argparse

from experiments.commands.output import add_settings, distribute, known_names

__all__ = ["SUMMARY", "add_arguments", "command"]

SUMMARY = "run the grid of a study, one run after another, and compare"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("study", metavar="STUDY", help="a YAML file or the name of a study, e.g. quickstart")
    add_settings(parser)


def command(arguments: argparse.Namespace) -> int:
    """Check every run of the grid, run what is missing and show the table; returns the exit code."""
    from experiments.compare import compare_study
    from framework.registry import validate_methods
    from framework.study import load_study_config, study_cells

    study = load_study_config(arguments.study, arguments.overrides)
    cells = study_cells(study, known=known_names(), validate_methods=validate_methods)
    trainer = cells[0].config.trainer
    return distribute(arguments, trainer, lambda console: compare_study(study, console=console))
