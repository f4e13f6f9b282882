"""Self-Mined Hardness: learn from the prompts the model itself sometimes fails, and do not forget to answer."""

from __future__ import annotations

from methods.smh.config import SMHConfig
from methods.smh.functional import Decision, adjust_ratio, initial_order, stream
from methods.smh.method import SMH

__all__ = ["SMH", "Decision", "SMHConfig", "adjust_ratio", "initial_order", "stream"]
