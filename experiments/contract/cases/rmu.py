"""The contract case of RMU: the states after the second layer, of which alone parameters are trained."""

from __future__ import annotations

from experiments.contract.case import ContractCase
from experiments.contract.cases.grad_diff import CASE as GRAD_DIFF

__all__ = ["CASE"]

CASE = ContractCase(
    method="rmu",
    config={"source": "{folder}/forget.jsonl", "layer": 1, "train_layers": [1], "alpha": 5.0, "task_weight": 0.25},
    neutral={"weight": 0.0},
    files=GRAD_DIFF.files,
    logs=("forget_loss", "retain_loss", "cosine"),
    frozen=(r"layers\.0\.", "embed_tokens"),
)
