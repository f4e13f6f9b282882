"""``seawall release``: hand a finished run's model to others, signed."""

from __future__ import annotations

import argparse
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from experiments.commands.output import clean_stdout, print_json
from framework.errors import ConfigError

if TYPE_CHECKING:
    from experiments.release.bundle import Released

__all__ = ["SUMMARY", "add_arguments", "command"]

SUMMARY = "make a signed bundle of a finished run: model, model card, results, replies"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("run", metavar="RUN", help="folder of a finished run")
    parser.add_argument("--output", metavar="PATH", help="bundle to make (default: releases/<run>)")
    parser.add_argument("--key", metavar="FILE", help="private key to sign with (PEM, Ed25519)")
    parser.add_argument(
        "--new-key", metavar="FILE", help="make a key pair: FILE (keep it) and FILE's .pub.pem (publish)"
    )
    parser.add_argument("--content", choices=("model", "adapter"), default="model", help="what to hand out")
    parser.add_argument("--expires", metavar="DATE", help="last day of validity, YYYY-MM-DD (UTC)")
    parser.add_argument("--archive", action="store_true", help="make one .tar file instead of a folder")
    text = "leave measured prompts out of the numbers that stood in the training data: the same ones, or near ones too"
    parser.add_argument("--exclude-overlap", nargs="?", const="near", choices=("exact", "near"), help=text)
    parser.add_argument("--full-replies", action="store_true", help="keep replies to harmful prompts readable")
    text = "attack.json of `seawall attack`, or a JSON list of attacks, for the model card; may be given several times"
    parser.add_argument("--attacks", action="append", default=[], metavar="FILE", help=text)


def command(arguments: argparse.Namespace) -> int:
    """Make the bundle and say where it lies; returns the exit code.

    Raises:
        ConfigError: the date is none, or options that do not go together.
    """
    from experiments.release.bundle import ReleaseOptions, release_run

    options = ReleaseOptions(
        output=Path(arguments.output) if arguments.output else None,
        key=Path(arguments.key) if arguments.key else None,
        new_key=Path(arguments.new_key) if arguments.new_key else None,
        content=arguments.content,
        expires=_read_date(arguments.expires) if arguments.expires else None,
        is_archive=arguments.archive,
        exclude=arguments.exclude_overlap,
        full_replies=arguments.full_replies,
        attacks=[Path(name) for name in arguments.attacks],
    )
    with clean_stdout(arguments.json):
        found = release_run(Path(arguments.run), options)
    if arguments.json:
        print_json(_plain(found))
    else:
        _show(found, Console())
    return 0


def _read_date(text: str) -> datetime:
    """Return the end of a day, UTC."""
    try:
        day = datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=timezone.utc)
    except ValueError:
        raise ConfigError(f"Expected `--expires` to be a date like 2030-01-31, but got {text!r}.") from None
    return day + timedelta(days=1)


def _plain(found: Released) -> dict[str, object]:
    overlap = found.overlap
    return {
        "bundle": str(found.path),
        "files": found.num_files,
        "bytes": found.num_bytes,
        "signer": found.signer,
        "overlap": {
            "prompts": overlap.num_prompts,
            "training_prompts": overlap.num_training,
            "exact": overlap.exact,
            "near": overlap.near,
            "unknown": overlap.unknown,
        },
        "excluded": found.num_excluded,
        "replies_left_out": found.num_without_opening,
        "replies_with_image": found.num_with_image,
    }


def _show(found: Released, console: Console) -> None:
    overlap = found.overlap
    console.print(f"{found.path}: {found.num_files} files, {found.num_bytes / 2**20:.1f} MiB", highlight=False)
    console.print(f"signed by {found.signer[:16]}", highlight=False)
    console.print(
        f"measured prompts in the training data: {len(overlap.exact)} the same and {len(overlap.near)} near, of "
        f"{overlap.num_prompts}; {found.num_excluded} left out of the numbers",
        highlight=False,
    )
    for sentence in overlap.unknown:
        console.print(f"not covered: {sentence}", highlight=False, markup=False)
    if found.num_without_opening:
        console.print(f"{found.num_without_opening} replies behind sampled openings left out", highlight=False)
    if found.num_with_image:
        console.print(
            f"{found.num_with_image} replies were made with pictures, which stay here: they cannot be made again",
            highlight=False,
        )
