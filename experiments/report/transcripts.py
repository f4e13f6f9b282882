"""Replies whose verdict flipped between two models, packed for the page, those to harmful requests only when asked for.

A prompt on which all models got the same verdict is left out. Verdicts of every model are embedded (one letter each);
replies are embedded model by model, the compared ones first, until the budget is spent, and what was left out is said.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from experiments.report.entries import Entry
from experiments.report.replies import VERDICTS, Reply

__all__ = ["BUDGET", "Replies", "Transcripts", "pack_transcripts"]

Replies = Literal["all", "redacted", "none"]
"""What a page holds: every reply, none to harmful requests and not these requests either, or verdicts alone."""
BUDGET = 2_400_000
"""Bytes of replies in the page, packed."""
PACKED_SHARE = 0.42
"""Of a text's bytes that is left after packing, about: gzip 0.31 on such replies, base64 4/3 of it."""
LETTERS = {
    name: chr(ord("a") + i) for i, name in enumerate(dict.fromkeys(v for kind in VERDICTS.values() for v in kind))
}
ABSENT = "."


@dataclass
class _Texts:
    """Every text once."""

    items: list[str] = field(default_factory=list)
    numbers: dict[str, int] = field(default_factory=dict)
    size: int = 0

    def add(self, text: str) -> int:
        if text not in self.numbers:
            self.numbers[text] = len(self.items)
            self.items.append(text)
            self.size += len(text.encode()) + 8
        return self.numbers[text]


@dataclass(frozen=True)
class Transcripts:
    """What the transcript browser shows."""

    data: Mapping[str, Any]
    num_prompts: int
    """On which some two models differ."""
    num_left_out: int
    """Models whose replies did not fit; their verdicts are there."""
    num_without: int
    """Models without a file of replies."""

    def packed(self) -> str:
        """Return the data as base64 of gzipped JSON; equal data gives equal text."""
        text = json.dumps(self.data, ensure_ascii=False, separators=(",", ":"))
        return base64.b64encode(gzip.compress(text.encode(), compresslevel=6, mtime=0)).decode()


def pack_transcripts(
    entries: Sequence[Entry],
    replies: Mapping[str, Sequence[Reply]],
    *,
    first: Sequence[str] = (),
    budget: int = BUDGET,
    show: Replies = "redacted",
) -> Transcripts:
    """Return the flipped replies of all entries.

    Args:
        entries: measured models, in the order of the menus.
        replies: by entry's id.
        first: ids of entries whose replies are embedded before those of others.
        budget: bytes that replies may take in the page.
        show: which texts are embedded; ``redacted`` is fit for pages that are passed on.
    """
    shown = [entry for entry in entries if entry.id in replies]
    verdicts: dict[tuple[str, str], dict[str, Reply]] = {}
    for entry in shown:
        for reply in replies[entry.id]:
            verdicts.setdefault(reply.key, {})[entry.id] = reply
    flipped = [by for by in verdicts.values() if len({reply.verdict for reply in by.values()}) > 1]
    texts = _Texts()
    prompts = [_prompt(next(iter(by.values())), texts, show) for by in flipped]
    embedded: dict[str, list[list[int | None]]] = {}
    order = sorted(shown, key=lambda entry: (entry.id not in first, not entry.is_final))
    left_out, size_before = 0, texts.size
    for entry in order if show != "none" else ():
        if (texts.size - size_before) * PACKED_SHARE > budget:
            left_out += 1
            continue
        embedded[entry.id] = [
            [number, *_reply(by[entry.id], texts, show)] for number, by in enumerate(flipped) if entry.id in by
        ]
    data = {
        "models": [{"id": entry.id, "title": entry.title} for entry in shown],
        "letters": {letter: name for name, letter in LETTERS.items()},
        "tones": VERDICTS,
        "prompts": prompts,
        "verdicts": {
            entry.id: "".join(LETTERS[by[entry.id].verdict] if entry.id in by else ABSENT for by in flipped)
            for entry in shown
        },
        "replies": embedded,
        "texts": texts.items,
    }
    return Transcripts(data, len(flipped), left_out, len(entries) - len(shown))


def _is_embedded(reply: Reply, show: Replies) -> bool:
    return show == "all" or (show == "redacted" and reply.kind != "harmful")


def _prompt(reply: Reply, texts: _Texts, show: Replies) -> dict[str, Any]:
    found: dict[str, Any] = {"id": reply.id, "set": reply.set_name, "kind": reply.kind, "category": reply.category}
    return {**found, "text": texts.add(reply.prompt)} if _is_embedded(reply, show) else found


def _reply(reply: Reply, texts: _Texts, show: Replies) -> list[int | None]:
    """Return the numbers of the reply's text (None where it is redacted) and of the judges' words, and its length."""
    text = texts.add(reply.text) if _is_embedded(reply, show) else None
    return [text, texts.add(reply.judges), len(reply.text.split())]
