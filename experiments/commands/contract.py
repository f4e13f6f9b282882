"""``seawall contract``: does a method keep its promises."""

from __future__ import annotations

import argparse

from rich.console import Console

from experiments.commands.output import clean_stdout, print_json

__all__ = ["SUMMARY", "add_arguments", "command"]

SUMMARY = "check on tiny models that a method keeps its promises"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("method", nargs="?", metavar="METHOD", help="a registered method, of an installed package too")
    parser.add_argument("--clause", action="append", default=[], metavar="NAME", help="only this clause; repeatable")
    parser.add_argument("--pairs", action="store_true", help="try every pair of methods, or of METHOD with the others")
    parser.add_argument("--full", action="store_true", help="with --pairs: all clauses on one pair of every kind")


def command(arguments: argparse.Namespace) -> int:
    """Check the clauses and show what held; returns the exit code, 1 when one failed."""
    from experiments.contract.command import contract_command

    console = Console(stderr=True)
    with clean_stdout(arguments.json), console.status("contract") as status:
        found = contract_command(
            arguments.method,
            clauses=arguments.clause,
            pairs=arguments.pairs,
            full=arguments.full,
            progress=lambda name, number, total: status.update(f"{name} ({number + 1} of {total})"),
        )
    if arguments.json:
        print_json(found.document)
    else:
        Console().print(*found.tables)
    return 0 if found.is_kept else 1
