from __future__ import annotations

from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from callbacks.checkpoint import FiniteCheckpoint
from framework.errors import NoEffectError, WiringError
from framework.files import ArtifactStore
from framework.method import NON_COMMUTING, POINTS, Method, MethodStore, points_of
from tests.conftest import make_model
from tests.tiny_runs import OneLayer, Strength, TinyData, TokenTerm, WeightTerm, flat, make_lora, relative, run_fit


def define(attribute: str):
    """A method class with one extra public function."""
    return type("Draft", (Method,), {attribute: lambda self: None, "name": "draft"})


# ---- the class ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attribute", "nearest"),
    [
        ("los_term", "loss_term"),
        ("edit_gradient", "edit_gradients"),
        ("select_params", "select_parameters"),
        ("prepare_modell", "prepare_model"),
        ("on_train_batch_strat", "on_train_batch_start"),
    ],
)
def test_a_misspelt_point_is_refused_with_the_nearest_name(attribute, nearest):
    with pytest.raises(WiringError, match=f"`Draft.{attribute}` is no contribution point .* did you mean `{nearest}`"):
        define(attribute)


def test_a_public_function_that_is_near_nothing_is_told_where_to_go():
    with pytest.raises(WiringError, match="helpers are module functions or start with `_`"):
        define("xyz")


@pytest.mark.parametrize("attribute", ["_draw", "on_train_epoch_start", "loss_term", "report"])
def test_points_hooks_and_private_functions_are_allowed(attribute):
    assert define(attribute).name == "draft"


def test_points_are_listed_in_the_order_they_run():
    assert set(NON_COMMUTING) < set(POINTS)
    assert points_of(Method) == ()
    assert points_of(TokenTerm) == TokenTerm().points == ("loss_term",)

    class Two(OneLayer):
        def prepare_model(self, model):
            pass

    assert points_of(Two) == ("prepare_model", "select_parameters")


def test_each_method_has_its_own_state_key():
    assert TokenTerm().state_key == "method/token_term"
    assert TokenTerm().state_key != WeightTerm().state_key


def test_the_weight_is_that_of_the_config():
    assert TokenTerm(0.5).weight == 0.5
    assert OneLayer().weight == 1.0


def test_a_store_gives_the_models_it_knows(tmp_path):
    store = MethodStore(ArtifactStore(tmp_path), models={"start": Path("/a")})
    assert store.model("start", method="asft") == Path("/a")
    with pytest.raises(WiringError, match=r"Method `asft` needs the `base` model, but the run knows only \['start'\]"):
        store.model("base", method="asft")
    with pytest.raises(WiringError, match="knows only none"):
        MethodStore(ArtifactStore(tmp_path)).model("base", method="asft")


# ---- gradients and weights ---------------------------------------------------------------------------------------


class Reverse(Method):
    """Turns every gradient round and keeps what it saw."""

    name = "reverse"

    def __init__(self):
        super().__init__(None)
        self.seen = []

    def edit_gradients(self, params):
        self.seen.append(torch.cat([p.grad.flatten() for p in params.values()]))
        for parameter in params.values():
            parameter.grad.neg_()


def test_gradient_edits_see_the_steps_gradient_once_unclipped_and_change_the_update():
    plain = run_fit(make_model(), data=TinyData(micro_batches=1))
    method = Reverse()
    run = run_fit(make_model(), [method], data=TinyData(micro_batches=4), gradient_clip_val=1e-3)
    assert len(method.seen) == run.trainer.global_step == 3
    assert method.effects["gradient_edits"] == 3
    assert relative(method.seen[0], plain.gradients[0]) < 2e-7
    assert float(method.seen[0].norm()) > 1e-2 > 1e-3
    assert torch.equal(run.gradients[0], -method.seen[0])
    step = flat(make_model()) - run.weights
    assert float(step @ (flat(make_model()) - plain.weights)) < 0


def test_edited_gradients_are_those_of_the_trained_parameters_by_clean_name():
    names = []

    class Names(Reverse):
        def edit_gradients(self, params):
            names.extend(params)
            super().edit_gradients(params)

    run_fit(make_lora(make_model()), [Names()], data=TinyData(steps=1))
    assert "model.layers.0.self_attn.q_proj.lora_A.default.weight" in names
    assert len(names) == 8


class Clamp(Method):
    """Keeps every weight within a bound."""

    name = "clamp"

    def __init__(self, bound=0.01):
        super().__init__(None)
        self.bound = bound
        self.steps = []

    def setup(self, trainer, pl_module, stage):
        """Raw hook: to know the trainer."""
        super().setup(trainer, pl_module, stage)
        self.trainer = trainer

    def project_weights(self, params):
        self.steps.append(self.trainer.global_step)
        for parameter in params.values():
            parameter.clamp_(-self.bound, self.bound)


@pytest.mark.parametrize("cut", [1, 4])
def test_weights_are_projected_once_after_every_step(cut):
    method = Clamp()
    run = run_fit(make_model(), [method], data=TinyData(micro_batches=cut))
    assert method.steps == [1, 2, 3]
    assert method.effects["projections"] == 3
    assert float(run.weights.abs().max()) <= torch.tensor(0.01)


class Fold(Method):
    """Adds one to one tensor at the end."""

    name = "fold"

    def __init__(self):
        super().__init__(None)
        self.calls = 0

    def edit_weights(self, model):
        self.calls += 1
        model.model.norm.weight.add_(1.0)


def test_final_weights_are_edited_once_after_training():
    method = Fold()
    plain, run = run_fit(make_model()), run_fit(make_model(), [method])
    assert method.calls == 1
    assert method.effects["weights_edited"] == 1
    difference = (run.module.model.model.norm.weight - plain.module.model.model.norm.weight).detach()
    torch.testing.assert_close(difference, torch.ones(32))
    rest = [n for n, p in plain.module.model.named_parameters() if n != "model.norm.weight"]
    ours = dict(run.module.model.named_parameters())
    assert all(torch.equal(ours[n], dict(plain.module.model.named_parameters())[n]) for n in rest)


def test_a_run_without_a_step_still_edits_the_weights():
    method, model = Fold(), make_model()
    run_fit(model, [method], max_steps=0)
    assert method.calls == 1
    assert torch.equal(model.model.norm.weight, torch.full((32,), 2.0))


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")  # it is resumed from
def test_a_finished_run_that_is_resumed_still_edits_the_weights(tmp_path):
    def fit(ckpt_path=None):
        writer = FiniteCheckpoint(dirpath=tmp_path, every_n_train_steps=3, filename="{step}")
        method = Fold()
        return run_fit(make_model(), [method], writers=[writer], max_steps=3, ckpt_path=ckpt_path), method

    whole, _ = fit()
    resumed, method = fit(tmp_path / "step=3.ckpt")
    assert resumed.gradients == []
    assert method.calls == 1
    assert torch.equal(resumed.weights, whole.weights)


def test_removing_a_tensor_counts_as_one_edit():
    class Drop(Fold):
        def edit_weights(self, model):
            del model.extra

    model = make_model()
    model.extra = nn.Linear(2, 2, bias=False)
    model.extra.weight.requires_grad_(False)
    model = nn.ModuleDict({"model": model})
    method = Drop()
    method._edit(model["model"])
    assert method.effects["weights_edited"] == 1


# ---- hooks and reports -------------------------------------------------------------------------------------------


class Double(Method):
    """Doubles a layer's output through a forward hook."""

    name = "double"

    def __init__(self, *, fail_at=None):
        super().__init__(None)
        self.fail_at = fail_at

    def prepare_model(self, model):
        self.add_hook(model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: 2 * output))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        """Raw hook: the fault comes from outside."""
        if trainer.global_step == self.fail_at:
            raise KeyError("stop")


def test_hooks_act_and_are_removed_at_the_end():
    model = make_model()
    run = run_fit(model, [Double()])
    assert not torch.equal(run.weights, run_fit(make_model()).weights)
    assert not model.model.layers[0].mlp._forward_hooks


def test_hooks_are_removed_after_an_exception():
    model = make_model()
    with pytest.raises(KeyError):
        run_fit(model, [Double(fail_at=1)])
    assert not model.model.layers[0].mlp._forward_hooks


def test_reports_are_logged_under_the_methods_name():
    class Reporter(TokenTerm):
        def loss_term(self, ctx):
            term = super().loss_term(ctx)
            self.report("share", torch.tensor(0.25))
            self.report("half", 0.5)
            return term

    method = Reporter(0.5)
    run = run_fit(make_model(), [method])
    logged = run.trainer.logged_metrics
    assert float(logged["train/token_term/share"]) == 0.25
    assert float(logged["train/token_term/half"]) == 0.5
    assert set(method.reports) == {"share", "half", "term", "weight"}


# ---- nothing happened --------------------------------------------------------------------------------------------


class Idle(Method):
    """Base of the deliberately idle ones."""

    name = "idle"

    def __init__(self):
        super().__init__(Strength())


class IdlePrepareModel(Idle):
    def prepare_model(self, model):
        pass


class IdleSelect(Idle):
    def select_parameters(self, names):
        return set(names)


class IdleData(Idle):
    def configure_data(self, datamodule):
        pass


class IdleTerm(Idle):
    def loss_term(self, ctx):
        return 0.0 * ctx.outputs.nll.sum()


class NoTerm(Idle):
    def loss_term(self, ctx):
        return None


class IdleGradients(Idle):
    def edit_gradients(self, params):
        for parameter in params.values():
            parameter.grad.mul_(1.0)


class IdleProjection(Idle):
    def project_weights(self, params):
        pass


class IdleEdit(Idle):
    def edit_weights(self, model):
        pass


IDLE = {
    IdlePrepareModel: "it added no parameter and no hook and matched no module",
    IdleSelect: "it froze no parameter",
    IdleData: "it added no data source and no transform",
    IdleTerm: "its loss term was zero on every step",
    NoTerm: "its loss term was zero on every step",
    IdleGradients: "it never changed a gradient",
    IdleProjection: "it never changed a weight after a step",
    IdleEdit: "it changed no tensor of the final model",
}


def test_there_is_an_idle_method_for_every_point_that_can_be_idle():
    assert {point for method in IDLE for point in points_of(method)} == set(POINTS) - {"prepare"}


@pytest.mark.parametrize("idle", IDLE, ids=lambda method: method.__name__)
def test_a_method_that_did_nothing_ends_the_run_with_an_error(idle):
    with pytest.raises(NoEffectError, match=f"Method `idle` did nothing: {IDLE[idle]}"):
        run_fit(make_model(), [idle()])


@pytest.mark.parametrize("idle", IDLE, ids=lambda method: method.__name__)
def test_doing_nothing_is_allowed_when_it_is_asked_for(idle):
    method = idle()
    method.allow_no_effect = True
    assert torch.equal(run_fit(make_model(), [method]).weights, run_fit(make_model()).weights)


def test_a_loss_method_in_a_run_without_a_step_did_nothing():
    with pytest.raises(NoEffectError, match="its loss term was zero on every step"):
        run_fit(make_model(), [TokenTerm()], max_steps=0)


def test_a_term_that_is_zero_in_the_steps_that_are_looked_at_still_counts():
    """On a GPU values are read only now and then; the largest is kept on the device meanwhile."""
    method = TokenTerm()
    method.note_term(torch.tensor(0.0))
    assert method.largest_term == 0.0
    method.note_term(torch.tensor(-3.0, requires_grad=True))
    method.note_term(torch.tensor(float("nan")))
    assert method.largest_term == 3.0
    method.require_effect()


def test_counters_survive_a_checkpoint():
    method, fresh = TokenTerm(), TokenTerm()
    method.count("loss_calls", 3)
    method.note_term(torch.tensor(2.0))
    fresh.load_state_dict(method.state_dict())
    assert fresh.effects == method.effects
    assert fresh.largest_term == 2.0


def test_a_method_runs_in_any_lightning_callback_list():
    assert isinstance(TokenTerm(), pl.Callback)


def test_a_gradient_or_weight_that_is_not_a_number_is_no_effect():
    method, gradients = IdleGradients(), [torch.tensor([1.0, torch.nan])]
    with method._counting("gradient_edits", gradients):
        pass
    assert method.effects["gradient_edits"] == 0
    with method._counting("gradient_edits", gradients):
        gradients[0][1] = 0.0
    assert method.effects["gradient_edits"] == 1
    model, editor = make_model(), IdleEdit()
    next(model.parameters()).data.flatten()[0] = torch.nan
    editor._edit(model)
    assert editor.effects["weights_edited"] == 0
