"""What the commands share: results as JSON on a clean standard output, and work on one or several processes."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

__all__ = ["add_settings", "clean_stdout", "distribute", "known_names", "print_json", "say_page", "show_results"]


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Let the command take settings of a recipe, written ``key=value``."""
    text = "settings, e.g. seed=1 model=NAME stages.align=null"
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=text)
    parser.set_defaults(takes_settings=True)


@contextlib.contextmanager
def clean_stdout(is_json: bool) -> Iterator[None]:
    """Send what libraries print to the error stream, so that the standard output stays one JSON document."""
    if not is_json:
        yield
        return
    with contextlib.redirect_stdout(sys.stderr):
        yield


def print_json(value: Any) -> None:
    """Print a value as one indented JSON document."""
    from framework.files import to_plain

    print(json.dumps(to_plain(value), indent=2, ensure_ascii=False, allow_nan=False))


def distribute(arguments: argparse.Namespace, trainer: Any, work: Callable[[Console], dict[str, Any]]) -> int:
    """Do the work on as many processes as the settings ask for; the first one shows the result.

    Args:
        arguments: with ``json`` and ``argv``.
        trainer: the settings that say how many processes.
        work: given the console for progress, returns the results.

    Returns:
        The exit code.
    """
    from experiments.launch import join_or_start
    from framework.processes import leave_group

    code = join_or_start(trainer, arguments.argv)
    if code is None:
        code = _show(arguments, work)
        leave_group()
    return code


def known_names() -> Any:
    """Return the registered names a configuration may use, to refuse a misspelt one before any model loads."""
    from datamodules.catalog import known_look_alike_sets, known_pair_sets, known_prompt_sets, prompt_sources
    from datamodules.tasks import known_tasks
    from framework.config import KnownNames
    from framework.default_model import DEFAULT_MODEL
    from framework.evaluation.judges import known_judges

    return KnownNames(
        tasks=frozenset(known_tasks()),
        judges=frozenset(known_judges()),
        models=frozenset([DEFAULT_MODEL]),
        safety_data=frozenset(known_pair_sets("safety")),
        benign_data=frozenset(known_pair_sets("benign")),
        look_alikes_data=frozenset(known_look_alike_sets()),
        safety_sets=frozenset(known_prompt_sets("safety")),
        over_refusal_sets=frozenset(known_prompt_sets("over_refusal")),
        prompt_sources=prompt_sources,
    )


def say_page(console: Console, page: Path | None) -> None:
    """Name the page a person may open."""
    if page is not None:
        console.print(f"Report: {page}", soft_wrap=True, highlight=False, markup=False)


def _show(arguments: argparse.Namespace, work: Callable[[Console], dict[str, Any]]) -> int:
    """Do the work and print its result as tables or as JSON."""
    from framework.processes import is_main

    with clean_stdout(arguments.json):
        results = work(Console(stderr=arguments.json))
    return show_results(results, arguments.json) if is_main() else code_of(results)


def show_results(results: dict[str, Any], is_json: bool) -> int:
    """Print what a run or a study gave, as tables or as JSON, and return the exit code."""
    from experiments.console import print_results

    if is_json:
        print_json(results)
    else:
        print_results(results, Console())
        if results.get("comparison"):
            from experiments.comparison_table import print_comparison

            print_comparison(results["comparison"], Console())
    return code_of(results)


def code_of(results: dict[str, Any]) -> int:
    """Return the exit code: 1 if a run of the study failed."""
    return 1 if any(run["status"] != "finished" for run in results.get("runs", [])) else 0
