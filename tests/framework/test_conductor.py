from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn

from framework.composition import attach_loss_terms, collect_loss_terms
from framework.conductor import check_order, joins_seam, strategy_kind
from framework.errors import NoEffectError, WiringError
from framework.method import Method
from framework.module import FineTuneModule
from framework.parameters import trainable_names
from tests.conftest import make_model
from tests.tiny_runs import OneLayer, TinyData, TokenTerm, WeightTerm, make_lora, make_trainer, run_fit


class Plain(Method):
    """A method that is set up with nothing but its name."""

    name = "plain"

    def __init__(self):
        super().__init__(None)


class KeepNone(Plain):
    """Freezes every base parameter."""

    name = "keep_none"

    def select_parameters(self, names):
        return set()


class FirstLayer(Plain):
    name = "first_layer"

    def select_parameters(self, names):
        return {name for name in names if "layers.0." in name or "norm" in name}


class NormsOnly(Plain):
    name = "norms_only"

    def select_parameters(self, names):
        return {name for name in names if "norm" in name}


class AddVector(Plain):
    """Adds a trainable vector to the embedding output."""

    name = "add_vector"

    def prepare_model(self, model):
        model.delta = nn.Parameter(torch.zeros(32))
        self.add_hook(model.get_input_embeddings().register_forward_hook(lambda m, args, out: out + model.delta))


class Thaw(Plain):
    name = "thaw"

    def select_parameters(self, names):
        return set(names) | {"model.layers.0.self_attn.q_proj.weight"}


def changed(run) -> set[str]:
    start = dict(make_model().named_parameters())
    return {n for n, p in run.module.model.named_parameters() if n not in start or not torch.equal(p, start[n])}


# ---- conducting --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(KeepNone, AddVector), (AddVector, KeepNone)])
def test_what_a_method_adds_trains_whoever_freezes_first(order):
    run = run_fit(make_model(), [method() for method in order])
    assert trainable_names(run.module.model) == {"delta"}
    assert changed(run) == {"delta"}
    weights = [p.detach() for p in run_fit(make_model(), [method() for method in order[::-1]]).module.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(run.module.parameters(), weights, strict=True))


@pytest.mark.parametrize("order", [(FirstLayer, NormsOnly), (NormsOnly, FirstLayer)])
def test_selections_are_intersected_in_any_order(order):
    methods = [method() for method in order]
    run = run_fit(make_model(), methods)
    names = {n for n, _ in make_model().named_parameters() if "norm" in n}
    assert trainable_names(run.module.model) == names
    by_name = {method.name: method.effects["parameters_frozen"] for method in methods}
    total = len(list(make_model().parameters()))
    assert by_name["norms_only"] == total - len(names)


def test_frozen_tensors_stay_bit_identical_under_weight_decay():
    model = make_model()
    module = FineTuneModule(model, learning_rate=1e-2, total_steps=6, weight_decay=0.5)
    run = run_fit(model, [OneLayer()], module=module)
    assert changed(run) == {n for n, _ in model.named_parameters() if "layers.1." in n}


def test_selection_names_are_those_of_the_plain_model_under_peft():
    seen = []

    class Look(Plain):
        def select_parameters(self, names):
            seen.extend(sorted(names))
            return {name for name in names if "q_proj" in name}

    run = run_fit(make_lora(make_model()), [Look()])
    assert seen[0] == "model.layers.0.self_attn.q_proj.lora_A.default.weight"
    assert len(trainable_names(run.module.model)) == 4


def test_a_parameter_that_is_renamed_by_another_method_is_still_frozen():
    class Wrap(Plain):
        """Puts the whole inner model below another name."""

        name = "wrap"

        def prepare_model(self, model):
            model.model.layers[0] = Shell(model.model.layers[0])
            self.count("modules_matched")

    run = run_fit(make_model(), [Wrap(), NormsOnly()])
    assert all("norm" in name for name in trainable_names(run.module.model))


class Shell(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


def test_a_frozen_parameter_is_never_unfrozen():
    model = make_lora(make_model())
    with pytest.raises(
        WiringError, match=r"Method `thaw` keeps \['model.layers.0.self_attn.q_proj.weight'\], but .* a "
    ):
        run_fit(model, [Thaw()])


def test_nothing_left_to_train_is_refused():
    with pytest.raises(WiringError, match=r"at least one trainable parameter, but \['keep_none'\] together froze all"):
        run_fit(make_model(), [KeepNone()])


def test_parameters_that_were_added_are_counted():
    method = AddVector()
    run_fit(make_model(), [method])
    assert method.effects["parameters_added"] == 32
    assert method.effects["hooks_added"] == 1


# ---- data --------------------------------------------------------------------------------------------------------


without_validation = pytest.mark.filterwarnings(
    "ignore:You defined a `validation_step` but have no `val_da:UserWarning"
)
"""These bring training data alone."""


class AddData(Plain):
    name = "add_data"

    def configure_data(self, datamodule):
        datamodule.add_source("extra", ["row"])


def test_data_is_added_before_the_loader_is_asked_for():
    data, method = TinyData(), AddData()
    run_fit(make_model(), [method], data=data)
    assert data.added == {"extra": (["row"], None)}
    assert method.effects["sources_added"] == 1


@without_validation
def test_a_data_method_without_a_data_module_is_refused():
    data = TinyData()
    module = FineTuneModule(make_model().train(), learning_rate=1e-2, total_steps=3)
    with pytest.raises(WiringError, match="Method `add_data` adds data, but the trainer's data module is NoneType"):
        make_trainer([AddData()]).fit(module, train_dataloaders=data.batches())


@without_validation
def test_a_data_module_that_takes_no_source_is_refused():
    class Fixed(pl.LightningDataModule):
        def train_dataloader(self):
            return TinyData().batches()

    with pytest.raises(WiringError, match="data module is Fixed, which has no `add_source`"):
        run_fit(make_model(), [AddData()], data=Fixed())


# ---- what a run must have ----------------------------------------------------------------------------------------


def test_a_model_that_is_built_late_is_refused():
    class Late(pl.LightningModule):
        def configure_model(self):
            self.model = make_model()

        def training_step(self, batch, batch_idx):
            pytest.fail("the run started")

        def validation_step(self, batch, batch_idx):
            pass

        def configure_optimizers(self):
            pytest.fail("the run started")

    with pytest.raises(WiringError, match="Expected the model to exist before `fit`, but `setup` found no parameters"):
        make_trainer([OneLayer()]).fit(Late(), datamodule=TinyData())


class Foreign(pl.LightningModule):
    """Somebody's own module."""

    def __init__(self):
        super().__init__()
        self.model = make_model().train()

    def training_step(self, batch, batch_idx):
        return self.model(**batch.model_inputs, labels=batch.labels).loss

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Joined(Foreign):
    def training_step(self, batch, batch_idx):
        from framework.composition import StepContext

        loss = super().training_step(batch, batch_idx)
        return loss + sum(collect_loss_terms(StepContext(self, batch, None)).values())


def test_a_loss_method_on_a_foreign_module_is_refused_with_both_remedies():
    with pytest.raises(WiringError) as caught:
        make_trainer([WeightTerm()]).fit(Foreign(), datamodule=TinyData())
    message = str(caught.value)
    assert "Method `weight_term` adds a loss term, but `Foreign.training_step` never asks for it" in message
    assert "collect_loss_terms(StepContext(self, batch, outputs))" in message
    assert "attach_loss_terms(module)" in message


def test_other_methods_run_on_a_foreign_module():
    module = Foreign()
    make_trainer([OneLayer()]).fit(module, datamodule=TinyData())
    assert all("layers.1." in name for name in trainable_names(module))


def test_modules_that_join_the_seam_are_known():
    assert joins_seam(FineTuneModule(make_model(), learning_rate=1.0, total_steps=1))
    assert joins_seam(Joined())
    assert not joins_seam(Foreign())
    assert joins_seam(attach_loss_terms(Foreign()))


def test_a_strategy_that_a_method_does_not_support_is_refused():
    class Elsewhere(TokenTerm):
        supports = frozenset({"ddp", "fsdp"})

    with pytest.raises(
        WiringError, match=r"`token_term` supports \['ddp', 'fsdp'\], but the trainer's strategy is `si"
    ):
        run_fit(make_model(), [Elsewhere()])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("SingleDeviceStrategy", "single"),
        ("DDPStrategy", "ddp"),
        ("FSDPStrategy", "fsdp"),
        ("ModelParallelStrategy", "fsdp2"),
        ("DeepSpeedStrategy", "deepspeed"),
        ("XLAStrategy", "xlastrategy"),
    ],
)
def test_strategies_by_class_name(name, kind):
    class Holder:
        strategy = type(name, (), {})()

    assert strategy_kind(Holder()) == kind


# ---- order -------------------------------------------------------------------------------------------------------


class GradientsA(Plain):
    name = "gradients_a"

    def edit_gradients(self, params):
        for parameter in params.values():
            parameter.grad.clamp_(-1e-3, 1e-3)


class GradientsB(GradientsA):
    name = "gradients_b"

    def edit_gradients(self, params):
        for parameter in params.values():
            parameter.grad.mul_(0.1).add_(1e-4)


def test_two_methods_on_a_point_that_does_not_commute_need_an_order():
    with pytest.raises(WiringError, match=r"Methods \['gradients_a', 'gradients_b'\] both fill `edit_gradients`") as e:
        run_fit(make_model(), [GradientsA(), GradientsB()])
    assert "`order: [gradients_a, gradients_b]`" in str(e.value)
    with pytest.raises(WiringError, match="both fill `edit_gradients`"):
        make_trainer([GradientsA(), GradientsB()]).fit(Foreign(), datamodule=TinyData())


def test_the_declared_order_is_the_one_that_runs():
    def gradient(order):
        return run_fit(make_model(), [GradientsA(), GradientsB()], order=order).gradients[0]

    forward, back = gradient(["gradients_a", "gradients_b"]), gradient(["gradients_b", "gradients_a"])
    plain = run_fit(make_model()).gradients[0]
    torch.testing.assert_close(forward, plain.clamp(-1e-3, 1e-3) * 0.1 + 1e-4)
    torch.testing.assert_close(back, (plain * 0.1 + 1e-4).clamp(-1e-3, 1e-3))
    assert not torch.equal(forward, back)


def test_a_trainer_that_changed_the_order_is_refused():
    first, second = TokenTerm(), WeightTerm()
    first.planned_order = second.planned_order = ("token_term", "weight_term")
    check_order([first, second])
    with pytest.raises(
        WiringError, match=r"callbacks in the order \['token_term', 'weight_term'\], but the trainer has"
    ):
        check_order([second, first])


def test_a_writer_before_a_method_is_refused(tmp_path):
    with pytest.raises(WiringError, match="Expected every method before the checkpoint writers"):
        check_order([ModelCheckpoint(tmp_path), TokenTerm()])
    check_order([TokenTerm(), ModelCheckpoint(tmp_path)])
    check_order([])


def test_a_method_given_twice_is_refused():
    with pytest.raises(WiringError, match=r"every method once, but got \['token_term'\] more than once"):
        check_order([TokenTerm(), TokenTerm()])


class OwnFactor(Plain):
    name = "own_factor"
    task_loss_setting = "share: 1"


class OtherFactor(OwnFactor):
    name = "other_factor"


def test_two_factors_of_the_task_loss_are_refused():
    with pytest.raises(WiringError) as caught:
        check_order([OwnFactor(), FirstLayer(), OtherFactor()])
    assert "at most one method of a stage to change the factor of the loss of the stage's own rows" in str(caught.value)
    assert str(caught.value).endswith(
        "all but one of them: `share: 1` for `own_factor`, `share: 1` for `other_factor`."
    )
    check_order([OwnFactor(), FirstLayer(), NormsOnly()])
    assert FirstLayer().task_loss_setting is None


def test_an_idle_method_among_others_is_still_found():
    with pytest.raises(NoEffectError, match="Method `idle`"):
        run_fit(make_model(), [OneLayer(), Lazy()])


class Lazy(Plain):
    name = "idle"

    def select_parameters(self, names):
        return set(names)
