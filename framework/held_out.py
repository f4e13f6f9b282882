"""What is measured must not be what was learnt: sets and files that stand on both sides of a run.

A rate of safety or over-refusal over prompts that were trained on, or mined, tells how well they were learnt and
nothing else. Two names are compared by the files they stand for, so that a set is found under another name and by its
path.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from framework.fields import Problem
from framework.schema import RunConfig

__all__ = ["PromptSource", "PromptSources", "held_out_problems"]

MEASURED = ("safety", "over_refusal")
"""Settings of ``evaluate`` that name sets; the task is measured on a split of its own."""
LEARNT = ("task", "task_path", "harmful", "safety", "benign", "look_alikes")
"""Settings of a stage's ``data`` that name sets or files."""


class PromptSource(NamedTuple):
    """Where the prompts of a set lie."""

    file: Path
    """Resolved where it is there."""
    part: str | None = None
    """Which rows of the file, by their label; None for all of them."""

    def overlaps(self, other: PromptSource) -> bool:
        """Return whether both hold the same prompts or some of them.

        Example:
            >>> safe, unsafe = (PromptSource(Path("xstest.csv"), part) for part in ("safe", "unsafe"))
            >>> safe.overlaps(unsafe), safe.overlaps(PromptSource(Path("xstest.csv")))
            (False, True)
        """
        return self.file == other.file and (self.part is None or other.part is None or self.part == other.part)


PromptSources = Callable[[str], Sequence[PromptSource]]
"""From a name or path in the settings to where its prompts lie; empty for sets with splits of their own and for texts
that name no set."""


def held_out_problems(config: RunConfig, sources_of: PromptSources) -> Iterator[Problem]:
    """Yield a problem for every set or file that a stage learns from and ``evaluate`` measures.

    Args:
        config: of the run.
        sources_of: where the prompts of a name lie.
    """
    measured = [
        (field, name, found)
        for field in MEASURED
        for name in dict.fromkeys(getattr(config.evaluate, field))
        if (found := sources_of(name))
    ]
    if not measured:
        return
    for path, key, learnt in _learnt(config):
        taken = sources_of(learnt)
        for field, name, found in measured:
            if any(one.overlaps(other) for one in taken for other in found):
                text = (
                    f"Expected `{key}` and `evaluate.{field}` to name different sets, but got {learnt!r} and {name!r}, "
                    "which hold the same prompts. A rate over what was learnt says nothing: name another set on one "
                    "side."
                )
                yield Problem(path, text)


def _learnt(config: RunConfig) -> Iterator[tuple[str, str, str]]:
    """Yield the path of a problem, the setting, and the text of everything a stage may learn from."""
    for stage, given in config.active_stages():
        data = f"stages.{stage}.data"
        for field in LEARNT:
            if value := getattr(given.data, field):
                yield f"{data}.{field}", f"{data}.{field}", value
        methods = f"stages.{stage}.methods"
        for name, options in given.methods.items():
            for field, value in _with_defaults(name, options).items():
                for text in dict.fromkeys(_texts(value)):
                    yield methods, f"{methods}.{name}.{field}", text


def _with_defaults(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a method with those left out; of an unknown method what is given."""
    # Here, because reading settings without methods needs no torch.
    from framework.registry import known_methods

    given, entry = dict(options), known_methods().get(name)
    for field in dataclasses.fields(entry.config_class) if entry is not None else ():
        if field.default is not dataclasses.MISSING:
            given.setdefault(field.name, field.default)
        elif field.default_factory is not dataclasses.MISSING:
            given.setdefault(field.name, field.default_factory())
    return given


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value] if value else []
    return [text for text in value if isinstance(text, str) and text] if isinstance(value, (list, tuple)) else []
