"""``seawall tokens``: the safety tokens of an aligned model, as a table and as a picture."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from experiments.commands.output import clean_stdout, print_json
from framework.errors import ConfigError

if TYPE_CHECKING:
    from experiments.token_search import TokenSearch

__all__ = ["SUMMARY", "add_arguments", "command"]

SUMMARY = "show what an aligned model says in refusals and its base does not"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--base", metavar="MODEL", help="the unaligned model: a folder or a name")
    parser.add_argument("--aligned", metavar="MODEL", help="the aligned model: a folder or a name")
    parser.add_argument("--adapter", metavar="FOLDER", help="the adapter that aligns --base, instead of --aligned")
    parser.add_argument("--show", metavar="FOLDER", help="show tokens that were found before; searches nothing")
    parser.add_argument("--source", default="embedded", metavar="NAME", help="pairs of harmful prompt and refusal")
    parser.add_argument("--pairs", type=int, default=512, help="pairs used at most (default: 512)")
    parser.add_argument("--reply-tokens", type=int, default=64, help="first tokens of a refusal used (default: 64)")
    parser.add_argument("--count", type=int, default=50, help="tokens kept (default: 50)")
    parser.add_argument(
        "--score", choices=("difference", "log_ratio"), default="difference", help="how they are ranked"
    )
    parser.add_argument("--base-prompt", choices=("plain", "template"), default="plain", help="what --base reads")
    parser.add_argument("--system", metavar="TEXT", help="system message (default: the template's own)")
    parser.add_argument("--picture", metavar="FILE.svg", help="draw the mean probabilities as bars")
    parser.add_argument("--output", metavar="FOLDER", help="save tensors, table and picture with a fingerprint")


def command(arguments: argparse.Namespace) -> int:
    """Search the safety tokens, or read those found before, and show them; returns the exit code.

    Args:
        arguments: those of ``add_arguments`` and ``json``.

    Raises:
        ConfigError: options that do not go together, or a count below its least.
    """
    _check(arguments)
    from experiments.run import artifact_store
    from experiments.token_search import save_found, search_tokens
    from experiments.token_view import read_token_table, token_svg, token_table_view
    from framework.files import write_atomic

    if arguments.show:
        lines, about = read_token_table(Path(arguments.show)), {}
    else:
        with clean_stdout(True):
            found = search_tokens(_search(arguments), artifact_store())
        if arguments.output:
            save_found(found, Path(arguments.output))
        lines = found.lines
        about = {"fingerprint": found.fingerprint, "folder": str(found.folder), "pairs": found.num_pairs}
    if arguments.picture:
        write_atomic(Path(arguments.picture), token_svg(lines))
    if arguments.json:
        print_json({**about, "tokens": lines})
        return 0
    console = Console()
    console.print(token_table_view(lines))
    for name, value in about.items():
        console.print(f"{name}: {value}", soft_wrap=True, highlight=False, markup=False)
    return 0


def _search(arguments: argparse.Namespace) -> TokenSearch:
    from experiments.token_search import TokenSearch
    from framework.models import ModelSpec, find_model

    base = find_model(ModelSpec(arguments.base)).folder
    return TokenSearch(
        base,
        find_model(ModelSpec(arguments.aligned)).folder if arguments.aligned else None,
        Path(arguments.adapter) if arguments.adapter else None,
        source=arguments.source,
        pairs=arguments.pairs,
        reply_tokens=arguments.reply_tokens,
        num_tokens=arguments.count,
        score=arguments.score,
        is_plain=arguments.base_prompt == "plain",
        system=arguments.system,
    )


def _check(arguments: argparse.Namespace) -> None:
    problems = []
    if arguments.show:
        given = [name for name in ("base", "aligned", "adapter", "output") if getattr(arguments, name)]
        if given:
            problems.append(f"Expected `--show` to come without `--{given[0]}`, but got both. It searches nothing.")
    elif not arguments.base or bool(arguments.aligned) == bool(arguments.adapter):
        named = [f"--{name}" for name in ("base", "aligned", "adapter") if getattr(arguments, name)]
        problems.append(
            "Expected `--base` and either `--aligned` or `--adapter`, or `--show` alone, but got "
            f"{' and '.join(named) or 'none of them'}."
        )
    for name, least in (("pairs", 1), ("reply_tokens", 1), ("count", 2)):
        if getattr(arguments, name) < least:
            option = name.replace("_", "-")
            problems.append(
                f"Expected `--{option}` to be a whole number >= {least}, but got {getattr(arguments, name)}."
            )
    if arguments.picture and Path(arguments.picture).suffix.lower() != ".svg":
        problems.append(f"Expected `--picture` to be a file ending in .svg, but got {arguments.picture!r}.")
    if problems:
        raise ConfigError(problems)
