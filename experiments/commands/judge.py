"""``seawall judge``: the verdicts of several judges on any file of replies, or the judges against human labels."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from experiments.commands.output import clean_stdout, print_json
from framework.errors import ConfigError

__all__ = ["SUMMARY", "add_arguments", "command"]

SUMMARY = "judge a file of replies, or judges against human labels"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("replies", metavar="REPLIES", nargs="?", help="JSONL, JSON or CSV with prompts and replies")
    parser.add_argument("--validate", metavar="LABELS", help="compare the judges with the human labels of this file")
    parser.add_argument("--label", choices=("harmful", "refused"), default="harmful", help="what the labels mean")
    text = "comma-separated: rules, harm, guard:FORMAT:MODEL; may be given several times (default: rules,harm)"
    parser.add_argument("--judges", action="append", metavar="NAMES", help=text)
    parser.add_argument("--output", metavar="FILE", help="write every verdict, one JSON line per reply")
    parser.add_argument("--plot", metavar="FILE.svg", help="with --validate: draw the reliability of every judge")
    parser.add_argument("--no-cache", action="store_true", help="ask again about replies that were judged before")


def command(arguments: argparse.Namespace) -> int:
    """Judge the file and show rates and agreement; returns the exit code.

    Raises:
        ConfigError: both or none of replies and labels are given, or a plot of replies without labels is asked for.
    """
    from experiments.judge_command import DEFAULT_JUDGES, judge_labels, judge_replies, print_judged, split_names
    from experiments.run import artifact_store
    from framework.evaluation.verdict_cache import verdict_cache

    if (arguments.replies is None) == (arguments.validate is None):
        raise ConfigError(
            "Expected either REPLIES or `--validate LABELS`, but got " + ("both." if arguments.replies else "neither.")
        )
    if arguments.plot and not arguments.validate:
        raise ConfigError(
            "Expected `--plot` to come with `--validate`, but got it alone. It draws scores against labels."
        )
    judges = split_names(arguments.judges or [DEFAULT_JUDGES])
    output = Path(arguments.output) if arguments.output else None
    cache = None if arguments.no_cache else verdict_cache(artifact_store())
    with clean_stdout(arguments.json):
        if arguments.validate:
            plot = Path(arguments.plot) if arguments.plot else None
            results = judge_labels(
                Path(arguments.validate), judges=judges, label=arguments.label, output=output, plot=plot, cache=cache
            )
        else:
            results = judge_replies(Path(arguments.replies), judges=judges, output=output, cache=cache)
    if arguments.json:
        print_json(results)
    else:
        print_judged(results, Console())
    return 0
