import math
import random

import numpy as np
import pytest

from experiments.attacks.texts.distribution import LEVELS, Composition, Distribution
from experiments.attacks.texts.preference import Preference
from experiments.attacks.texts.transforms import TRANSFORMS, Step

GOOD = Composition((Step("word_scrambling", 0.5), Step("story", 1.0)), "inside_out")
BAD = Composition((Step("base64", 1.0),), "outside_in")


def test_draws_are_compositions_of_the_catalogue():
    chance, own = random.Random(0), Distribution(most=3)
    found = [own.draw(chance) for _ in range(400)]
    assert {len(one.steps) for one in found} == {1, 2, 3}
    assert {step.name for one in found for step in one.steps} == set(TRANSFORMS)
    assert {step.strength for one in found for step in one.steps} == set(LEVELS)
    groups = [[TRANSFORMS[step.name].group for step in one.steps] for one in found]
    assert all(own.count("encoding") <= 1 and own.count("wrapping") <= 1 for own in groups)


def test_a_round_moves_the_probabilities_by_the_stated_amount():
    own = Distribution(rate=0.5)
    before = own.include["story"], own.include["base64"]
    own.learn([(GOOD, True)] * 4 + [(BAD, False)] * 6)
    part = 0.5 * 4 / 8
    assert own.include["story"] == pytest.approx(before[0] + part * (1 - before[0]))
    assert own.include["base64"] == pytest.approx(before[1] * (1 - part))
    assert own.levels["story"] == pytest.approx([0.25 * (1 - part)] * 3 + [0.25 + part * 0.75])
    assert own.orders["inside_out"] == pytest.approx(0.5 + part * 0.5)
    assert own.to_dict()["worked"] == [{"composition": str(GOOD), "order": "inside_out", "successes": 4, "failures": 0}]


def test_a_round_without_success_moves_nothing():
    own, untouched = Distribution(), Distribution()
    own.learn([(BAD, False)] * 20)
    assert own.to_dict() == untouched.to_dict()


def test_nothing_dies():
    own = Distribution(rate=1.0)
    for _ in range(50):
        own.learn([(GOOD, True)] * 50)
    chance = random.Random(1)
    assert own.include["base64"] < 1e-9
    found = [own.explore(chance) for _ in range(600)]
    assert {step.name for one in found for step in one.steps} == set(TRANSFORMS)


def test_the_posterior_knows_what_worked_and_how_sure_it_is():
    model = Preference(tuple(TRANSFORMS))
    model.learn([(GOOD, number % 4 != 0) for number in range(80)] + [(BAD, False)] * 80, number=1)
    scores = model.scores([GOOD, BAD], number=1, draws=4000, chance=np.random.default_rng(0))
    assert scores.shape == (4000, 2)
    assert scores[:, 0].mean() == pytest.approx(math.log(3), abs=0.25)
    assert scores[:, 0].std() == pytest.approx(math.sqrt(1 / (80 * 0.75 * 0.25)), rel=0.2)
    assert (scores[:, 0] > scores[:, 1]).mean() > 0.99


def test_learning_nothing_changes_nothing():
    model = Preference(("story",))
    model.learn([], number=1)
    assert model.scores([Composition((Step("story", 1.0),), "inside_out")], number=1, draws=1, chance=_Zero()) == 0


class _Zero:
    def standard_normal(self, shape):
        return np.zeros(shape)
