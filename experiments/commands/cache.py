"""``seawall cache``: what lies in the cache, and taking out what is no longer needed."""

from __future__ import annotations

import argparse
import contextlib
import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from experiments.commands.output import clean_stdout, print_json
from framework.errors import ConfigError

if TYPE_CHECKING:
    from framework.cache_contents import CacheEntry

__all__ = ["SUMMARY", "add_arguments", "command"]

SUMMARY = "show what the cache holds, or remove what is no longer needed"
GB = 1e9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of both actions."""
    actions = parser.add_subparsers(dest="action", metavar="list|remove")
    parser.set_defaults(action="list")
    listed = actions.add_parser("list", help="show every kind of artefact, its number and size (the default)")
    removed = actions.add_parser(
        "remove",
        help="remove artefacts; what a run needs of them is made again",
        description="Remove artefacts, the longest unused first. Finished runs keep their models; converted models, "
        "rollouts and judges' verdicts stay. Do not remove what a run that is going on has just found.",
    )
    removed.add_argument("--unused-for", type=_number, metavar="DAYS", help="what no run looked up for so many days")
    removed.add_argument("--at-most", type=_number, metavar="GB", help="until the artefacts take no more than this")
    removed.add_argument("--kind", action="append", default=[], metavar="KIND", help="only this kind; may be repeated")
    removed.add_argument("--dry-run", action="store_true", help="say what would be removed, and remove nothing")
    for action in (listed, removed):
        # Like the command's own, which stand before the action; left unset they do not undo those.
        action.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print the result as JSON")
        action.add_argument("--verbose", action="store_true", default=argparse.SUPPRESS, help="show tracebacks")


def command(arguments: argparse.Namespace) -> int:
    """List or remove; returns the exit code.

    Args:
        arguments: ``action`` and its arguments, and ``json``.

    Raises:
        ConfigError: nothing says what to remove, or a kind that the cache does not hold.
    """
    from framework.cache_contents import find_entries
    from framework.files import cache_root

    root = cache_root()
    with clean_stdout(arguments.json):
        entries = find_entries(root / "artifacts")
        if arguments.action == "list":
            result, shown = _listing(entries), str(root)
        else:
            result, shown = _remove(arguments, entries), _title(arguments.dry_run)
    if arguments.json:
        print_json({"cache": str(root), **result})
    else:
        Console().print(_table(result["kinds"], title=shown))
        if result.get("busy"):
            Console().print(f"{result['busy']} left alone: another process is writing them.")
    return 0


def _number(text: str) -> float:
    with contextlib.suppress(ValueError):
        if math.isfinite(value := float(text)) and value >= 0:
            return value
    raise argparse.ArgumentTypeError(f"Expected a number >= 0, but got {text}.")


def _listing(entries: Sequence[CacheEntry]) -> dict[str, Any]:
    """Return number, bytes and last use of every kind, the largest first."""
    kinds: dict[str, dict[str, Any]] = {}
    for entry in entries:
        one = kinds.setdefault(entry.kind, {"number": 0, "unfinished": 0, "bytes": 0, "freed": 0, "unused_days": 0.0})
        one["number"] += 1
        one["unfinished"] += not entry.is_finished
        one["bytes"] += entry.size
        one["freed"] += entry.freed
        one["unused_days"] = max(one["unused_days"], (time.time() - entry.used) / 86400)
    return {"kinds": dict(sorted(kinds.items(), key=lambda item: -item[1]["bytes"]))}


def _remove(arguments: argparse.Namespace, entries: Sequence[CacheEntry]) -> dict[str, Any]:
    """Remove what the arguments say, unless it is a trial; returns what was removed, like a listing."""
    from framework.cache_contents import choose_entries, finish_removals, remove_entry
    from framework.files import cache_root

    known = {entry.kind for entry in entries}
    if unknown := [kind for kind in arguments.kind if kind not in known]:
        raise ConfigError(f"Expected `--kind` to be one of {sorted(known)}, but got {', '.join(unknown)}.")
    if arguments.unused_for is None and arguments.at_most is None and not arguments.kind:
        raise ConfigError(
            "Expected `remove` to be told what to remove, but got nothing. Write --unused-for DAYS, --at-most GB, or "
            "--kind KIND for all of one kind."
        )
    chosen = choose_entries(
        entries,
        now=time.time(),
        kinds=arguments.kind,
        unused_days=arguments.unused_for,
        at_most=None if arguments.at_most is None else arguments.at_most * GB,
    )
    if arguments.dry_run:
        return {**_listing(chosen), "busy": 0, "dry_run": True}
    finish_removals(cache_root() / "artifacts", now=time.time())
    removed = [entry for entry in chosen if remove_entry(entry)]
    return {**_listing(removed), "busy": len(chosen) - len(removed), "dry_run": False}


def _title(is_trial: bool) -> str:
    return "Would be removed" if is_trial else "Removed"


def _table(kinds: dict[str, dict[str, Any]], *, title: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", pad_edge=False)
    table.add_column("artefacts", no_wrap=True)
    for column in ("number", "interrupted", "size", "not shared with runs", "longest unused"):
        table.add_column(column, justify="right")
    for kind, one in kinds.items():
        table.add_row(kind, str(one["number"]), str(one["unfinished"]), *_cells(one))
    if len(kinds) > 1:
        rows = kinds.values()
        sums = {key: sum(one[key] for one in rows) for key in ("number", "unfinished", "bytes", "freed")}
        sums["unused_days"] = max(one["unused_days"] for one in rows)
        table.add_section()
        table.add_row("all", str(sums["number"]), str(sums["unfinished"]), *_cells(sums))
    return table


def _cells(one: dict[str, Any]) -> tuple[str, str, str]:
    return decimal(one["bytes"]), decimal(one["freed"]), f"{one['unused_days']:.1f} days"
