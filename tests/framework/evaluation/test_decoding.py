from __future__ import annotations

import pytest
import torch
from transformers.cache_utils import DynamicLayer

from framework.evaluation.decoding import PreallocatedLayer, common_prefix_length


@pytest.mark.parametrize(
    ("rows", "length"),
    [
        ([[1, 2, 3], [1, 2, 4]], 2),
        ([[1, 2, 3], [1, 2, 3]], 2),
        ([[1, 2], [1, 2, 3]], 1),
        ([[5, 1], [6, 1]], 0),
        ([[1]], 0),
        ([[1, 9, 2], [1, 3, 2], [1, 9, 4]], 1),
    ],
)
def test_common_prefix_leaves_a_token_to_every_row(rows, length):
    assert common_prefix_length(rows) == length


def test_preallocated_layer_equals_the_growing_one():
    torch.manual_seed(0)
    ours, theirs = PreallocatedLayer(4, 10, None), DynamicLayer()
    first = torch.randn(2, 4, 2, 5, 3)
    for layer in (ours, theirs):
        layer.update(first[0], first[1])
    # Row 1 leaves and row 3 takes its place; then two rows leave at once.
    for kept in ([0, 3, 2], [2]):
        for layer in (ours, theirs):
            layer.batch_select_indices(torch.tensor(kept))
        new = torch.randn(2, len(kept), 2, 1, 3)
        got, expected = ours.update(new[0], new[1]), theirs.update(new[0], new[1])
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_preallocated_layer_starts_every_row_from_the_shared_part():
    start = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4)
    layer = PreallocatedLayer(3, 8, start)
    assert layer.get_seq_length() == 3
    assert torch.equal(layer.keys, start[0].expand(3, -1, -1, -1))
    assert torch.equal(layer.values, start[1].expand(3, -1, -1, -1))
