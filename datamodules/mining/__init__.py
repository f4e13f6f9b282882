"""Mining a model for prompts it sometimes fails, with its own safe replies."""

from __future__ import annotations

from datamodules.mining.hardness import CLASSES, Hardness, Replay, StopRule, replay, settled_count
from datamodules.mining.mine import Miner, mine_sets
from datamodules.mining.mined_file import read_mined, write_mined
from datamodules.mining.pool import mining_pools
from datamodules.mining.selection import MinedPrompt, MinedSets, select_prompts
from datamodules.mining.store import RolloutStore, StoredRollout
from framework.mining_settings import MiningSettings

__all__ = [
    "CLASSES",
    "Hardness",
    "MinedPrompt",
    "MinedSets",
    "Miner",
    "MiningSettings",
    "Replay",
    "RolloutStore",
    "StopRule",
    "StoredRollout",
    "mine_sets",
    "mining_pools",
    "read_mined",
    "replay",
    "select_prompts",
    "settled_count",
    "write_mined",
]
