from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from framework.errors import WiringError
from framework.unlearning import STAGE, Unlearning, mean_row_loss, number_problems, row_problems
from tests.methods.unlearning_runs import make_data, write_pairs


def config(**changes):
    return SimpleNamespace(**{"weight": 1.0, "source": "some", "count": None, "retain": STAGE, **changes})


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"weight": 1.5}, "Expected `weight` to be a share from 0 to 1, but got 1.5."),
        ({"weight": True}, "Expected `weight` to be a share from 0 to 1, but got True."),
        ({"source": ""}, "Expected `source` to be a set's name or a file, but got ''."),
        ({"retain": 3}, "Expected `retain` to be a set's name or a file, but got 3."),
        ({"count": 0}, "Expected `count` to be a whole number >= 1 or null, but got 0."),
    ],
)
def test_rules_of_the_shared_settings(changes, text):
    assert list(row_problems(config(**changes))) == [text]
    assert list(row_problems(config())) == []


def test_rules_of_numbers():
    given = config(beta=0, alpha=-1, gamma=float("nan"), c=2)
    assert number_problems(given, positive=("beta", "gamma", "c"), not_negative=("alpha",)) == [
        "Expected `beta` to be a number > 0, but got 0.",
        "Expected `gamma` to be a number > 0, but got nan.",
        "Expected `alpha` to be a number >= 0, but got -1.",
    ]


def test_the_loss_of_rows_and_its_bound():
    nll, rows = torch.tensor([1.0, 9.0, 2.0], dtype=torch.float64, requires_grad=True), torch.tensor([0, 0, 1])
    (gradient,) = torch.autograd.grad(mean_row_loss(nll, rows, num_rows=2), nll)
    assert gradient.tolist() == [0.25, 0.25, 0.5]
    (bounded,) = torch.autograd.grad(mean_row_loss(nll, rows, num_rows=2, bound=5.0), nll)
    assert bounded.tolist() == [0.25, 0.0, 0.5]


def test_rows_are_read_unless_the_strength_is_zero(tmp_path):
    forget, retain = write_pairs(tmp_path / "f.jsonl", 4), write_pairs(tmp_path / "r.jsonl", 3)
    method = Unlearning(config(source=forget, retain=retain))
    with pytest.raises(WiringError, match=r"has no forget rows yet\. Call `prepare_methods\(methods, model"):
        method._forget_rows()
    method.prepare(None, make_data(), None)
    assert (len(method._forget.encoded), len(method._retain.encoded)) == (4, 3)
    idle = Unlearning(config(weight=0.0, source="nowhere"))
    idle.prepare(None, None, None)
    assert idle._forget is None
