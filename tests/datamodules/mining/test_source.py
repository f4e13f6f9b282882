from __future__ import annotations

import numpy as np
import pytest
import torch

from datamodules.finetune import FineTuneDataModule
from datamodules.sampler import StepBatchSampler
from experiments.contract.tiny import make_tokenizer, task_examples
from framework.chat import ChatEncoder
from framework.errors import ConfigError, WiringError


def make_data(**options):
    data = FineTuneDataModule(ChatEncoder(make_tokenizer()), batch_size=4, total_steps=6, max_length=200, **options)
    data.add_source("task", task_examples(10))
    return data


def test_steps_that_were_not_served_can_be_replaced():
    data = make_data()
    batches = iter(data.train_dataloader())
    first = [next(batches).example_ids.tolist() for _ in range(2)]
    data.reorder(2, [7] * 4 + [1, 2, 3, 4] * 3)
    rest = list(batches)
    assert [batch.example_ids.tolist() for batch in rest] == [[7] * 4] + [[1, 2, 3, 4]] * 3
    tokens = data.encoded[7].num_reply_tokens
    assert rest[0].step_reply_tokens == 4 * tokens
    assert len(first) == 2


def test_what_a_resumed_run_checks_does_not_change():
    data = make_data()
    data.train_dataloader()
    before = data.state_dict()
    data.reorder(0, [1] * 24)
    assert data.state_dict() == before


def test_the_order_changes_only_where_a_loader_is_in_use():
    with pytest.raises(WiringError, match=r"to change the order of its rows, but got no loader. Call it while train"):
        make_data().reorder(0, [0] * 24)
    data = make_data(num_workers=2)
    data.train_dataloader()
    with pytest.raises(WiringError, match=r"but got 2 workers, which fetch steps ahead"):
        data.reorder(0, [0] * 24)


def sampler(rank=0, world_size=1):
    return StepBatchSampler(
        [3, 5, 7, 9], batch_size=4, micro_batch_size=1, total_steps=3, seed=0, rank=rank, world_size=world_size
    )


def test_two_processes_share_the_replaced_steps():
    rows = np.array([0, 1, 2, 3, 3, 2, 1, 0])
    served = []
    for rank in range(2):
        own = sampler(rank, 2)
        batches = iter(own)
        next(batches), next(batches)
        own.replace_steps(1, rows)
        served.append([(batch.step, list(batch), batch.step_reply_tokens) for batch in batches])
    assert served[0] == [(1, [0], 24), (1, [2], 24), (2, [3], 24), (2, [1], 24)]
    assert served[1] == [(1, [1], 24), (1, [3], 24), (2, [2], 24), (2, [0], 24)]


@pytest.mark.parametrize(
    ("start", "rows", "text"),
    [
        (1, [0] * 7, "Expected 8 rows for the steps from 1 to 3, but got 7"),
        (4, [], "Expected 0 rows for the steps from 4 to 3, but got 0"),
        (2, [0, 1, 2, 4], "Expected row numbers from 0 to 3, but got 0 to 4"),
        (2, [-1, 1, 2, 3], "Expected row numbers from 0 to 3, but got -1 to 3"),
    ],
)
def test_rows_that_do_not_fit_are_refused(start, rows, text):
    with pytest.raises(ConfigError, match=text):
        sampler().replace_steps(start, np.array(rows, dtype=np.int64))


def test_the_micro_batches_of_a_step_are_those_that_are_served():
    data = make_data(micro_batch_size=2)
    with pytest.raises(WiringError, match="Expected a training loader to look at a step of, but got none"):
        data.step_batches(0)
    served = list(data.train_dataloader())
    for step in range(6):
        for ours, theirs in zip(data.step_batches(step), served[2 * step : 2 * step + 2], strict=True):
            assert torch.equal(ours.input_ids, theirs.input_ids)
            assert torch.equal(ours.labels, theirs.labels)
            assert ours.example_ids.tolist() == theirs.example_ids.tolist()
            assert (ours.step_reply_tokens, ours.step_micro_batches) == (theirs.step_reply_tokens, 2)
