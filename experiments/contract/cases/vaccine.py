"""The contract case of Vaccine."""

from __future__ import annotations

from experiments.contract.case import ContractCase

__all__ = ["CASE"]

CASE = ContractCase(method="vaccine", config={"rho": 2.0}, neutral={"rho": 0.0}, logs=("gradient_norm",))
