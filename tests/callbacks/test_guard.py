from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from callbacks.guard import Guard
from callbacks.kept_state import KeptState
from framework.errors import NoEffectError, TrainingError, WiringError
from framework.guard_settings import GuardSettings
from methods.gradient_ascent import GradientAscentConfig
from tests.callbacks.guarded_fits import STEPS, DistanceProbe, fit, trained
from tests.conftest import make_model
from tests.tiny_runs import TokenTerm, make_lora

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory")  # runs are resumed in place


@pytest.fixture(scope="module")
def plain():
    run, steps = fit(None)
    margins = {s: 1.0 - float((w - trained(make_lora(make_model()))).norm()) for s, w in steps.weights.items()}
    return run, steps, margins


def make_guard(margins, *, after, said=None, kept=None, **settings):
    """A guard whose threshold the plain run crosses between the steps ``after`` and ``after + 1``."""
    bound = (margins[after] + margins[after + 1]) / 2
    chosen = GuardSettings(**{"every_n_steps": 1, "min_refusal_margin": bound, **settings})
    return Guard(chosen, DistanceProbe(), kept=kept, say=(said if said is not None else []).append)


def test_watching_changes_nothing_and_measures_start_and_end(plain):
    guard = make_guard(plain[2], after=2, action="watch", every_n_steps=4)
    run, _ = fit(guard)
    assert torch.equal(run.weights, plain[0].weights)
    assert [step for step, _ in guard.history["refusal_margin"]] == [0, 4, 6]
    assert (guard.decisions, guard.stopped, guard.result()["acts"]) == ([], None, False)


def test_stopping_keeps_what_the_run_has_and_says_why(plain):
    said = []
    guard = make_guard(plain[2], after=3, said=said)
    run, _ = fit(guard)
    assert run.trainer.global_step == 4
    assert torch.equal(trained(run.module.model), plain[1].weights[4])
    assert guard.stopped.startswith("refusal_margin ")
    assert said == [f"guard, step 4 of 6: stopped, because {guard.stopped}"]
    assert guard.result()["decisions"] == [{"step": 4, "decision": "stop", "reason": guard.stopped}]


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_rolling_back_returns_to_the_last_good_step(plain, tmp_path, kind):
    kept = KeptState(tmp_path / "kept" if kind == "disk" else None)
    guard = make_guard(plain[2], after=3, action="roll_back", kept=kept)
    run, _ = fit(guard)
    assert run.trainer.global_step == 4
    assert torch.equal(trained(run.module.model), plain[1].weights[3])
    assert guard.decisions[0]["to_step"] == 3
    assert guard.stopped.endswith("rolled back to step 3")
    assert [p.name for p in tmp_path.glob("kept/*")] == (["step-3.pt"] if kind == "disk" else [])


def test_going_on_after_a_roll_back_lowers_the_learning_rate(plain):
    settings = {"action": "roll_back", "after_roll_back": "go_on", "rate_factor": 0.25, "max_roll_backs": 1}
    guard = make_guard(plain[2], after=3, **settings)
    run, steps = fit(guard)
    assert guard.decisions[0] == guard.decisions[0] | {"step": 4, "decision": "roll_back", "learning_rate_factor": 0.25}
    assert steps.rates[5] == pytest.approx(0.25 * plain[1].rates[5])
    assert torch.equal(steps.weights[4], plain[1].weights[3])
    assert not torch.equal(steps.weights[5], steps.weights[4])
    if run.trainer.global_step < STEPS:
        assert "1 roll backs were made before" in guard.stopped


def test_a_weight_is_raised_within_bounds_and_every_decision_is_logged(plain):
    settings = {"action": "raise_weight", "method": "token_term", "weight_step": 40.0, "max_weight": 3.0}
    said, method = [], TokenTerm()
    guard = make_guard(plain[2], after=1, said=said, **settings)
    fit(guard, methods=[method])
    raised = [entry for entry in guard.decisions if entry["decision"] == "set_weight"]
    weights = [entry["to"] for entry in raised]
    assert weights
    assert all(1.0 <= entry["to"] <= 3.0 for entry in raised)
    assert max(weights) == 3.0
    assert method.weight == guard.result()["weight"] == weights[-1]
    assert method.reports["weight"] == max(e["to"] for e in raised if e["step"] < STEPS)
    held = [entry for entry in guard.decisions if entry["decision"] == "at_max_weight"]
    assert [(entry["weight"], entry["reason"].split()[0]) for entry in held] == [(3.0, "refusal_margin")]
    assert len(said) == len(weights) + 1
    assert said[-1].endswith("and the weight of `token_term` can rise no further")


GOING_ON = {"action": "roll_back", "after_roll_back": "go_on", "rate_factor": 0.05}


@pytest.mark.parametrize(
    ("settings", "on_disk", "break_at"),
    [
        ({"action": "stop"}, False, 2),  # before the guard acts
        (GOING_ON, False, 5),  # after it has acted
        (GOING_ON, True, 5),
        ({"action": "raise_weight", "method": "token_term", "weight_step": 5.0}, False, 5),
    ],
)
def test_an_interrupted_run_ends_as_the_uninterrupted_one(plain, tmp_path, settings, on_disk, break_at):
    def guarded(name, **options):
        kept = KeptState(tmp_path / name if on_disk else None)
        guard = make_guard(plain[2], after=2, kept=kept, **settings)
        methods = [TokenTerm()] if "method" in settings else []
        return guard, lambda: fit(guard, methods=methods, **options)[0]

    whole, run_whole = guarded("whole")
    expected = run_whole()
    assert whole.decisions
    with pytest.raises(KeyError, match="cut"):
        guarded("cut", folder=tmp_path / "ckpt", break_at=break_at)[1]()
    resumed, run_rest = guarded("cut", folder=tmp_path / "ckpt", resume=True)
    found = run_rest()
    assert found.trainer.global_step == expected.trainer.global_step > break_at
    assert torch.equal(found.weights, expected.weights)
    assert resumed.result() == whole.result()


def test_a_run_that_was_stopped_stays_stopped(plain, tmp_path):
    guard, again = (make_guard(plain[2], after=3) for _ in range(2))
    first, _ = fit(guard, folder=tmp_path)
    assert first.trainer.global_step == 4
    second, steps = fit(again, folder=tmp_path, resume=True)
    assert (second.trainer.global_step, steps.weights) == (4, {})
    assert torch.equal(second.weights, first.weights)
    assert again.result() == guard.result()


def test_another_guard_does_not_resume(plain, tmp_path):
    fit(make_guard(plain[2], after=3), folder=tmp_path)
    with pytest.raises(WiringError, match=r"another: \['max_kl'\] differ"):
        fit(make_guard(plain[2], after=3, max_kl=9.0), folder=tmp_path, resume=True)


def test_a_model_that_breaks_a_threshold_before_training_is_refused(plain):
    guard = Guard(GuardSettings(min_refusal_margin=2.0), DistanceProbe())
    with pytest.raises(TrainingError, match=r"but refusal_margin 1 is below 2\. Set thresholds that it meets"):
        fit(guard)


@pytest.mark.parametrize("methods", [[], [TokenTerm(0.0)]])
def test_a_method_whose_weight_cannot_be_raised_is_refused(methods):
    settings = GuardSettings(action="raise_weight", method="token_term", min_refusal_margin=0.0)
    for method in methods:
        method.allow_no_effect = True
    with pytest.raises(WiringError, match="with a loss term and a weight above 0, but got 'token_term'"):
        fit(Guard(settings, DistanceProbe()), methods=methods)


def test_a_strategy_that_cuts_the_weights_is_refused():
    trainer = SimpleNamespace(strategy=type("FSDPStrategy", (), {})())
    with pytest.raises(WiringError, match="whole model in one process, but the strategy is `fsdp`"):
        Guard(GuardSettings(max_kl=1.0), DistanceProbe()).setup(trainer, None, "fit")


def test_there_must_be_a_state_to_go_back_to():
    with pytest.raises(TrainingError, match="Expected a state to roll back to, but none was kept"):
        KeptState().restore(None, None)


def test_a_run_whose_roll_backs_are_used_up_stops_with_the_last_good_state(plain):
    settings = {"action": "roll_back", "after_roll_back": "go_on", "rate_factor": 1.0, "max_roll_backs": 1}
    guard = make_guard(plain[2], after=1, **settings)
    run, steps = fit(guard)
    last = guard.decisions[-1]
    assert (last["decision"], run.trainer.global_step < STEPS) == ("stop", True)
    assert torch.equal(trained(run.module.model), steps.weights[guard.decisions[0]["step"]])
    assert last["to_step"] == guard.decisions[0]["to_step"] == 1
    assert guard.stopped.endswith("1 roll backs were made before; rolled back to step 1")


def test_a_measurement_that_is_not_finite_is_recorded_as_none():
    guard = Guard(GuardSettings(max_kl=1.0), DistanceProbe())
    guard.history = {"kl_to_start": [(0, 0.0), (1, float("nan"))]}
    assert guard.result()["history"] == {"kl_to_start": [[0, 0.0], [1, None]]}


def test_a_largest_weight_that_the_method_does_not_take_is_refused():
    class Share(TokenTerm):
        def __init__(self, weight):
            super().__init__(weight)
            self.config = GradientAscentConfig(source="forget", weight=weight)

    settings = {"action": "raise_weight", "method": "token_term", "min_refusal_margin": 0.0}
    with pytest.raises(WiringError, match=r"`max_weight` to be a weight that `token_term` takes, but got 10: .*0 to 1"):
        fit(Guard(GuardSettings(**settings), DistanceProbe()), methods=[Share(0.5)])
    guard = Guard(GuardSettings(**settings, max_weight=1.0), DistanceProbe())
    fit(guard, methods=[Share(0.5)])
    assert guard.result()["weight"] <= 1.0


def test_a_largest_weight_that_leaves_nothing_to_raise_is_refused():
    settings = {"action": "raise_weight", "method": "token_term", "min_refusal_margin": 0.0}
    for largest in (1.0, 2.0):
        guard = Guard(GuardSettings(**settings, max_weight=largest), DistanceProbe())
        with pytest.raises(WiringError, match=r"above the weight that `token_term` begins with \(2\), but got"):
            fit(guard, methods=[TokenTerm(2.0)])


def test_what_is_recorded_last_is_the_state_that_was_gone_back_to(plain):
    guard = make_guard(plain[2], after=3, action="roll_back")
    fit(guard)
    steps, margins = zip(*guard.history["refusal_margin"], strict=True)
    assert steps == (0, 1, 2, 3, 4, 4)
    assert margins[-1] == margins[3] > guard.settings.min_refusal_margin > margins[4]


class Late(TokenTerm):
    """Has its turn in the last step only, and keeps an anchor of the weights."""

    restored = 0

    def loss_term(self, ctx):
        return super().loss_term(ctx) * float(ctx.step == STEPS - 1)

    def weights_restored(self, model):
        self.restored += 1


@pytest.mark.parametrize("action", ["stop", "roll_back"])
def test_a_method_that_had_no_turn_before_the_guard_stopped_is_counted_and_no_error(plain, tmp_path, action):
    method = Late()
    guard = make_guard(plain[2], after=3, action=action)
    run, _ = fit(guard, methods=[method], folder=tmp_path)
    assert (run.trainer.global_step, method.effects["points_without_turn"]) == (4, 1)
    assert method.restored == (action == "roll_back")
    again = Late()
    fit(make_guard(plain[2], after=3, action=action), methods=[again], folder=tmp_path, resume=True)
    assert again.effects["points_without_turn"] == 1
    never = Late()
    never.allow_no_effect = True
    fit(make_guard(plain[2], after=3, action="watch"), methods=[never], max_steps=4)
    never.allow_no_effect = False
    with pytest.raises(NoEffectError, match="its loss term was zero on every step"):
        never.require_effect()


def test_a_guard_that_watches_measures_nothing_behind_a_checkpoint_without_one(plain, tmp_path):
    with pytest.raises(KeyError, match="cut"):
        fit(None, folder=tmp_path, break_at=3)
    said = []
    guard = make_guard(plain[2], after=3, said=said, action="watch")
    run, _ = fit(guard, folder=tmp_path, resume=True)
    assert torch.equal(run.weights, plain[0].weights)
    assert (guard.history, len(said)) == ({}, 1)
    assert said[0].startswith("guard, step 2: nothing is measured, because")


def test_a_guard_that_acts_does_not_go_on_without_its_measurements(plain, tmp_path):
    with pytest.raises(KeyError, match="cut"):
        fit(None, folder=tmp_path, break_at=3)
    with pytest.raises(WiringError, match="a checkpoint that was written under this guard, but got one of step 2"):
        fit(make_guard(plain[2], after=3), folder=tmp_path, resume=True)


def test_a_guard_that_watches_drops_what_another_one_measured(plain, tmp_path):
    with pytest.raises(KeyError, match="cut"):
        fit(make_guard(plain[2], after=3, action="watch"), folder=tmp_path, break_at=3)
    said = []
    guard = make_guard(plain[2], after=3, said=said, action="watch", max_kl=9.0)
    run, _ = fit(guard, folder=tmp_path, resume=True)
    assert torch.equal(run.weights, plain[0].weights)
    assert guard.history == {}
    assert said[0] == "guard, what was measured before is dropped, because the settings ['max_kl'] were others"
    assert "nothing is measured" in said[1]
