from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from framework.errors import NoEffectError, WiringError
from framework.registry import validate_methods
from framework.unlearning import STAGE, Unlearning, mean_row_loss, number_problems, row_problems
from tests.conftest import make_model
from tests.methods.unlearning_runs import make_data, write_pairs
from tests.tiny_runs import TinyData, run_fit

KEPT = {"task_weight": 1.0}
RETAINED = {"retain": "rows.jsonl", "alpha": 0.5}


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
    assert (method.effects["forget_rows"], method.effects["retain_rows"]) == (4, 3)
    idle = Unlearning(config(weight=0.0, source="nowhere"))
    idle.prepare(None, None, None)
    assert idle._forget is None


@pytest.mark.parametrize(
    ("first", "second", "remedies"),
    [
        (("gradient_ascent", {}), ("circuit_breakers", {}), "`task_weight: 1` for `{0}`, `task_weight: 1` for `{1}`"),
        (("rmu", {}), ("vaccine", {}), "`task_weight: 1` for `{0}`, `rho: 0` for `{1}`"),
        (("npo", {"alpha": 2.0}), ("grad_diff", {"alpha": 0}), "`alpha: 1` for `{0}`, `alpha: 1` for `{1}`"),
    ],
)
def test_two_methods_that_change_the_factor_of_the_task_loss_are_refused_with_the_settings(first, second, remedies):
    names = first[0], second[0]
    (problem,) = validate_methods(dict([first, second]))
    assert f"of the stage's own rows, but got `{names[0]}` and `{names[1]}`: each takes its share" in problem
    assert problem.endswith(f"with all but one of them: {remedies.format(*names)}.")


@pytest.mark.parametrize(
    "methods",
    [
        {"gradient_ascent": {}, "circuit_breakers": KEPT},
        {"gradient_ascent": KEPT, "rmu": KEPT, "circuit_breakers": {}},
        {"vaccine": {}, "npo": {}, "grad_diff": {}},
        {"vaccine": {}, "npo": RETAINED, "grad_diff": RETAINED},
        {"vaccine": {"rho": 0.0}, "rmu": {}},
        {"gradient_ascent": {"weight": 0.0}, "rmu": {}},
        {"gradient_ascent": {}, "booster": {}, "lisa": {}},
    ],
)
def test_one_method_may_change_the_factor_of_the_task_loss(methods):
    assert validate_methods(methods) == []


class Taking(Unlearning):
    """Takes the task loss away, and unlearns as much as it is told."""

    name = "taking"

    def loss_term(self, ctx):
        own = self.config.own * ctx.token_mean(ctx.outputs.nll)
        return self._joined(own, self._task_parts(ctx, 0.0))


def test_a_task_loss_that_is_taken_away_is_no_effect():
    def run(own):
        method = Taking(config(weight=0.5, own=own, task_weight=0.0))
        method._forget = object()
        run_fit(make_model(), [method], data=TinyData(steps=1))
        return method

    with pytest.raises(NoEffectError, match=r"`taking` did nothing: its loss term was zero .* rows by does not count"):
        run(0.0)
    method = run(2.0)
    assert method.largest_term == pytest.approx(2 * method.reports["term"] * 0.5)
