"""``seawall attack``: the attacks of a suite on one model."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from experiments.commands.output import add_settings, clean_stdout, print_json
from framework.errors import ConfigError

__all__ = ["SUMMARY", "add_arguments", "command"]

SUMMARY = "attack a model with a suite of attacks"
SUITES = sorted(file.stem for file in (Path(__file__).parents[1] / "configs" / "attack").glob("*.yaml"))
"""Those that come with the project; read here because the settings' module takes long to import."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="a folder, a GGUF file, a hub id, a known name, or URL#MODEL of an endpoint",
    )
    parser.add_argument(
        "suite",
        nargs="?",
        metavar="SUITE.yaml",
        help=f"a file, or a suite that comes with the project: {', '.join(SUITES)}",
    )
    parser.add_argument(
        "--compare",
        nargs="+",
        metavar="FILE",
        help="attack.json of several models, or their folders, also as LABEL=FILE; runs nothing",
    )
    parser.add_argument("--baseline", metavar="LABEL", help="with --compare: the undefended model (default: the first)")
    parser.add_argument("--floor", type=float, help="with --compare: share of the utility an attacked model must keep")
    parser.add_argument("--output", metavar="FOLDER", help="with --compare: write table, JSON and pictures here")
    parser.add_argument("--dry-run", action="store_true", help="show attacks, budgets and estimated time; run nothing")
    parser.add_argument(
        "--examples", type=int, default=0, metavar="N", help="show N successes of each attack, redacted"
    )
    parser.add_argument("--unredacted", action="store_true", help="show the texts of --examples")
    add_settings(parser)


def command(arguments: argparse.Namespace) -> int:
    """Run the suite, or compare what it reached on several models; returns the exit code.

    Args:
        arguments: those of ``add_arguments`` and ``json``.

    Raises:
        ConfigError: no model and suite to attack, or both them and files to compare.
    """
    if arguments.compare:
        return _compare(arguments)
    for name in ("baseline", "floor", "output"):
        if getattr(arguments, name) is not None:
            raise ConfigError(f"Expected `--{name}` to come with `--compare`, but got it without. Add the files.")
    if arguments.model is None or arguments.suite is None:
        raise ConfigError(
            "Expected a model and a suite, but got neither or one. Write `seawall attack MODEL small`, or "
            "`seawall attack --compare FILE FILE`."
        )
    from experiments.attacks.runner import attack_model, plan_suite, prepare_suite
    from experiments.attacks.view import print_examples, print_plan, print_suite

    with clean_stdout(arguments.json):
        prepared = prepare_suite(arguments.model, arguments.suite, arguments.overrides)
        if arguments.dry_run:
            found = plan_suite(prepared)
        else:
            found = attack_model(prepared, console=Console(stderr=arguments.json), verbose=arguments.verbose)
    console = Console()
    if arguments.json:
        print_json(found)
    elif arguments.dry_run:
        print_plan(found, console)
    else:
        print_suite(found, console)
        print_examples(found, arguments.examples, console, is_redacted=not arguments.unredacted)
        console.print(f"Results: {found['folder']}", soft_wrap=True, highlight=False, markup=False)
    return 1 if found.get("failed") else 0


def _compare(arguments: argparse.Namespace) -> int:
    if arguments.model is not None:
        raise ConfigError(
            f"Expected `--compare` to come without a model to attack, but got {arguments.model!r}. Write the files "
            "right behind it."
        )
    from experiments.attacks.compare import compare_attacks, comparison_markdown, write_comparison

    found = compare_attacks(arguments.compare, baseline=arguments.baseline, floor=arguments.floor)
    if arguments.json:
        print_json(found.to_dict())
    else:
        Console().print(comparison_markdown(found), soft_wrap=True, highlight=False, markup=False)
    for path in write_comparison(found, Path(arguments.output)) if arguments.output else ():
        Console(stderr=True).print(f"written: {path}", soft_wrap=True, highlight=False, markup=False)
    return 0
