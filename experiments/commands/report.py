"""``seawall report``: one page on runs or on a study, with its pictures and numbers as files."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.text import Text

from experiments.commands.output import clean_stdout, print_json

__all__ = ["SUMMARY", "add_arguments", "command"]

SUMMARY = "write a report on runs or on a study: one page, pictures, CSV and parquet"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    text = "run folders, files results.json, or the folder of a study's results"
    parser.add_argument("runs", nargs="+", metavar="RUNS", help=text)
    text = "the page; pictures and numbers are written beside it (default: report.html in the folder given)"
    parser.add_argument("--output", metavar="FILE.html", help=text)
    text = "label of the runs that the others are compared with (default: the study's, else plain training)"
    parser.add_argument("--reference", metavar="LABEL", help=text)
    parser.add_argument("--title", metavar="TEXT", help="of the page (default: the name of the study or run)")
    replies = parser.add_mutually_exclusive_group()
    text = "put harmful requests and the replies to them into the page (default: they are left out)"
    replies.add_argument("--with-replies", dest="show", action="store_const", const="all", help=text)
    text = "leave every reply out of the page and show verdicts alone"
    replies.add_argument("--without-replies", dest="show", action="store_const", const="none", help=text)
    parser.set_defaults(show="redacted")


def command(arguments: argparse.Namespace) -> int:
    """Collect the runs, write the report and say where it is; returns the exit code.

    Args:
        arguments: ``runs``, ``output``, ``reference``, ``title``, ``show`` and ``json``.
    """
    from experiments.report import write_report

    with clean_stdout(arguments.json):
        files = write_report(
            [Path(path) for path in arguments.runs],
            output=Path(arguments.output) if arguments.output else None,
            reference=arguments.reference,
            show=arguments.show,
            title=arguments.title,
        )
    if arguments.json:
        print_json(files._asdict())
    else:
        console = Console()
        console.print(Text(f"Report: {files.page}"), soft_wrap=True)
        console.print(Text(f"Numbers: {files.csv}, {files.parquet}"), soft_wrap=True)
        console.print(Text(f"Pictures: {files.page.parent / 'figures'} ({len(files.figures)} PNG)"), soft_wrap=True)
    return 0
