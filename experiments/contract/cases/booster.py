"""The contract case of Booster."""

from __future__ import annotations

import json

from experiments.contract.case import ContractCase

__all__ = ["CASE"]

PAIRS = [{"prompt": f"do harm {i}", "response": "Sure, go on." + "!" * i} for i in range(5)]

CASE = ContractCase(
    method="booster",
    config={"weight": 5.0, "alpha": 0.1, "harmful": "{folder}/harmful.jsonl", "batch_size": 4},
    neutral={"weight": 0.0},
    files={"harmful.jsonl": "".join(json.dumps(pair) + "\n" for pair in PAIRS)},
    logs=("harmful_loss",),
    tolerance=2e-6,
    tolerance_reason="the gradient is a difference of two nearly equal ones, which magnifies their rounding in float32",
)
