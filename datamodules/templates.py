"""Jailbreak templates by name or from a file, and requests wrapped in some of them."""

from __future__ import annotations

from collections.abc import Sequence

from datamodules.embedded_sets import JailbreakTemplate, load_templates
from datamodules.readers import find_file, read_records
from framework.errors import ConfigError, DataError, describe_unknown
from framework.examples import Prompt

__all__ = ["TEMPLATE_SETS", "find_templates", "in_some_templates", "read_templates"]

TEMPLATE_SETS = ("embedded", "embedded_more")
"""Names that ``find_templates`` takes: 8 templates to train with, or 24."""


def find_templates(names: Sequence[str]) -> list[JailbreakTemplate]:
    """Return the templates to train with that the names stand for, each once.

    Args:
        names: ``embedded`` (8 templates of the train split), ``embedded_more`` (with 16 more), or files.

    Raises:
        ConfigError: unknown name, or two templates of one id.
        DataError: a file cannot be read or holds no templates.
    """
    found: dict[JailbreakTemplate, None] = {}
    for name in names:
        if name in TEMPLATE_SETS:
            own = load_templates("train", more=name == "embedded_more")
        elif "/" in name or "." in name:
            own = read_templates(name)
        else:
            raise ConfigError(describe_unknown("templates", name, TEMPLATE_SETS) + " A path to a file is accepted too.")
        found |= dict.fromkeys(own)
    ids = [template.id for template in found]
    double = next((i for i in ids if ids.count(i) > 1), None)
    if double is not None:
        raise ConfigError(
            f"Expected the templates of all sets to have ids of their own, but got {double!r} twice. Give the files of "
            "`templates` different names."
        )
    return list(found)


def read_templates(name_or_path: str) -> list[JailbreakTemplate]:
    """Return the templates of a file with ``template`` and, if you like, ``name`` in every row.

    Raises:
        DataError: the file cannot be read, is empty, or a template is missing or lacks its slot.
    """
    path = find_file(name_or_path)
    found = []
    for number, row in enumerate(read_records(path), start=1):
        if not isinstance(row.get("template"), str):
            raise DataError(f"Expected row {number} of `{path}` to have a text `template`, but got {list(row)!r}.")
        own_id = f"{path.stem}-{number}"
        found.append(JailbreakTemplate(own_id, str(row.get("name") or own_id), row["template"]))
    return found


def in_some_templates(
    prompts: Sequence[Prompt], templates: Sequence[JailbreakTemplate], *, per_prompt: int
) -> list[Prompt]:
    """Return each prompt in ``per_prompt`` of the templates, every template serving about as often as any other.

    Args:
        prompts: what is wrapped.
        templates: at least ``per_prompt`` of them.
        per_prompt: templates of each prompt.
    """
    stride = len(templates) // per_prompt
    return [
        templates[(number + turn * stride) % len(templates)].apply(prompt)
        for number, prompt in enumerate(prompts)
        for turn in range(per_prompt)
    ]
