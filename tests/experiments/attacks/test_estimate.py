"""How much work a suite is, and at what speed it is done."""

from __future__ import annotations

from experiments.attacks.estimate import find_speed, keep_speed, measuring_tokens, plan_attacks
from experiments.attacks.registry import create_attack
from experiments.attacks.suite import NamedAttack, SuiteConfig
from framework.files import ArtifactStore
from tests.conftest import make_model

SUITE = SuiteConfig(name="s", attacks={"direct": {}}, max_new_tokens=10)


def named(name: str, **settings) -> NamedAttack:
    return NamedAttack(name, create_attack(name, settings), settings)


def test_work_is_counted_in_generated_tokens():
    trained = {"steps": [0, 4], "learning_rates": [1e-3, 1e-2]}
    plans = plan_attacks(SUITE, [named("best_of_n", queries=7), named("benign_drift", **trained)], 5)
    assert (plans[0].budget, plans[0].queries, plans[0].tokens) == (7, 35, 350)
    assert (plans[1].unit, plans[1].budget, plans[1].queries) == ("steps", 8, 20)
    assert plans[1].tokens > 4 * measuring_tokens(SUITE, 5)


def test_speed_is_assumed_from_the_size_until_it_was_measured(tmp_path):
    folders = []
    for hidden in (16, 64):
        folders.append(tmp_path / str(hidden))
        make_model(hidden=hidden).save_pretrained(folders[-1])
    store = ArtifactStore(tmp_path / "store")
    small, large = (find_speed(store, "m", folder) for folder in folders)
    assert small.value > large.value > 0
    assert not small.is_measured
    keep_speed(store, "m", tokens=0, seconds=1.0)
    assert not find_speed(store, "m", folders[0]).is_measured
    keep_speed(store, "m", tokens=300, seconds=2.0)
    assert find_speed(store, "m", folders[0]) == (150.0, True)
    assert find_speed(store, "endpoint", None) is None
