"""`FineTuneModule` on two gloo processes gives what one process gives."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import make_model
from tests.tiny_runs import OneLayer, TinyData, TokenTerm, WeightTerm, make_lora, relative, run_fit


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_two_processes_equal_one(two_processes, micro_batches):
    expected = run_fit(make_model(), [TokenTerm(0.3), WeightTerm(0.1)], data=TinyData(micro_batches=micro_batches))
    found = two_processes[f"micro-batches {micro_batches}"]
    assert relative(found["gradient"], expected.gradients[0]) < 1e-6
    assert relative(found["weights"], expected.weights) < 1e-6


def test_two_processes_equal_one_with_frozen_parameters(two_processes):
    lora = run_fit(make_lora(make_model()), [TokenTerm(0.3)])
    assert relative(two_processes["lora"]["weights"], lora.weights) < 1e-6
    selection = run_fit(make_model(), [OneLayer()])
    assert relative(two_processes["selection"]["weights"], selection.weights) < 1e-6


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """Results of ``two_processes.py``, run once for all tests of this file."""
    folder = tmp_path_factory.mktemp("ddp")
    script = Path(__file__).with_name("two_processes.py")
    root = script.parents[2]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        **os.environ,
        "PYTHONPATH": str(root),
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "NODE_RANK": "0",
    }
    processes = []
    try:
        for rank in range(2):
            with (folder / f"{rank}.log").open("w") as log:
                command = [sys.executable, str(script), str(folder / "results.pt")]
                environment = shared | {"LOCAL_RANK": str(rank)}
                processes.append(
                    subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
                )
        codes = [process.wait(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    logs = "\n".join((folder / f"{rank}.log").read_text()[-3000:] for rank in range(2))
    assert codes == [0, 0], logs
    return torch.load(folder / "results.pt", weights_only=True)
