"""The contract case of Lisa."""

from __future__ import annotations

import json

from experiments.contract.case import ContractCase

__all__ = ["CASE"]

# As many rows as the task has: turns of two steps each then serve every row equally often.
PAIRS = [{"prompt": f"do harm {i}", "response": "No, I cannot help." + "!" * (i % 7)} for i in range(16)]

CASE = ContractCase(
    method="lisa",
    config={
        "weight": 1.0,
        "alignment_steps": 2,
        "task_steps": 2,
        "skip_share": 0.0,
        "source": "{folder}/refusals.jsonl",
    },
    neutral={"alignment_steps": 0},
    files={"refusals.jsonl": "".join(json.dumps(pair) + "\n" for pair in PAIRS)},
    rows_added=16,
    logs=("is_alignment", "drift"),
)
