from __future__ import annotations

import pytest
import torch

from framework.errors import DataError, WiringError
from methods.nest import NeSTConfig, find_neurons
from methods.nest import probe as probe_module
from methods.nest.functional import fit_probes, standardise, z_scores
from methods.nest.probe import build_prompts, pooled_activations, score_sites
from methods.nest.sites import find_projections, find_sites
from tests.conftest import make_model
from tests.methods.nest.tiny_neurons import SETTINGS, make_gpt2


def draw(count, *, low=4, high=260, seed=0, least=3, most=20):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(least, most, (count,), generator=generator).tolist()
    return [torch.randint(low, high, (length,), generator=generator).tolist() for length in lengths]


def both(count=30):
    return draw(count, low=4, high=100), draw(count, low=150, high=260, seed=1)


def pooled_one_by_one(model, prompt):
    """The maximum over the tokens of one prompt, without padding, by hand."""
    seen = {}
    handles = [
        one.module.register_forward_hook(lambda m, i, o, n=name: seen.update({n: o[0].max(dim=0).values}))
        for name, one in find_projections(model).items()
    ]
    with torch.no_grad():
        model(input_ids=torch.tensor([prompt]))
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("make", [make_model, make_gpt2])
@pytest.mark.parametrize("batch_tokens", [1, 64, 4096])
def test_padding_takes_no_part_in_the_maximum(make, batch_tokens):
    model, prompts = make(), draw(9)
    found = pooled_activations(model, find_projections(model), prompts, pad_id=0, batch_tokens=batch_tokens)
    for place, prompt in enumerate(prompts):
        for name, expected in pooled_one_by_one(model, prompt).items():
            torch.testing.assert_close(found[name][place], expected, rtol=1e-5, atol=1e-6)


def test_what_is_kept_does_not_grow_with_tokens_and_no_hook_is_left():
    model = make_model()
    short, long = ([prompt * factor for prompt in draw(4)] for factor in (1, 8))
    sizes = [
        {name: one.shape for name, one in pooled_activations(model, find_projections(model), p, pad_id=0).items()}
        for p in (short, long)
    ]
    assert sizes[0] == sizes[1]
    assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


def test_a_forward_pass_has_no_more_tokens_than_asked_for(monkeypatch):
    model, widths = make_model(), []
    forward = model.model.forward

    def watched(*args, input_ids=None, **kwargs):
        widths.append(input_ids.numel())
        return forward(*args, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(model.model, "forward", watched)
    pooled_activations(model, find_projections(model), draw(40), pad_id=0, batch_tokens=64)
    assert len(widths) > 1
    assert max(widths) <= 64


def test_logits_are_computed_at_one_position_only(monkeypatch):
    model, shapes = make_model(), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape[1]))
    pooled_activations(model, find_projections(model), draw(5), pad_id=0)
    assert set(shapes) == {1}


def test_activations_are_kept_in_the_models_number_format():
    model = make_model().to(torch.bfloat16)
    found = pooled_activations(model, find_projections(model), draw(3), pad_id=0)
    assert {one.dtype for one in found.values()} == {torch.bfloat16}


def test_a_module_that_sees_part_of_the_tokens_is_refused():
    model = make_model()
    projection = model.model.layers[1].mlp.gate_proj
    projection.register_forward_hook(lambda module, inputs, output: output[:, :1])
    with pytest.raises(WiringError, match=r"`model.layers.1.mlp.gate_proj` to see all . x \d+ tokens"):
        pooled_activations(model, find_projections(model), draw(3), pad_id=0)


def test_a_module_that_is_never_called_is_refused():
    model = make_model()
    model.model.layers[0].mlp.w1 = torch.nn.Linear(2, 2)
    with pytest.raises(WiringError, match=r"1 were not \(`model.layers.0.mlp.w1` first\)"):
        pooled_activations(model, find_projections(model), draw(3), pad_id=0)


def test_modules_in_chunks_score_as_all_at_once(monkeypatch):
    model, config = make_model(), NeSTConfig(**SETTINGS)
    prompts = build_prompts(*both(), config)
    features = pooled_activations(model, find_projections(model), prompts.ids, pad_id=0)
    sites = find_sites(find_projections(model))
    together = score_sites(features, sites, prompts, config)
    monkeypatch.setattr(probe_module, "CHUNK_BYTES", 1)
    alone = score_sites(features, sites, prompts, config)
    for key, scores in together.items():
        torch.testing.assert_close(scores.weights, alone[key].weights, rtol=1e-9, atol=1e-12)
        assert scores.accuracy == alone[key].accuracy


@pytest.mark.parametrize("normalize", ["zscore", "none"])
def test_scores_come_from_the_prompts_that_are_not_held_out(normalize):
    model, config = make_model(), NeSTConfig(**SETTINGS, normalize=normalize)
    prompts = build_prompts(*both(), config)
    features = pooled_activations(model, find_projections(model), prompts.ids, pad_id=0)
    site = find_sites(find_projections(model))[0]
    scores = score_sites(features, [site], prompts, config)[site.key]
    train = features[site.module][~prompts.is_held_out].double()[None]
    values = standardise(train, noise=1e-4).values if normalize == "zscore" else train
    expected = fit_probes(values, prompts.labels[~prompts.is_held_out], decay=1e-3).weights
    torch.testing.assert_close(scores.weights, expected[0])
    torch.testing.assert_close(scores.z, z_scores(expected)[0])
    assert scores.is_convincing
    assert scores.accuracy > 0.7


def test_a_probe_no_better_than_chance_is_an_error():
    prompts = draw(60, least=19)
    with pytest.raises(
        WiringError, match=r"none of 4 gets more than \d+% of 30 held-out prompts right, no better than"
    ):
        find_neurons(
            make_model(), build_prompts(prompts[:30], prompts[30:], config := NeSTConfig(**SETTINGS)), config, pad_id=0
        )


def test_a_module_at_chance_gives_no_neurons(monkeypatch):
    model, config = make_model(), NeSTConfig(**SETTINGS)
    prompts = build_prompts(*both(120), config)
    plain = probe_module.probe_accuracy

    def one_guesses(*args):
        right = plain(*args)
        right[1] = 60
        return right

    monkeypatch.setattr(probe_module, "probe_accuracy", one_guesses)
    neurons = find_neurons(model, prompts, config, pad_id=0).neurons
    assert [one.is_convincing for one in neurons] == [True, False, True, True]
    assert not neurons[1].rows
    assert neurons[0].rows


def test_too_few_prompts_are_refused():
    with pytest.raises(
        DataError, match=r"at least 10 different prompts of each class .* got 9 harmful and 30 ordinary"
    ):
        build_prompts(draw(9), draw(30, seed=1), NeSTConfig())
    with pytest.raises(DataError, match="got 0 harmful and 30 ordinary"):
        build_prompts([], draw(30), NeSTConfig())
    config = NeSTConfig(held_out=0.1)
    model, prompts = make_model(), build_prompts(*both(10), config)
    with pytest.raises(DataError, match="enough held-out prompts to tell 4 probes from guessing, but got 2"):
        find_neurons(model, prompts, config, pad_id=0)


def test_prompts_in_both_classes_are_refused():
    harmful, ordinary = both()
    with pytest.raises(DataError, match="to differ, but 2 stand in both classes"):
        build_prompts(harmful, [*ordinary, *harmful[:2]], NeSTConfig())


def test_prompts_are_balanced_drawn_by_the_seed_and_held_out_by_class():
    harmful, ordinary = draw(50), draw(80, seed=1, low=200)
    prompts = build_prompts(harmful, ordinary, NeSTConfig(count=20, held_out=0.25))
    assert len(prompts.ids) == 40
    assert prompts.labels.tolist() == [True] * 20 + [False] * 20
    assert int(prompts.is_held_out[:20].sum()) == int(prompts.is_held_out[20:].sum()) == 5
    assert prompts.ids == build_prompts(harmful, ordinary, NeSTConfig(count=20)).ids
    assert prompts.ids != build_prompts(harmful, ordinary, NeSTConfig(count=20, seed=1)).ids
    assert len(build_prompts(harmful, ordinary, NeSTConfig()).ids) == 100


@pytest.mark.parametrize(("held_out", "left"), [(0.999, 0), (0.97, 1)])
def test_probes_need_prompts_to_train_on(held_out, left):
    text = (
        rf"`held_out` to leave at least 2 of 30 prompts .* but got {held_out}, which leaves {left}\. Lower `held_out`"
    )
    with pytest.raises(DataError, match=text):
        build_prompts(*both(), NeSTConfig(held_out=held_out))


def test_two_prompts_of_each_class_are_enough_to_train_on():
    prompts = build_prompts(*both(), NeSTConfig(held_out=0.93))
    labels = prompts.labels[~prompts.is_held_out]
    assert labels.tolist() == [True, True, False, False]
    assert bool(fit_probes(torch.randn(1, 4, 6), labels, decay=1e-3).weights.isfinite().all())
