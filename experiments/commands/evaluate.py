"""``seawall evaluate``: measure one model."""

from __future__ import annotations

import argparse
import functools

from experiments.commands.output import add_settings, distribute, known_names

__all__ = ["SUMMARY", "add_arguments", "command"]

SUMMARY = "measure a model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "model", metavar="MODEL", help="a folder, a GGUF file, a hub id, a known name, or URL#MODEL of an endpoint"
    )
    add_settings(parser)


def command(arguments: argparse.Namespace) -> int:
    """Measure the model and show the rates; returns the exit code."""
    from experiments.evaluate import evaluate_command
    from framework.config import load_evaluate_config
    from framework.endpoint_settings import is_endpoint

    load = load_evaluate_config
    if is_endpoint(arguments.model):
        from experiments.endpoint_measure import load_endpoint_config as load
    config = load(arguments.model, arguments.overrides, known=known_names())
    work = functools.partial(evaluate_command, arguments.model, config)
    return distribute(arguments, config.trainer, lambda console: work(console=console))
