"""``seawall doctor``: is this machine ready."""

from __future__ import annotations

import argparse

from rich.console import Console

from experiments.commands.output import clean_stdout, print_json

__all__ = ["SUMMARY", "add_arguments", "command"]

SUMMARY = "check the environment, cache, model, disk and devices"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare no arguments of its own."""


def command(arguments: argparse.Namespace) -> int:
    """Show every check with its remedy; returns the exit code, 1 when one failed."""
    from experiments.console import doctor_table
    from experiments.doctor import diagnose

    with clean_stdout(arguments.json):
        checks = list(diagnose())
    if arguments.json:
        print_json([{key: getattr(c, key) for key in ("name", "status", "detail", "remedy")} for c in checks])
    else:
        Console().print(doctor_table(checks))
    return 1 if any(check.status == "fail" for check in checks) else 0
