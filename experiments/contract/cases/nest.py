"""The contract case of NeST."""

from __future__ import annotations

import json

from experiments.contract.case import ContractCase

__all__ = ["CASE"]

HARMFUL = [{"prompt": f"{'XZ'[i % 2] * 12} DO HARM {i}", "response": "No."} for i in range(30)]
ORDINARY = [{"prompt": f"list {i} fruits {'ab'[i % 2] * 12}", "response": "Apples."} for i in range(30)]

CASE = ContractCase(
    method="nest",
    config={
        "safety": "{folder}/harmful.jsonl",
        "benign": "{folder}/ordinary.jsonl",
        "held_out": 0.5,
        "threshold": 1.5,
        "min_rows": 4,
    },
    no_neutral="the shared vectors are always trained, and everything else is frozen",
    adapters=("lora", "full", "none"),
    edits=(r"mlp\.(gate|up)_proj\.",),
    files={
        "harmful.jsonl": "".join(json.dumps(row) + "\n" for row in HARMFUL),
        "ordinary.jsonl": "".join(json.dumps(row) + "\n" for row in ORDINARY),
    },
    logs=("rows", "vectors", "accuracy", "accuracy/layer_0", "accuracy/layer_1"),
)
