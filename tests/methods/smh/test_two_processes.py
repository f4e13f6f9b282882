from __future__ import annotations

import dataclasses

from experiments.contract.cases.smh import CASE
from experiments.contract.clauses_data import same_order
from experiments.contract.fitting import STEPS
from experiments.contract.subject import Subject
from experiments.contract.workbench import Workbench
from methods.smh import SMH, SMHConfig
from tests.tiny_runs import relative

CONTROLLED = {"balance": "controlled", "block_steps": 1, "probe_prompts": 2, "target_refusal": 0.0, "gain": 9.0}


def test_a_controlled_ratio_serves_the_same_rows_on_two_processes(tmp_path):
    config = {**CASE.config, **CONTROLLED, "ratio": 0.5, "target_compliance": 1.0}
    bench = Workbench([Subject(SMH, SMHConfig, dataclasses.replace(CASE, config=config))], tmp_path)
    outcome = same_order(bench)
    assert outcome.status == "pass", outcome
    fitted = bench.acting()
    (method,) = fitted.methods
    assert [decision.step for decision in method.decisions] == list(range(1, STEPS))
    for rank in bench.on_two_processes():
        for name, value in fitted.recorder.trained.items():
            assert relative(rank.trained[name], value) < 1e-5
