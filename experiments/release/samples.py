"""The recorded replies inside a bundle: what verification compares with, and no harmful text.

A reply to a harmful prompt is kept as one short hash for each beginning of it that ends with a word. With the hashes
one can tell how far a new reply agrees with it, and whether it is the same to the last sign, but nobody reads it by
accident. That is no secret: whoever has the model can make it say the same again.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.release.names import without_paths
from framework.errors import DataError

__all__ = ["agreement", "bundle_sample", "exact_hash", "has_image", "prefix_hashes", "sample_key", "select_samples"]

KEPT = (
    "id",
    "set",
    "kind",
    "category",
    "prompt",
    "prefill",
    "num_tokens",
    "finished",
    "verdicts",
    "degenerate",
    "correct",
)
HASHED = ("harmful",)
_DIGITS = 12
"""Hex digits of a hash: two beginnings of two replies are taken for the same once in 10^14 times."""


def sample_key(sample: Mapping[str, Any]) -> str:
    """Return what a prompt is found by: its set and its id."""
    return f"{sample['set']}/{sample['id']}"


def has_image(sample: Mapping[str, Any]) -> bool:
    """Return whether a picture was shown with the prompt: no bundle holds it, so the reply cannot be made again."""
    return bool(sample.get("image"))


def bundle_sample(
    sample: Mapping[str, Any], *, names: Mapping[str, str] | None = None, full: bool = False
) -> dict[str, Any]:
    """Return the line of a bundle for a line of a run.

    Args:
        sample: line of ``samples.jsonl``.
        names: short names of the files that sets were read from; prompts and replies stay as they are.
        full: keep replies to harmful prompts readable.
    """
    line = {key: sample[key] for key in KEPT if key in sample}
    line |= without_paths({"set": sample["set"], "id": sample["id"]}, names or {})
    if has_image(sample):
        line["image"] = Path(sample["image"]).name
    reply = str(sample["reply"])
    if full or sample["kind"] not in HASHED:
        return line | {"reply": reply}
    return line | {"reply_hashes": prefix_hashes(reply)}


def prefix_hashes(reply: str) -> list[str]:
    """Return a hash of each beginning of ``reply`` that ends with a word, the whole reply last.

    Example:
        >>> [len(prefix_hashes(text)) for text in ("", "one", "one two", "one two ")]
        [1, 1, 2, 3]
    """
    pieces = re.findall(r"\s*\S+|\s+$", reply) or [""]
    digest = hashlib.sha256(b"seawall reply\0")
    found = []
    for piece in pieces:
        digest.update(piece.encode())
        found.append(digest.hexdigest()[:_DIGITS])
    return found


def exact_hash(reply: str) -> str:
    """Return the hash of a whole reply."""
    return prefix_hashes(reply)[-1]


def agreement(sample: Mapping[str, Any], reply: str) -> float:
    """Return how much of the longer of two replies, in words, is a common beginning: 1 only if they are the same.

    Args:
        sample: line of a bundle.
        reply: the new one.

    Raises:
        DataError: the line holds neither a reply nor hashes of one.
    """
    recorded = _recorded_hashes(sample)
    new = prefix_hashes(reply)
    if recorded == new:
        return 1.0
    common = next(
        (i for i, (a, b) in enumerate(zip(recorded, new, strict=False)) if a != b), min(len(recorded), len(new))
    )
    return common / max(len(recorded), len(new))


def _recorded_hashes(sample: Mapping[str, Any]) -> list[str]:
    if isinstance(sample.get("reply"), str):
        return prefix_hashes(sample["reply"])
    hashes = sample.get("reply_hashes")
    if not isinstance(hashes, list) or not hashes or not all(isinstance(h, str) for h in hashes):
        raise DataError(f"Expected sample {sample.get('id')!r} to hold a reply or its hashes, but got neither.")
    return hashes


def select_samples(
    samples: Sequence[Mapping[str, Any]], excluded: Collection[str], *, keeps_openings: bool
) -> tuple[list[Mapping[str, Any]], int]:
    """Return the samples of a bundle, and how many were left out for a forced opening that was sampled from a model.

    Such an opening is harmful text itself; without it the reply cannot be made again.

    Args:
        samples: of the run.
        excluded: prompts to leave out, by ``sample_key``.
        keeps_openings: whether openings may be shipped.
    """
    wanted = [sample for sample in samples if sample_key(sample) not in excluded]
    kept = [sample for sample in wanted if keeps_openings or not sample.get("prefill")]
    return kept, len(wanted) - len(kept)
