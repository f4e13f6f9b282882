"""``seawall patch``: put the small update of some rows on a model, take it off again, look at it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments.commands.output import clean_stdout, print_json
from framework.errors import ModelError

__all__ = ["SUMMARY", "add_arguments", "command"]

SUMMARY = "put a patch of trained rows on a model, take it off again, or look at it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the three actions."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="apply|remove|inspect")
    apply = actions.add_parser("apply", help="write a copy of a model with patches on it")
    apply.add_argument("model", help="the model the patches were trained on, a folder or a name")
    apply.add_argument("patches", nargs="+", metavar="PATCH", help="patch files; each changes rows of its own")
    apply.add_argument("--output", required=True, metavar="FOLDER", help="new folder for the patched model")
    apply.add_argument(
        "--keep-originals", action="store_true", help="store the rows as they were, so that patches come off anywhere"
    )
    remove = actions.add_parser("remove", help="write a copy of a model with a patch taken off, bit by bit as it was")
    remove.add_argument("model", help="folder of the patched model")
    remove.add_argument("patch", help="name of the patch, or its file")
    remove.add_argument(
        "--base", metavar="MODEL", help="the model the patch was trained on, unless originals were kept"
    )
    remove.add_argument("--output", required=True, metavar="FOLDER", help="new folder for the model")
    inspect = actions.add_parser("inspect", help="show what a patch changes, or which patches a model carries")
    inspect.add_argument("file", metavar="FILE|FOLDER", help="a patch file, or the folder of a patched model")
    for action in (apply, remove, inspect):
        # Like the command's own, which stand before the action; left unset they do not undo those.
        action.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print the result as JSON")
        action.add_argument("--verbose", action="store_true", default=argparse.SUPPRESS, help="show tracebacks")


def command(arguments: argparse.Namespace) -> int:
    """Do one of the three actions; returns the exit code.

    Args:
        arguments: ``action`` and its arguments, and ``json``.
    """
    action = {"apply": _apply, "remove": _remove, "inspect": _inspect}[arguments.action]
    with clean_stdout(arguments.json):
        found, text = action(arguments)
    if arguments.json:
        print_json(found)
    else:
        Console().print(text)
    return 0


def _apply(arguments: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    from methods.nest.patched_folders import apply_patches

    output = Path(arguments.output)
    files = [Path(path) for path in arguments.patches]
    done = apply_patches(_folder(arguments.model), files, output, keep_originals=arguments.keep_originals)
    found = {"output": output, **done._asdict()}
    return found, f"{done.rows} rows changed in {output}; rounding took {done.rounding:.2g} of the update's norm"


def _remove(arguments: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    from methods.nest.patched_folders import remove_patch

    output = Path(arguments.output)
    base = _folder(arguments.base) if arguments.base else None
    rows = remove_patch(Path(arguments.model), arguments.patch, output, base=base)
    return {"output": output, "rows": rows}, f"{rows} rows as they were before in {output}"


def _inspect(arguments: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    from experiments.neuron_picture import patch_summary, patch_table
    from methods.nest.patch import read_patch
    from methods.nest.patched_folders import read_record

    place = Path(arguments.file)
    if place.is_dir():
        record = read_record(place)
        if record is None:
            raise ModelError(
                f"Expected `{place}` to carry patches, but it carries none. Name a patch file, or a folder that "
                "`seawall patch apply` wrote."
            )
        names = ", ".join(
            f"{name} (trained on top of {' and '.join(below)})" if below else name
            for name, below in record.needs.items()
        )
        found = {"base": record.base, "model": record.model, "patches": list(record.patches)}
        return found, f"{place} carries {names} on the base {record.base}"
    patch = read_patch(place)
    return patch_summary(patch), patch_table(patch)


def _folder(model: str) -> Path:
    from framework.models import ModelSpec, find_model

    return find_model(ModelSpec(model)).folder
