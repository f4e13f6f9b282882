from __future__ import annotations

import pytest
import torch

from framework.errors import DataError, WiringError
from framework.paired_rows import PairedRows, read_paired_rows, row_means
from tests.methods.unlearning_runs import make_data, write_pairs
from tests.tiny_runs import make_batch, make_rows


@pytest.fixture
def forget(tmp_path):
    return write_pairs(tmp_path / "forget.jsonl", 6)


def test_the_draw_depends_on_step_and_row_alone():
    rows = PairedRows(make_rows(7), name="forget", pad_id=0, seed=0)
    whole = rows.draw(3, range(12))
    assert [rows.draw(3, [i])[0] for i in range(12)] == whole
    assert PairedRows(make_rows(7), name="forget", pad_id=0, seed=0).draw(3, range(12)) == whole
    assert sorted(whole[:7]) == list(range(7))
    assert rows.draw(4, range(12)) != whole
    assert PairedRows(make_rows(7), name="forget", pad_id=0, seed=1).draw(3, range(12)) != whole


def test_rows_come_about_equally_often_and_once_in_a_step():
    rows = PairedRows(make_rows(50), name="forget", pad_id=0, seed=0)
    drawn = [row for step in range(40) for row in rows.draw(step, range(4 * step, 4 * step + 4))]
    counts = torch.bincount(torch.tensor(drawn), minlength=50)
    assert float((counts > 0).double().mean()) > 0.9
    assert counts.max() <= 10
    assert len(set(rows.draw(9, range(50)))) == 50


def test_a_batch_stands_beside_each_micro_batch():
    rows, beside = PairedRows(make_rows(7, seed=5), name="forget", pad_id=0, seed=0), make_batch(4)
    batch = rows.batch(2, beside)
    assert batch.example_ids.tolist() == rows.draw(2, beside.example_ids.tolist())
    first = rows.encoded[int(batch.example_ids[0])]
    assert batch.input_ids[0, : len(first.input_ids)].tolist() == list(first.input_ids)
    assert batch.step_reply_tokens == int((batch.labels != -100).sum())


def test_means_of_rows_average_as_the_whole_does():
    values, rows = torch.tensor([1.0, 3.0, 5.0], dtype=torch.float64), torch.tensor([0, 0, 1])
    assert torch.autograd.gradcheck(lambda v: row_means(v, rows, num_rows=2), values.requires_grad_())
    halves = [row_means(values[:2], rows[:2], num_rows=1), row_means(values[2:], rows[:1], num_rows=1)]
    torch.testing.assert_close(torch.cat(halves).mean(), row_means(values, rows, num_rows=2).mean())


def test_a_source_is_read_as_the_stage_reads_its_own(forget):
    data = make_data()
    rows = read_paired_rows(data, "harmful", forget, count=None, method="m")
    assert len(rows.encoded) == 6
    fewer = read_paired_rows(data, "harmful", forget, count=2, method="m")
    assert fewer.encoded == rows.encoded[:2]
    assert len(read_paired_rows(make_data(max_length=50, overflow="truncate_left"), "harmful", forget, count=None,
                                method="m").encoded) == 6  # fmt: skip


def test_what_cannot_be_read_is_refused(forget):
    with pytest.raises(WiringError, match="Method `m` needs the stage's data module to read"):
        read_paired_rows(None, "harmful", forget, count=None, method="m")
    with pytest.raises(DataError, match="to have at least 7 harmful rows for `m`, but got 6"):
        read_paired_rows(make_data(), "harmful", forget, count=7, method="m")
    short = make_data(max_length=40)
    with pytest.raises(DataError, match=r"Expected every row of .* to have at most 40 tokens, but got"):
        read_paired_rows(short, "harmful", forget, count=None, method="m")
    short.overflow, short.max_length = "drop", 43
    assert len(read_paired_rows(short, "harmful", forget, count=None, method="m").encoded) == 4
    assert len(read_paired_rows(short, "harmful", forget, count=4, method="m").encoded) == 4
    with pytest.raises(DataError, match=r"at least 5 harmful rows of at most 43 tokens for `m`, but got 4 of 6\. Low"):
        read_paired_rows(short, "harmful", forget, count=5, method="m")
    short.max_length = 20
    with pytest.raises(DataError, match="to have rows of at most 20 tokens, but got none"):
        read_paired_rows(short, "harmful", forget, count=None, method="m")
    with pytest.raises(DataError, match="Expected source `forget` to have rows, but got none"):
        PairedRows([], name="forget", pad_id=0, seed=0)
