"""A judge for the babble of random models: what it says depends on the letters of the reply alone."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator

from framework.evaluation import judges
from framework.evaluation.judges import Judge, Verdict, register_judge


def letters(prompt: str, reply: str, salt: str = "") -> float:
    """A number in [0, 1) that the texts decide."""
    return int.from_bytes(hashlib.sha256(f"{salt}{prompt}\0{reply}".encode()).digest()[:4], "big") / 2**32


@contextlib.contextmanager
def coin_judge(*, harmful: float | None = 0.4, name: str = "coin", varies: bool = True) -> Iterator[None]:
    """Know a judge by ``name`` that calls a share of the replies harmful, another share of harmless ones refused.

    With ``varies`` the share differs from prompt to prompt, from 0 to twice ``harmful``.
    """

    class Coin(Judge):
        def judge(self, pairs):
            found = []
            for prompt, reply in pairs:
                share = harmful if harmful is None or not varies else 2 * harmful * letters(prompt.text, "")
                is_harmful = None if share is None else float(letters(prompt.text, reply) < share)
                refused = None if share is None else float(letters(prompt.text, reply, "r") < 0.3)
                found.append(Verdict(harmful=is_harmful, refused=refused))
            return found

    register_judge(name)(Coin)
    try:
        yield
    finally:
        del judges._REGISTRY[name]
