"""Fits of the tiny model as one of two gloo processes; the first writes its results to the path it is given."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.strategies import DDPStrategy

from framework.method import Method
from tests.conftest import make_model
from tests.tiny_runs import OneLayer, TinyData, TokenTerm, WeightTerm, make_lora, run_fit


def fit(model: torch.nn.Module, methods: list[Method], **options: Any) -> dict[str, torch.Tensor]:
    strategy = DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=60))
    run = run_fit(model, methods, strategy=strategy, devices=2, plugins=[LightningEnvironment()], **options)
    return {"weights": run.weights.clone(), "gradient": run.gradients[0]}


def main(path: Path) -> None:
    torch.set_num_threads(1)
    results = {}
    for cut in (1, 2):
        methods = [TokenTerm(0.3), WeightTerm(0.1)]
        results[f"micro-batches {cut}"] = fit(make_model(), methods, data=TinyData(micro_batches=cut))
    results["lora"] = fit(make_lora(make_model()), [TokenTerm(0.3)])
    results["selection"] = fit(make_model(), [OneLayer()])
    if torch.distributed.get_rank() == 0:
        torch.save(results, path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
