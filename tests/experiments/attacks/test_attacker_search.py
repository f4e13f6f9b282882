import math
import random

import pytest

from experiments.attacks.attacker_search import (
    SearchConfig,
    search_and_measure,
    search_settings,
    space_problems,
    split_requests,
)
from framework.errors import ConfigError, DataError, StorageError, TrainingError
from framework.examples import Prompt
from tests.experiments.attacks.made_up_outcomes import outcome, point

SPACE = {
    "learning_rate": {"distribution": "log_uniform_values", "min": 1e-6, "max": 1e-1},
    "adapter.rank": {"values": [4, 16]},
}
REQUESTS = [Prompt(f"r{n}", "text", "harmful") for n in range(40)]


def attack(settings, requests=REQUESTS):
    """Return an attack that is best near a rate of 1e-3 and ruins the model above 1e-2."""
    rate = settings["learning_rate"]
    chance = max(0.0, 0.8 - 0.25 * abs(math.log10(rate) + 3))
    broken = {one.id: random.Random(f"{one.id} {rate}").random() < chance for one in requests}
    return outcome("harmful", [point(broken, utility=0.2 if rate > 1e-2 else 1.0)])


def test_the_search_finds_good_settings_that_keep_the_utility():
    found = search_settings(attack, SPACE, 15, 0, start={"learning_rate": 1e-6, "steps": 10}, floor=0.9)
    assert 1e-4 < found.settings["learning_rate"] < 1e-2
    assert found.settings["steps"] == 10
    assert found.settings["adapter"]["rank"] in (4, 16)
    assert len(found.trials) == 15
    assert found.trials[0].settings == {"learning_rate": 1e-6, "steps": 10}
    ruined = [trial for trial in found.trials if trial.settings["learning_rate"] > 1e-2]
    assert ruined
    assert all((trial.value, trial.best) == (0.0, None) for trial in ruined)
    assert found.best.rate.value == max(trial.value for trial in found.trials)
    assert "the best of 15 by 40 requests" in found.note


def test_the_seed_decides_the_trials():
    first, again, other = (search_settings(attack, SPACE, 5, seed).trials for seed in (1, 1, 2))
    assert first == again != other


def test_what_was_found_is_measured_on_other_requests():
    seen = []

    def run(settings, requests):
        seen.append(tuple(one.id for one in requests))
        return attack(settings, requests)

    search = SearchConfig(trials=4, space=SPACE, validation_share=0.25)
    result, own = search_and_measure(run, REQUESTS, search, seed=3)
    assert len(seen) == 5
    assert len(set(seen[:4])) == 1
    assert (len(seen[0]), len(seen[4])) == (10, 30)
    assert not set(seen[0]) & set(seen[4])
    assert result.best.rate.denominator == 10
    assert len(own.points[0].successes) == 30


def test_the_success_by_which_settings_were_chosen_is_too_high():
    def noise(settings, requests):
        broken = {one.id: random.Random(f"{one.id} {settings}").random() < 0.3 for one in requests}
        return outcome("noise", [point(broken)])

    chosen, measured = [], []
    for seed in range(12):
        search = SearchConfig(trials=10, space=SPACE)
        result, own = search_and_measure(noise, REQUESTS, search, seed=seed)
        chosen.append(result.best.rate.value)
        measured.append(own.points[0].metrics["attack_success"]["value"])
    assert sum(chosen) / 12 > 0.4
    assert abs(sum(measured) / 12 - 0.3) < 0.08


def test_settings_with_which_the_attack_cannot_be_made_are_noted():
    def picky(settings):
        if settings["adapter"]["rank"] == 4:
            raise ConfigError("Expected `rank` to be 16.")
        return attack(settings)

    told = []
    found = search_settings(picky, SPACE, 8, 0, progress=told.append)
    assert {trial.error for trial in found.trials} == {None, "Expected `rank` to be 16."}
    assert found.settings["adapter"]["rank"] == 16
    assert told == list(found.trials)
    plain = found.to_dict()
    assert plain["note"] == found.note
    assert len(plain["trials"]) == 8
    assert plain["best"]["rate"]["denominator"] == 40


def test_the_split_is_by_request_and_seed():
    first, rest = split_requests(REQUESTS, share=0.5, seed=0)
    assert sorted([*first, *rest], key=lambda one: int(one.id[1:])) == REQUESTS
    assert split_requests(REQUESTS, share=0.5, seed=0) == (first, rest)
    assert split_requests(REQUESTS, share=0.5, seed=1)[0] != first


def _refuse(settings):
    raise ConfigError("Expected a base model.")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: search_settings(attack, {}, 3, 0), ConfigError, "name at least one setting"),
        (lambda: search_settings(attack, SPACE, 0, 0), ConfigError, "`trials` to be a whole number >= 1"),
        (lambda: search_settings(attack, {"a": {"min": 2, "max": 1}}, 1, 0), ConfigError, "Expected `a`"),
        (lambda: search_settings(_refuse, SPACE, 2, 0), ConfigError, "none: Expected a base model"),
        (
            lambda: search_settings(lambda s: outcome("x", [point([1], utility=0.1)]), SPACE, 2, 0, floor=0.9),
            ConfigError,
            "the model lost its utility",
        ),
        (lambda: split_requests(REQUESTS[:3]), DataError, "at least 2 requests to choose by"),
        (lambda: SearchConfig(trials=0, space=SPACE), ConfigError, "`trials`"),
        (lambda: SearchConfig(trials=2, space={"a": {"min": 1}}), ConfigError, "parameter as W&B describes"),
    ],
)
def test_a_bad_search_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_good_space_has_no_problems():
    assert space_problems(SPACE) == []


def test_a_trial_that_fails_does_not_end_the_search_but_a_full_disk_does():
    def fragile(settings):
        if settings["adapter"]["rank"] == 4:
            raise TrainingError("Expected luck.")
        return attack(settings)

    def full(settings):
        raise StorageError("Expected room.")

    found = search_settings(fragile, SPACE, 8, 0)
    assert {trial.error for trial in found.trials} == {None, "Expected luck."}
    assert found.settings["adapter"]["rank"] == 16
    with pytest.raises(StorageError, match="Expected room"):
        search_settings(full, SPACE, 3, 0)
