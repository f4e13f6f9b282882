"""The contract case of Self-Mined Hardness: prompts that were mined before, read from a file."""

from __future__ import annotations

import json
from typing import Any

from experiments.contract.case import ContractCase

__all__ = ["CASE"]


def _prompt(kind: str, number: int) -> dict[str, Any]:
    harmful = (5 * number) % 8 if kind == "harmful" else 0
    replies = [[turn, f"{kind} reply {number}." + "!" * (3 * turn + number), turn != 1] for turn in range(3)]
    counts = [harmful, 8 - harmful, 8]
    return {
        "id": f"{kind}-{number}",
        "kind": kind,
        "prompt": f"{kind} {number}",
        "counts": counts,
        "targets": replies,
    }


MINED = [_prompt("harmful", number) for number in range(6)] + [_prompt("benign", number) for number in range(7)]

CASE = ContractCase(
    method="smh",
    config={"mined": "{folder}/mined.jsonl", "count": 4, "ratio": 1.5},
    neutral={"count": 0},
    files={"mined.jsonl": "".join(json.dumps(line) + "\n" for line in MINED)},
    rows_added=10,
)
