"""Forget and retain rows in files, and short runs of a tiny model with a method that unlearns."""

from __future__ import annotations

import json

from datamodules.finetune import FineTuneDataModule
from experiments.contract.tiny import task_examples
from framework.chat import ChatEncoder
from framework.composition import prepare_methods
from framework.files import ArtifactStore
from framework.method import MethodStore
from tests.conftest import make_model, make_tokenizer
from tests.tiny_runs import make_lora, run_fit

STEPS = 3


def write_pairs(path, count, *, reply="Sure, first you"):
    rows = [{"prompt": f"ask {i}", "response": reply + "!" * i} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def make_store(folder):
    make_model().save_pretrained(folder / "start")
    return MethodStore(ArtifactStore(folder / "store"), models={"start": folder / "start"})


def make_data(**options):
    settings = {"batch_size": 4, "total_steps": STEPS, "max_length": 200, **options}
    data = FineTuneDataModule(ChatEncoder(make_tokenizer()), **settings)
    data.add_source("task", task_examples(12))
    return data


def trained(store, *methods, model=None):
    """The run after three steps of four rows."""
    model, data = make_lora(make_model(), warm=False) if model is None else model, make_data()
    prepare_methods(methods, model, data, store)
    return run_fit(model, methods, data=data, total_steps=STEPS, accumulate_grad_batches=1, max_steps=STEPS)
