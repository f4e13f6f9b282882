"""The guard on two gloo processes: the first one measures and decides, both follow, and one process ends the same."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.callbacks.guarded_fits import SHARED, fit, guard_at, methods_for, trained
from tests.conftest import make_model
from tests.tiny_runs import make_lora, relative


@pytest.fixture(scope="module")
def bound():
    """A margin that plain training falls below after its second step."""
    _, steps = fit(None)
    start = trained(make_lora(make_model()))
    margins = [1.0 - float((steps.weights[step] - start).norm()) for step in (2, 3)]
    return sum(margins) / 2


@pytest.fixture(scope="module")
def found(tmp_path_factory, bound):
    folder = tmp_path_factory.mktemp("guarded")
    script = Path(__file__).with_name("guarded_fits.py")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"PYTHONPATH": str(script.parents[2]), "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    processes = []
    try:
        for rank in range(2):
            environment = {**os.environ, **shared, "MASTER_PORT": port, "NODE_RANK": "0", "LOCAL_RANK": str(rank)}
            command = [sys.executable, str(script), str(folder), repr(bound)]
            with (folder / f"{rank}.log").open("w") as log:
                processes.append(
                    subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
                )
        codes = [process.wait(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0, 0], "\n".join((folder / f"{rank}.log").read_text()[-3000:] for rank in range(2))
    return folder


@pytest.mark.parametrize("name", list(SHARED))
def test_two_processes_decide_alike_and_end_as_one(found, bound, name):
    first, second = (json.loads((found / f"{rank}.json").read_text())[name] for rank in range(2))
    assert first == second
    assert first["decisions"]
    ours, theirs = (torch.load(found / f"{name}-{rank}.pt", weights_only=True) for rank in range(2))
    assert torch.equal(ours, theirs)
    guard = guard_at(bound, SHARED[name])
    run, _ = fit(guard, methods=methods_for(SHARED[name]))
    assert first["step"] == run.trainer.global_step
    assert [d["step"] for d in first["decisions"]] == [d["step"] for d in guard.decisions]
    assert relative(ours, run.weights) < 1e-5
