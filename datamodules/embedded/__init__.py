"""The project's own prompt sets as JSONL files; ``CARD.md`` describes them, ``embedded_sets`` loads them."""

from __future__ import annotations

from datamodules.embedded_sets import (
    JailbreakTemplate,
    benign_examples,
    load_benign,
    load_harmful,
    load_look_alikes,
    load_refusals,
    load_templates,
    look_alike_examples,
    refusal_examples,
)

__all__ = [
    "JailbreakTemplate",
    "benign_examples",
    "load_benign",
    "load_harmful",
    "load_look_alikes",
    "load_refusals",
    "load_templates",
    "look_alike_examples",
    "refusal_examples",
]
