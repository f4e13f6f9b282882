from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from methods.nest.functional import (
    Probes,
    add_shared_vectors,
    chosen_rows,
    fit_probes,
    fold_rows,
    mean_difference,
    probe_accuracy,
    random_rows,
    smallest_convincing,
    standardise,
    z_scores,
)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def separated(modules=3, prompts=20, neurons=40, gap=1.0):
    labels = torch.arange(prompts) < prompts // 2
    return random(modules, prompts, neurons) + gap * labels[None, :, None] * random(modules, 1, neurons, seed=1), labels


# ---- probes ------------------------------------------------------------------------------------------------------


def primal_optimum(X, y, decay):
    """The same objective minimised over w and b directly."""
    w, b = torch.zeros(X.shape[1], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    parameters = [w.requires_grad_(), b.requires_grad_()]
    optimizer = torch.optim.LBFGS(parameters, max_iter=2000, tolerance_grad=1e-12, tolerance_change=1e-16)

    def closure():
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(X @ w + b, y.double())
        loss = loss + decay / 2 * (w.square().sum() + b.square().sum())
        loss.backward()
        return loss

    for _ in range(5):
        optimizer.step(closure)
    return w.detach(), b.detach()


@pytest.mark.parametrize("decay", [1e-3, 1e-1, 10.0])
@pytest.mark.parametrize("gap", [0.0, 1.0, 20.0])
def test_the_probe_is_the_optimum_of_its_objective(decay, gap):
    X, y = separated(modules=1, gap=gap)
    w, b = primal_optimum(X[0], y, decay)
    probes = fit_probes(X, y, decay=decay)
    torch.testing.assert_close(probes.weights[0], w, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(probes.bias[:1], b, rtol=1e-5, atol=1e-6)


def test_probes_of_all_modules_at_once_equal_separate_ones():
    X, y = separated()
    together = fit_probes(X, y, decay=1e-3)
    for module in range(len(X)):
        alone = fit_probes(X[module : module + 1], y, decay=1e-3)
        torch.testing.assert_close(together.weights[module], alone.weights[0], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(together.bias[module], alone.bias[0], rtol=1e-10, atol=1e-12)


def test_a_probe_with_more_prompts_than_neurons_and_with_large_activations_converges():
    X, y = separated(modules=1, prompts=60, neurons=5)
    probes = fit_probes(1e3 * X, y, decay=1e-3)
    residual = torch.sigmoid(1e3 * X[0] @ probes.weights[0] + probes.bias[0]) - y.double()
    gradient = 1e3 * X[0].T @ residual / 60 + 1e-3 * probes.weights[0]
    assert float(gradient.abs().max()) < 1e-3 * 1e-1  # activations of 1e3


def test_the_mean_difference_is_one_and_its_bias_cuts_half_way():
    X, y = separated()
    probes = mean_difference(X, y)
    torch.testing.assert_close(probes.weights, X[:, y].mean(1) - X[:, ~y].mean(1))
    middle = 0.5 * (X[:, y].mean(1) + X[:, ~y].mean(1))
    torch.testing.assert_close((probes.weights * middle).sum(1) + probes.bias, torch.zeros(3, dtype=torch.float64))


def test_accuracy_counts_prompts_on_the_right_side():
    probes = Probes(torch.tensor([[1.0, 0.0]]).double(), torch.tensor([-0.5]).double())
    X = torch.tensor([[[1.0, 9.0], [0.0, 9.0], [1.0, 9.0]]])
    assert probe_accuracy(probes, X, torch.tensor([True, False, False])).tolist() == [2]


@pytest.mark.parametrize(
    ("number", "level", "expected"), [(10, 0.01, 10), (10, 0.05, 9), (4, 0.01, 5), (100, 0.01, 63)]
)
def test_the_smallest_convincing_number_is_the_binomial_tail(number, level, expected):
    found = smallest_convincing(number, share=0.5, level=level)
    assert found == expected
    tail = sum(math.comb(number, right) for right in range(found, number + 1)) / 2**number
    assert tail <= level


@pytest.mark.parametrize("number", [1100, 5000])
def test_the_smallest_convincing_number_of_many_prompts_is_exact(number):
    found = smallest_convincing(number, share=0.5, level=0.01)
    tails = [sum(math.comb(number, right) for right in range(least, number + 1)) for least in (found - 1, found)]
    assert tails[1] * 100 <= 2**number < tails[0] * 100
    assert smallest_convincing(number, share=0.9999, level=0.01) == number + 1


def test_standardising_leaves_a_constant_neuron_at_zero():
    values = standardise(torch.tensor([[[1.0, 7.0], [3.0, 7.0]]])).values
    assert values.tolist() == [[[-1.0, 0.0], [1.0, 0.0]]]


def test_standardising_does_not_blow_rounding_up():
    features = torch.tensor([[[1.0, 7.00001], [3.0, 7.0]]])
    assert standardise(features, noise=1e-4).values.tolist() == [[[-1.0, 0.0], [1.0, 0.0]]]
    assert standardise(features).values[0, :, 1].abs().min() > 0.9


# ---- rows --------------------------------------------------------------------------------------------------------


def test_z_scores_are_those_of_each_module_and_zero_where_all_are_equal():
    weights = random(2, 50)
    z = z_scores(weights)
    torch.testing.assert_close(z.mean(1), torch.zeros(2, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(z.std(1, correction=0), torch.ones(2, dtype=torch.float64))
    assert z_scores(torch.ones(1, 4)).tolist() == [[0.0] * 4]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0, 3]),
        ({"is_two_sided": True}, [0, 1, 3]),
        ({"threshold": 9.0}, []),
        ({"threshold": 9.0, "min_rows": 1}, [0]),
        ({"max_rows": 1}, [0]),
        ({"threshold": 9.0, "min_rows": 9}, [0, 2, 3]),
        ({"threshold": 9.0, "min_rows": 3, "is_two_sided": True}, [0, 1, 3]),
    ],
)
def test_chosen_rows(options, expected):
    z, weights = torch.tensor([5.0, -4.0, 1.0, 4.0]), torch.tensor([1.0, -1.0, 0.1, 1.0])
    settings = {"threshold": 3.0, "is_two_sided": False, **options}
    assert chosen_rows(z, weights, **settings).tolist() == expected


def test_a_row_with_a_negative_weight_never_counts_as_speaking_for_harm():
    z, weights = torch.tensor([5.0, 4.0]), torch.tensor([-0.1, 0.1])
    assert chosen_rows(z, weights, threshold=3.0, is_two_sided=False, min_rows=2).tolist() == [1]


def test_random_rows_are_as_many_and_others():
    chosen = torch.tensor([1, 5, 7])
    found = random_rows(chosen, size=20, generator=torch.Generator().manual_seed(0))
    assert found.numel() == 3
    assert not set(found.tolist()) & set(chosen.tolist())
    assert found.tolist() == random_rows(chosen, size=20, generator=torch.Generator().manual_seed(0)).tolist()
    assert random_rows(torch.tensor([0, 1, 3]), size=4, generator=torch.Generator().manual_seed(0)).numel() == 3


# ---- the added product and the fold --------------------------------------------------------------------------------


@pytest.mark.parametrize("is_transposed", [False, True])
def test_the_added_product_equals_the_folded_weight(is_transposed):
    W, x, deltas = random(6, 4), random(2, 3, 4, seed=1), random(2, 4, seed=2)
    rows, clusters = torch.tensor([1, 4, 5]), torch.tensor([0, 1, 0])
    membership = F.one_hot(clusters, 2).T.double()
    hooked = add_shared_vectors(F.linear(x, W), x, deltas, rows, membership)
    stored = W.T.contiguous() if is_transposed else W
    folded = fold_rows(stored, rows, deltas[clusters], is_transposed=is_transposed)
    oriented = folded.T if is_transposed else folded
    torch.testing.assert_close(hooked, F.linear(x, oriented), rtol=1e-12, atol=1e-12)
    assert torch.equal(oriented[[0, 2, 3]], W[[0, 2, 3]])


def test_the_gradient_of_the_added_product_is_right():
    x, deltas, rows = random(3, 4), random(2, 4, seed=1).requires_grad_(), torch.tensor([0, 2])
    membership = torch.eye(2, dtype=torch.float64)
    output = random(3, 5, seed=2)
    assert torch.autograd.gradcheck(
        lambda d: add_shared_vectors(output.clone(), x, d, rows, membership).square(), (deltas,)
    )
