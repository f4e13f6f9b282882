"""``seawall verify``: check a bundle's files, signature and validity, and make some of its replies again."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from experiments.commands.output import clean_stdout, print_json

__all__ = ["SUMMARY", "add_arguments", "command"]

NOT_ALL_CHECKED = 3
"""Exit code: nothing is wrong, but who signed it or what it says of its model was not checked."""
SUMMARY = "check a released bundle: files, signature, validity, and a sample of its replies"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("bundle", metavar="BUNDLE", help="folder or .tar file that `seawall release` made")
    parser.add_argument("--key", metavar="PUBLIC.pem", help="the signer's public key; without it no origin is proven")
    parser.add_argument("--prompts", type=int, metavar="N", help="replies to make again (default: 8; 0 makes none)")
    parser.add_argument("--seed", type=int, metavar="S", help="of the choice of replies (default: a new one)")
    parser.add_argument("--base", metavar="MODEL", help="base model of an adapter: a folder or a name")
    parser.add_argument("--min-exact", type=float, default=0.5, help="share of replies that must be the same (0.5)")
    text = "mean share of words that must agree from the start (0.6)"
    parser.add_argument("--min-prefix", type=float, default=0.6, help=text)
    text = "share of the sample by which a judge's count may change (0.1)"
    parser.add_argument("--max-shift", type=float, default=0.1, help=text)
    text = "accept a bundle none of whose judges can be asked again"
    parser.add_argument("--without-judges", action="store_true", help=text)


def command(arguments: argparse.Namespace) -> int:
    """Verify the bundle and show what was found; returns 0 if it is good, 1 if bad, 3 if not everything was checked."""
    from experiments.release.rerun import Tolerance
    from experiments.release.verify import VerifyOptions, verification_table, verify_bundle

    options = VerifyOptions(
        key=Path(arguments.key) if arguments.key else None,
        prompts=arguments.prompts,
        seed=arguments.seed,
        base=arguments.base,
        tolerance=Tolerance(
            arguments.min_exact, arguments.min_prefix, arguments.max_shift, needs_judge=not arguments.without_judges
        ),
    )
    with clean_stdout(arguments.json):
        found = verify_bundle(Path(arguments.bundle), options)
    if arguments.json:
        print_json(found.to_dict())
    else:
        Console().print(verification_table(found))
        for sentence in found.unchecked:
            Console().print(sentence, soft_wrap=True, highlight=False, markup=False)
    if not found.is_good:
        return 1
    return NOT_ALL_CHECKED if found.left_out else 0
