"""The contract case of gradient ascent, in its bounded variant."""

from __future__ import annotations

import json

from experiments.contract.case import ContractCase

__all__ = ["CASE"]

FORGET = [{"prompt": f"do harm {i}", "response": "Sure, first you" + "!" * i} for i in range(6)]

CASE = ContractCase(
    method="gradient_ascent",
    config={"source": "{folder}/forget.jsonl", "bound": 7.0, "task_weight": 0.25},
    neutral={"weight": 0.0},
    files={"forget.jsonl": "".join(json.dumps(pair) + "\n" for pair in FORGET)},
    logs=("forget_loss",),
)
