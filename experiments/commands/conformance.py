"""``seawall conformance``: every published method against an independent derivation."""

from __future__ import annotations

import argparse

__all__ = ["SUMMARY", "add_arguments", "command"]

SUMMARY = "compare every published method with an independent derivation"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--check", action="store_true", help="write nothing; fail when the table is not current")


def command(arguments: argparse.Namespace) -> int:
    """Compare, and keep the table; returns the exit code, 1 when one is off."""
    from experiments.author_commands import conformance_command

    return conformance_command(arguments)
