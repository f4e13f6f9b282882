"""The plain request: what every other attack is compared with.

What it does: sends each harmful request as it stands, once, and judges the greedy reply.
Formula: none.
Reference: none; this is the measurement of every evaluation of safety.
Deviations: none.
Cost: 1 query a request.
Needs: nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from experiments.attacks.interface import Query, register_attack
from experiments.attacks.static import StaticAttack
from framework.examples import Prompt

__all__ = ["Direct", "DirectConfig"]


@dataclass(frozen=True)
class DirectConfig:
    """Settings of the plain request: there are none."""


@register_attack("direct", config=DirectConfig)
class Direct(StaticAttack):
    """Sends the request as it stands."""

    is_plain = True

    @property
    def budget(self) -> int:
        """One query a request."""
        return 1

    def variants(self, request: Prompt, *, seed: int) -> list[Query]:
        """Return the request itself."""
        return [Query(request, request)]
