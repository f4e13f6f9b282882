"""Settings as W&B's sweep agents write them: ``--key=value`` instead of ``key=value``."""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["agent_settings", "is_agent_setting"]

SETTING = re.compile(r"--([A-Za-z_][\w-]*(?:\.[\w-]+)*)=(.*)", re.DOTALL)
METHOD = "method="
OTHERS = "methods."


def is_agent_setting(text: str) -> bool:
    """Return whether an argument is a setting in the agents' form.

    Example:
        >>> [is_agent_setting(text) for text in ("--stages.finetune.max_steps=9", "--json", "seed=1")]
        [True, False, False]
    """
    return SETTING.fullmatch(text) is not None


def agent_settings(texts: Sequence[str]) -> list[str]:
    """Return settings in either form as ``key=value``.

    An agent passes every parameter of the sweep; of those written as ``--methods.NAME.<field>`` only those of the
    method that is chosen matter, and the others are left out.

    Example:
        >>> agent_settings(["seed=1", "--method=asft", "--methods.asft.weight=2", "--methods.pact.weight=3"])
        ['seed=1', 'method=asft', 'methods.asft.weight=2']
    """
    given = [(text[2:] if is_agent_setting(text) else text, is_agent_setting(text)) for text in texts]
    chosen = {name for text, _ in given if text.startswith(METHOD) for name in text.removeprefix(METHOD).split(",")}
    return [
        text
        for text, is_agents in given
        if not (is_agents and chosen and text.startswith(OTHERS) and text.split(".")[1] not in chosen)
    ]
