"""What a text transform is: a pure function of a text, a strength and a source of chance, with what is known of it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

__all__ = ["Apply", "Group", "Transform", "counted", "drawn_sentences"]

Group = Literal["words", "characters", "encoding", "wrapping", "framing"]
"""words: whole words change; characters: signs inside words; encoding: a cipher with an instruction to decode;
wrapping: the text becomes data of some format; framing: sentences around it."""
Apply = Callable[[str, float, random.Random], str]
"""(text, strength, chance) -> text"""


@dataclass(frozen=True)
class Transform:
    """A named way to rewrite a text; none of them looks at what the text is about.

    At strength 0 every transform returns the text as it is. A text grows to at most ``factor`` times its bytes in UTF-8
    plus ``extra``.
    """

    name: str
    group: Group
    summary: str
    """What it does and what its strength means, in one line."""
    apply: Apply
    factor: float
    extra: int
    undo: Callable[[str], str] | None = None
    """Gives the text back from the result alone, whatever strength and chance were; None where nothing can.

    Of a text that is ASCII and holds none of the signs the transform itself writes."""

    @property
    def is_invertible(self) -> bool:
        """Whether the text can be had back from the result alone."""
        return self.undo is not None


def counted(strength: float, most: int) -> int:
    """Return how many of ``most`` a strength stands for: none at 0, at least one above, all at 1.

    Example:
        >>> [counted(strength, 4) for strength in (0.0, 0.1, 0.5, 1.0)]
        [0, 1, 2, 4]
    """
    return 0 if strength <= 0 else max(1, round(strength * most))


def drawn_sentences(bank: tuple[str, ...], strength: float, chance: random.Random) -> str:
    """Return so many different sentences of a bank as the strength stands for, joined by spaces."""
    return " ".join(chance.sample(bank, counted(strength, len(bank))))
