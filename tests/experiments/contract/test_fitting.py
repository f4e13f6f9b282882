from __future__ import annotations

import pytest
import torch

from experiments.contract import fitting
from experiments.contract.fitting import Recorder
from experiments.contract.outcome import relative_difference
from experiments.contract.runner import fixed_conditions
from experiments.contract.subject import registered_subject
from experiments.contract.workbench import Workbench

ROUNDING = 7e-7
"""What two ways to cut a step differ by in the first gradient."""


class Rounding(Recorder):
    """Disturbs every gradient by as much as rounding does."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        noise = torch.Generator().manual_seed(trainer.global_step)
        for parameter in pl_module.parameters():
            if parameter.grad is not None:
                size = ROUNDING * parameter.grad.pow(2).mean().sqrt()
                parameter.grad.add_(size * torch.randn(parameter.shape, generator=noise))
        super().on_before_optimizer_step(trainer, pl_module, optimizer)


@pytest.mark.parametrize(("eps", "is_magnified"), [(fitting.ADAM_EPS, False), (1e-8, True)])
def test_rounding_stays_rounding_in_the_weights(eps, is_magnified, tmp_path, monkeypatch):
    monkeypatch.setattr(fitting, "ADAM_EPS", eps)
    with fixed_conditions(tmp_path):
        bench = Workbench([registered_subject("booster"), registered_subject("deep_alignment")], tmp_path)
        plain, disturbed = (bench.fit(bench.create(), recorder=kind()).recorder for kind in (Recorder, Rounding))
    assert 1e-8 < relative_difference(disturbed.gradient, plain.gradient) < 2 * ROUNDING
    difference = relative_difference(disturbed.trained, plain.trained)
    assert difference > 0
    assert (difference > 2e-7) is is_magnified, difference
