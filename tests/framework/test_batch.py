from __future__ import annotations

import pytest
import torch

from framework.batch import IGNORE, collate
from framework.chat import EncodedExample

ROWS = [EncodedExample((5, 6, 7, 8), 2), EncodedExample(tuple(range(10, 20)), 9)]


@pytest.fixture
def batch():
    return collate(ROWS, example_ids=[4, 9], pad_id=0, step_reply_tokens=11, step_micro_batches=3)


def test_rows_are_padded_on_the_right_to_a_multiple_of_8(batch):
    assert batch.input_ids.shape == (2, 16)
    assert batch.input_ids[0].tolist() == [5, 6, 7, 8] + [0] * 12
    assert batch.attention_mask.sum(dim=1).tolist() == [4, 10]
    assert collate(ROWS[:1], example_ids=[0], pad_id=0, step_reply_tokens=2).input_ids.shape == (1, 8)
    assert collate(ROWS, example_ids=[0, 1], pad_id=0, step_reply_tokens=2, multiple=1).input_ids.shape == (2, 10)


def test_labels_stand_on_reply_positions_alone(batch):
    assert batch.labels[0].tolist() == [IGNORE, IGNORE, 7, 8] + [IGNORE] * 12
    assert (batch.labels != IGNORE).sum(dim=1).tolist() == [row.num_reply_tokens for row in ROWS]
    assert batch.labels[1, 9] == 19


def test_a_padding_id_inside_a_reply_still_carries_loss():
    batch = collate([EncodedExample((3, 0, 0), 1)], example_ids=[0], pad_id=0, step_reply_tokens=2)
    assert batch.labels[0, :4].tolist() == [IGNORE, 0, 0, IGNORE]


def test_the_counts_of_the_step_are_carried(batch):
    assert (batch.step_reply_tokens, batch.step_micro_batches, batch.num_tokens) == (11, 3, 14)
    assert batch.example_ids.tolist() == [4, 9]
    assert set(batch.model_inputs) == {"input_ids", "attention_mask"}


def test_moving_a_batch_keeps_its_counts(batch):
    moved = batch.to("cpu")
    assert moved is not batch
    assert moved.num_tokens == 14
    assert moved.step_micro_batches == 3
    assert torch.equal(moved.labels, batch.labels)
    assert batch.to("meta").input_ids.device.type == "meta"


def test_an_empty_batch_is_refused():
    with pytest.raises(ValueError, match="empty"):
        collate([], example_ids=[], pad_id=0, step_reply_tokens=1)
