"""``seawall methods``: the table of the registry."""

from __future__ import annotations

import argparse

from rich.console import Console

from experiments.commands.output import print_json

__all__ = ["SUMMARY", "add_arguments", "command"]

SUMMARY = "list the methods"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare no arguments of its own."""


def command(arguments: argparse.Namespace) -> int:
    """Show every registered method; returns the exit code."""
    from experiments.console import methods_table
    from framework.registry import known_methods

    methods = known_methods()
    if arguments.json:
        print_json(
            [
                {"name": m.name, "summary": m.summary, "points": list(m.points), "supports": list(m.supports)}
                for m in methods.values()
            ]
        )
    else:
        Console().print(methods_table(methods))
    return 0
