"""A process that mines a tiny model into a folder, slowly, and writes what it chose; meant to be killed."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

from datamodules.mining import MiningSettings, mine_sets
from experiments.contract.tiny import TinyModel, make_tokenizer
from framework.chat import ChatEncoder
from framework.files import ArtifactStore
from tests.coin_judge import coin_judge


def main(folder: Path, pause: float, *, is_adaptive: bool) -> None:
    folder.mkdir(exist_ok=True)
    settings = MiningSettings(
        prompts=16, rollouts=8, benign_prompts=6, max_new_tokens=8, judges=["coin"], rows=6, adaptive=is_adaptive
    )

    def progress(done: int, total: int) -> None:
        time.sleep(pause)

    with coin_judge():
        mined = mine_sets(
            TinyModel(shift=0.4).build(),
            ChatEncoder(make_tokenizer()),
            settings,
            model_key="tiny",
            artifacts=ArtifactStore(folder),
            progress=progress,
        )
    rows = mined.rows(select="hard", count=None, share=1.0, seed=0)
    chosen = [[row.id, row.reply, row.is_complete] for side in rows for row in side]
    (folder / "chosen.json").write_text(json.dumps(chosen))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), float(sys.argv[2]), is_adaptive=sys.argv[3] == "adaptive")
