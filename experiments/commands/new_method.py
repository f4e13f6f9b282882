"""``seawall new-method``: begin a method from a template."""

from __future__ import annotations

import argparse

__all__ = ["SUMMARY", "add_arguments", "command"]

SUMMARY = "write the four files of a new method from a template"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("name", metavar="NAME", help="snake_case, not registered yet")
    parser.add_argument("--point", default="loss_term", help="contribution point to begin with (default: loss_term)")
    parser.add_argument("--folder", metavar="FOLDER", help="a checkout of this project (default: the one in use)")


def command(arguments: argparse.Namespace) -> int:
    """Write the files and say what is left to do; returns the exit code."""
    from experiments.author_commands import new_method_command

    return new_method_command(arguments)
