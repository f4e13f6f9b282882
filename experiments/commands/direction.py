"""``seawall direction``: what alignment changed in a model, module by module."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from experiments.commands.output import clean_stdout, print_json
from framework.errors import ConfigError

__all__ = ["SUMMARY", "add_arguments", "command"]

SUMMARY = "show what alignment changed in a model, module by module"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--base", required=True, metavar="MODEL", help="the unaligned model: a folder or a name")
    parser.add_argument("--aligned", required=True, metavar="MODEL", help="the aligned model: a folder or a name")
    parser.add_argument("--adapter", metavar="FOLDER", help="compare the direction with this LoRA adapter's update")
    parser.add_argument("--output", metavar="FOLDER", help="save leading singular vectors and a manifest")
    parser.add_argument("--picture", metavar="FILE.svg", help="draw heat maps, layers by modules")
    parser.add_argument("--targets", metavar="NAMES", help="comma-separated names of modules (default: all)")
    parser.add_argument("--vectors", type=int, default=16, help="singular vectors saved a module (default: 16)")


def command(arguments: argparse.Namespace) -> int:
    """Compare two models, save their difference and show it; returns the exit code.

    Args:
        arguments: ``base``, ``aligned`` (folders or names), ``adapter``, ``output``, ``picture`` (paths or None),
            ``targets`` (comma-separated or None), ``vectors`` and ``json``.

    Raises:
        ConfigError: the picture is no SVG file, or fewer than one vector is asked for.
    """
    from experiments.direction import measure_direction
    from experiments.direction_picture import direction_svg, direction_table
    from framework.files import write_atomic
    from framework.models import ModelSpec, find_model

    picture = Path(arguments.picture) if arguments.picture else None
    problems = []
    if picture is not None and picture.suffix.lower() != ".svg":
        problems.append(f"Expected `--picture` to be a file ending in .svg, but got {str(picture)!r}.")
    if arguments.vectors < 1:
        problems.append(f"Expected `--vectors` to be a whole number >= 1, but got {arguments.vectors}.")
    if problems:
        raise ConfigError(problems)
    with clean_stdout(True):
        base, aligned = (find_model(ModelSpec(name)).folder for name in (arguments.base, arguments.aligned))
        found = measure_direction(
            base,
            aligned,
            adapter=Path(arguments.adapter) if arguments.adapter else None,
            output=Path(arguments.output) if arguments.output else None,
            targets=[name.strip() for name in (arguments.targets or "").split(",") if name.strip()],
            vectors=arguments.vectors,
        )
    if picture is not None:
        write_atomic(picture, direction_svg(found))
    if arguments.json:
        print_json({"modules": found})
    else:
        Console().print(direction_table(found))
    return 0
