"""The generated parts of the README: the method table from the registry, result tables from kept results.

Run: ``python -m experiments.docs`` writes them; ``--check`` only says whether they are current.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from experiments.console import markdown_table
from experiments.study_records import RESULTS_ROOT
from framework.errors import ConfigError
from framework.files import read_json, write_atomic
from framework.registry import known_methods

__all__ = ["filled_readme", "methods_markdown", "study_markdown"]

README = Path(__file__).parents[1] / "README.md"
PUBLISHED = RESULTS_ROOT / "published"
"""Tables of this README; a study of yours writes beside this folder, never into it."""
STUDIES = ("first_look", "quickstart", "scenario")


def methods_markdown() -> str:
    """Return the table of registered methods."""
    lines = ["| method | idea | contributes | runs under |", "| --- | --- | --- | --- |"]
    for name, entry in known_methods().items():
        points = ", ".join(f"`{point}`" for point in entry.points)
        lines.append(f"| `{name}` | {entry.summary} | {points} | {', '.join(entry.supports)} |")
    return "\n".join(lines) + "\n"


def study_markdown(name: str, *, results_root: Path = PUBLISHED) -> str:
    """Return a study's published table; empty when there is none."""
    path = results_root / name / "table.json"
    if not path.is_file():
        return ""
    return markdown_table(read_json(path)["rows"])


def filled_readme(text: str) -> str:
    """Return ``text`` with every generated part between its markers replaced.

    Raises:
        ConfigError: a marker is missing.
    """
    parts = {"methods": methods_markdown()} | {name: study_markdown(name) for name in STUDIES}
    for name, content in parts.items():
        marker = f"<!-- {name} -->"
        if marker not in text:
            raise ConfigError(f"Expected the README to have the marker `{marker}`, but it is not there. Put it back.")
        pattern = re.compile(re.escape(marker) + r"\n(?:\n\|(?:.*\n)*?(?=\n|\Z))?")
        block = f"{marker}\n" + (f"\n{content}" if content else "")
        text = pattern.sub(block.replace("\\", r"\\"), text, count=1)
    return text


def main() -> int:
    """Write or check the generated parts of the README."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    text = README.read_text(encoding="utf-8")
    filled = filled_readme(text)
    if arguments.check:
        if text != filled:
            print("README.md is not current: run `python -m experiments.docs`.", file=sys.stderr)
        return int(text != filled)
    write_atomic(README, filled)
    return 0


if __name__ == "__main__":
    sys.exit(main())
