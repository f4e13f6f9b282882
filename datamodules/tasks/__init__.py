"""Downstream tasks by name; a task's module is imported when the task is asked for."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import cast

from datamodules.readers import find_file, read_records, set_name
from datamodules.tasks.base import Task
from framework.errors import ConfigError, describe_unknown

__all__ = ["Task", "create_task", "known_tasks"]

_TASKS = {
    "ag_news": "AgNews",
    "arithmetic": "Arithmetic",
    "gsm8k": "Gsm8k",
    "instructions": "Instructions",
    "messages": "Messages",
    "sst2": "Sst2",
    "text_to_sql": "TextToSql",
    "triage": "Triage",
}
"""Module of this package -> class."""


def known_tasks() -> list[str]:
    """Return the names of the tasks, sorted."""
    return sorted(_TASKS)


def create_task(name: str, path: str | Path | None = None) -> Task:
    """Return a task.

    Args:
        name: a name of ``known_tasks``, or a ``.json`` or ``.jsonl`` file of instructions or of chats (``messages``).
        path: file or folder of the task's data; None looks below ``SEAWALL_DATA`` and then on the hub.

    Raises:
        ConfigError: unknown name, or a path for a task that takes none.
        DataError: the data cannot be found or read.
    """
    if name in _TASKS:
        module = importlib.import_module(f"datamodules.tasks.{name}")
        found = None if path is None else find_file(path, dataset=name)
        return cast(Task, getattr(module, _TASKS[name])(found))
    if not name.lower().removesuffix(".gz").endswith((".json", ".jsonl")):
        raise ConfigError(describe_unknown("task", name, _TASKS) + " A .json or .jsonl file is accepted too.")
    if path is not None:
        raise ConfigError(
            f"Expected `path` to be unset when `task` is a file, but got {str(path)!r}. Name the file once."
        )
    file = find_file(name)
    kind = "messages" if "messages" in read_records(file)[0] else "instructions"
    module = importlib.import_module(f"datamodules.tasks.{kind}")
    return cast(Task, getattr(module, _TASKS[kind])(file, name=set_name(file)))
