"""The contract case of circuit breakers, the stage's rows being retained."""

from __future__ import annotations

from experiments.contract.case import ContractCase
from experiments.contract.cases.grad_diff import CASE as GRAD_DIFF

__all__ = ["CASE"]

CASE = ContractCase(
    method="circuit_breakers",
    config={"source": "{folder}/forget.jsonl", "layers": [0, 1], "task_weight": 0.25},
    neutral={"weight": 0.0},
    adapters=("lora",),
    files=GRAD_DIFF.files,
    logs=("forget_loss", "retain_loss", "cosine", "retain_strength"),
)
