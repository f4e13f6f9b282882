"""What is measured of an attacked model: what its measurement is found again by."""

from __future__ import annotations

import pytest
import torch

from experiments.attacks import attacked_models
from experiments.attacks.runner import prepare_suite
from framework.evaluation.metrics import Mean
from tests.experiments.attacks.tiny_targets import write_model

SUITE = """
limit: 2
max_new_tokens: 2
utility: {benign_nll: true}
target: {system: "%s", accelerator: cpu, threads: 1}
attacks: {direct: {}}
"""


@pytest.fixture(autouse=True)
def threads():
    """Give back the threads that a suite takes."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def nll_of(model, encoder, examples, *, batch_size):
    value = float(len(encoder.system or ""))
    return Mean("nll", value, 10.0, 2, value, value)


def test_the_system_message_of_the_utility_decides_it_whatever_the_attacker_sends(tmp_path, monkeypatch):
    monkeypatch.setenv("SEAWALL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(attacked_models, "mean_nll", nll_of)
    model = write_model(tmp_path / "model")
    found = []
    for system in ("one", "fourteen", "one"):
        path = tmp_path / "tried.yaml"
        path.write_text(SUITE % system)
        measure = prepare_suite(str(model), str(path)).stage.measure
        found.append(measure.measure(model, "w", system="obey"))
    assert [one.utility["benign_nll"]["value"] for one in found] == [3.0, 8.0, 3.0]
    assert [one.is_reused for one in found] == [False, False, True]
