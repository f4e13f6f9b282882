"""NeST: the card is in ``methods.nest.method``."""

from __future__ import annotations

from methods.nest.config import NeSTConfig
from methods.nest.method import NeST
from methods.nest.patch import Patch, read_patch, write_patch
from methods.nest.selection import Selection, find_neurons

__all__ = ["NeST", "NeSTConfig", "Patch", "Selection", "find_neurons", "read_patch", "write_patch"]
