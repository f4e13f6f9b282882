"""Jailbreak templates by name or from a file, and requests wrapped in some of them."""

from __future__ import annotations

from collections.abc import Sequence

from datamodules.embedded_sets import JailbreakTemplate, load_templates
from datamodules.readers import find_file, is_spelt_as_path, read_records, set_name
from framework.errors import ConfigError, DataError, describe_unknown
from framework.examples import Prompt
from framework.files import fingerprint

__all__ = ["TEMPLATE_SETS", "find_templates", "in_some_templates", "read_templates"]

TEMPLATE_SETS = ("embedded", "embedded_more")
"""Names that ``find_templates`` takes: 8 templates to train with, or 24."""


def find_templates(names: Sequence[str]) -> list[JailbreakTemplate]:
    """Return the templates to train with that the names stand for, each once.

    Args:
        names: ``embedded`` (8 templates of the train split), ``embedded_more`` (with 16 more), or files.

    Raises:
        ConfigError: unknown name, or a file holds a template that is held out to measure with.
        DataError: a file cannot be read or holds no templates.
    """
    held_out = {template.template: template.name for template in load_templates("test", more=True)}
    found: dict[str, JailbreakTemplate] = {}
    for name in names:
        if name in TEMPLATE_SETS:
            own = load_templates("train", more=name == "embedded_more")
        elif is_spelt_as_path(name):
            own = read_templates(name)
        else:
            raise ConfigError(describe_unknown("templates", name, TEMPLATE_SETS) + " A path to a file is accepted too.")
        measured = next((held_out[one.template] for one in own if one.template in held_out), None)
        if measured is not None:
            raise ConfigError(
                f"Expected `templates` to name templates to train with, but got {name!r} with {measured!r}, which is "
                "held out for measuring. Take it out of the file."
            )
        found |= {template.id: template for template in own if template.id not in found}
    return list(found.values())


def read_templates(name_or_path: str) -> list[JailbreakTemplate]:
    """Return the templates of a file with ``template`` and, if you like, ``name`` in every row.

    The id of a template is made of its text, so that what was sampled with it is known again wherever it stands.

    Raises:
        DataError: the file cannot be read, is empty, or a template is missing or lacks its slot.
    """
    path = find_file(name_or_path)
    found = []
    for number, row in enumerate(read_records(path), start=1):
        text = row.get("template")
        if not isinstance(text, str):
            raise DataError(f"Expected row {number} of `{path}` to have a text `template`, but got {list(row)!r}.")
        own_id, name = f"{set_name(path)}-{fingerprint(text)[:8]}", str(row.get("name") or f"template-{number}")
        try:
            found.append(JailbreakTemplate(own_id, name, text))
        except DataError as error:
            raise DataError(f"Row {number} of `{path}`: {error}") from error
    return found


def in_some_templates(
    prompts: Sequence[Prompt], templates: Sequence[JailbreakTemplate], *, per_prompt: int
) -> list[Prompt]:
    """Return each prompt in ``per_prompt`` of the templates, every template serving about as often as any other.

    Args:
        prompts: what is wrapped.
        templates: at least ``per_prompt`` of them.
        per_prompt: templates of each prompt.

    Raises:
        ConfigError: ``per_prompt`` is below 1 or above the number of templates.
    """
    if not 1 <= per_prompt <= len(templates):
        raise ConfigError(
            f"Expected `per_prompt` to be from 1 to {len(templates)}, the number of templates, but got {per_prompt!r}."
        )
    stride = len(templates) // per_prompt
    return [
        templates[(number + turn * stride) % len(templates)].apply(prompt)
        for number, prompt in enumerate(prompts)
        for turn in range(per_prompt)
    ]
