"""``seawall evaluate``: measure one model."""

from __future__ import annotations

import argparse
import functools

from experiments.commands.output import add_settings, distribute, known_names

__all__ = ["SUMMARY", "add_arguments", "command"]

SUMMARY = "measure a model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("model", metavar="MODEL", help="a folder, a GGUF file, a hub id or a known name")
    add_settings(parser)


def command(arguments: argparse.Namespace) -> int:
    """Measure the model and show the rates; returns the exit code."""
    from experiments.evaluate import evaluate_command
    from framework.config import load_evaluate_config

    config = load_evaluate_config(arguments.model, arguments.overrides, known=known_names())
    work = functools.partial(evaluate_command, arguments.model, config)
    return distribute(arguments, config.trainer, lambda console: work(console=console))
