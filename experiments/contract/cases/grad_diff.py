"""The contract case of gradient difference, with retain rows of its own."""

from __future__ import annotations

import json

from experiments.contract.case import ContractCase

__all__ = ["CASE"]

FORGET = [{"prompt": f"do harm {i}", "response": "Sure, first you" + "!" * i} for i in range(6)]
RETAIN = [{"prompt": f"list {i} fruits", "response": "Apples" + ", pears" * i} for i in range(5)]

CASE = ContractCase(
    method="grad_diff",
    config={"source": "{folder}/forget.jsonl", "retain": "{folder}/retain.jsonl", "gamma": 0.5, "alpha": 0.7},
    neutral={"weight": 0.0},
    files={
        "forget.jsonl": "".join(json.dumps(pair) + "\n" for pair in FORGET),
        "retain.jsonl": "".join(json.dumps(pair) + "\n" for pair in RETAIN),
    },
    logs=("forget_loss", "retain_loss"),
)
