"""Mining with judges that load a language model: few calls, and the same outcome."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

from datamodules.mining import StopRule
from datamodules.mining import mine as mine_module
from framework.errors import ConfigError
from framework.evaluation import judges
from framework.evaluation.judges import Verdict
from tests.coin_judge import coin_judge
from tests.datamodules.mining.test_mine import mine, store_of, stored

MISSING = 8 * 4 + 4 * 4
"""Rollouts of a mining with the settings of ``mine``."""


@contextlib.contextmanager
def counted_judge(*, needs_model=True, knows_refusals=True, when_called=None):
    """Know the judge ``coin``, which says whether it loads a model; yields the number of replies of each call."""
    calls = []
    with coin_judge():
        kind = judges._REGISTRY["coin"]
        answer = kind.judge

        def judge(self, pairs):
            calls.append(len(pairs))
            if when_called is not None:
                when_called()
            found = answer(self, pairs)
            return found if knows_refusals else [Verdict(harmful=one.harmful) for one in found]

        kind.judge, kind.needs_model = judge, needs_model
        yield calls


def test_a_fixed_number_of_rollouts_is_judged_in_one_call(tmp_path):
    with counted_judge(needs_model=False) as calls:
        expected = mine(tmp_path / "plain")
        assert len(calls) == 8 + 4  # prompt by prompt
    with counted_judge() as calls:
        mined = mine(tmp_path / "rounds")
        assert len(calls) == 1
        assert mined == expected
        assert store_of(tmp_path / "rounds").read_bytes() == store_of(tmp_path / "plain").read_bytes()
        assert mine(tmp_path / "rounds") == expected
        assert len(calls) == 1  # the verdicts were remembered


def test_an_adaptive_number_is_judged_once_a_look(tmp_path):
    looks = StopRule(16, 0.25).looks()
    with counted_judge(needs_model=False) as calls:
        expected = mine(tmp_path / "plain", rollouts=16, adaptive=True)
        assert len(calls) > len(looks)
    with counted_judge() as calls:
        mined = mine(tmp_path / "rounds", rollouts=16, adaptive=True)
        assert 1 < len(calls) <= len(looks)
    assert mined == expected
    assert min(one.counts.total for one in mined.harmful) < 16
    assert stored(tmp_path / "rounds") == stored(tmp_path / "plain")  # not in this order


@pytest.mark.parametrize("adaptive", [False, True])
def test_what_is_stored_is_judged_with_what_is_made_first(tmp_path, adaptive):
    changes = {"rollouts": 12, "prompts": 10, "adaptive": adaptive}
    with counted_judge(needs_model=False):
        expected = mine(tmp_path / "plain", **changes)
    with coin_judge(name="other"):
        mine(tmp_path / "rounds", judges=["other"], rollouts=5)
        kept = store_of(tmp_path / "rounds").read_bytes()
    with counted_judge() as calls:
        assert mine(tmp_path / "rounds", **changes) == expected
        assert len(calls) <= (len(StopRule(12, 0.25).looks()) if adaptive else 1)
    assert store_of(tmp_path / "rounds").read_bytes().startswith(kept)


def test_a_panel_asks_the_judge_with_a_model_once(tmp_path):
    with counted_judge(needs_model=False):
        expected = mine(tmp_path / "plain", judges=["rules", "coin", "harm"])
    with counted_judge() as calls:
        assert mine(tmp_path / "rounds", judges=["rules", "coin", "harm"]) == expected
        assert len(calls) == 1


@pytest.mark.parametrize("adaptive", [False, True])
def test_a_judge_with_a_model_is_asked_when_the_mined_one_has_left_its_fast_device(tmp_path, monkeypatch, adaptive):
    places, seen = ["slow"], []

    @contextlib.contextmanager
    def on_fast_device(model):
        places.append("fast")
        yield
        places.append("slow")

    monkeypatch.setattr(mine_module, "on_fast_device", on_fast_device)
    with counted_judge(when_called=lambda: seen.append(places[-1])) as calls:
        mine(tmp_path, rollouts=16, adaptive=adaptive)
        assert len(calls) == places.count("fast")
        mine(tmp_path, rollouts=16, adaptive=adaptive)
        assert len(calls) == places.count("fast")  # nothing was made, so nothing had to be moved
    assert set(seen) == {"slow"}


class Placed:
    """A model of which only the place matters."""

    def __init__(self, device):
        self.device, self.moves = torch.device(device), []

    def parameters(self):
        yield SimpleNamespace(device=self.device)

    def to(self, device):
        self.moves.append(str(device))
        self.device = torch.device(device)


@pytest.mark.parametrize(("device", "moves"), [("cuda:0", ["cpu", "cuda:0"]), ("cpu", [])])
def test_a_model_that_came_on_a_gpu_leaves_it_to_the_judge(device, moves):
    model = Placed(device)
    with mine_module._off_gpu(model):
        assert model.device == torch.device("cpu")
    assert model.moves == moves
    assert model.device == torch.device(device)


def test_progress_is_that_of_the_rollouts(tmp_path):
    seen = []
    with counted_judge():
        mine(tmp_path / "fixed", progress=lambda *numbers: seen.append(numbers))
        assert seen == [(done, MISSING) for done in range(1, MISSING + 1)]
        seen.clear()
        mine(tmp_path / "adaptive", rollouts=16, adaptive=True, progress=lambda *numbers: seen.append(numbers))
    assert seen[-1] == (8 * 16 + 4 * 4,) * 2
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert len(stored(tmp_path / "adaptive")[0]) < seen[-1][0]


def test_refusals_need_a_judge_that_knows_them_at_the_first_call(tmp_path):
    with (
        counted_judge(knows_refusals=False) as calls,
        pytest.raises(ConfigError, match=r"Expected `judges` to hold one that knows refusals, but got coin. Add"),
    ):
        mine(tmp_path, rollouts=16, adaptive=True)
    assert len(calls) == 1
    assert stored(tmp_path)[1] == 8 * 4 + 4 * 4  # the first look of each prompt; kept
    with counted_judge(knows_refusals=False) as calls:
        mine(tmp_path, judges=["rules", "coin"])
        assert calls == []  # all of it was made and judged for the first look
