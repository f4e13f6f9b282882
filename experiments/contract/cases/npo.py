"""The contract case of NPO, the stage's rows being retained."""

from __future__ import annotations

from experiments.contract.case import ContractCase
from experiments.contract.cases.grad_diff import CASE as GRAD_DIFF

__all__ = ["CASE"]

CASE = ContractCase(
    method="npo",
    config={"source": "{folder}/forget.jsonl", "alpha": 0.7},
    neutral={"weight": 0.0},
    files=GRAD_DIFF.files,
    logs=("forget_loss", "retain_loss", "npo_loss", "log_ratio"),
)
