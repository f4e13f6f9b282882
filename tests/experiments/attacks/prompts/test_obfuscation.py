import pytest

from experiments.attacks.prompts.obfuscation import Obfuscation, ObfuscationConfig
from experiments.attacks.registry import create_attack, validate_attack
from framework.errors import ConfigError, WiringError
from tests.experiments.attacks.prompts.obfuscation_targets import REQUESTS, carry_out, gives_in_to_a_pair, never


def test_every_query_is_a_new_text_and_the_budget_is_kept():
    attack = create_attack("obfuscation", {"transform": "word_scrambling", "strength": 0.8, "queries": 4})
    rounds = carry_out(attack, never, seed=1)
    assert [len(told) for told in rounds] == [50] * 4
    own = [a for told in rounds for a in told if a.request_id == "r3"]
    assert len({a.text for a in own}) == 4
    assert len({a.query_id for told in rounds for a in told}) == 200
    assert own[0].details == {"transforms": "word_scrambling:0.8"}


def test_a_broken_request_is_left_alone():
    attack = Obfuscation(ObfuscationConfig(transform="story:1+word_scrambling:1", queries=6))
    rounds = carry_out(attack, gives_in_to_a_pair, seed=0)
    broken: set[str] = set()
    for told in rounds:
        assert not broken & {a.request_id for a in told}
        broken |= {a.request_id for a in told if a.is_success}
    assert len(broken) > 40


def test_a_transform_without_chance_is_asked_once():
    rounds = carry_out(Obfuscation(ObfuscationConfig(transform="rot13", strength=1.0)), never, seed=0)
    assert [len(told) for told in rounds] == [50]


def test_texts_that_are_too_long_are_not_sent():
    config = ObfuscationConfig(transform="filler", strength=0.5, longest=240, queries=3)
    rounds = carry_out(Obfuscation(config), never, seed=0)
    assert rounds
    assert max(len(a.text) for told in rounds for a in told) <= 240


def test_the_seed_decides_the_texts():
    attack = Obfuscation(ObfuscationConfig(queries=2))
    first, again, other = (carry_out(attack, never, seed=seed) for seed in (3, 3, 4))
    assert first == again != other


def test_the_same_queries_come_until_they_are_told():
    attack = Obfuscation(ObfuscationConfig())
    attack.start(REQUESTS[:2], seed=0)
    assert attack.ask() == attack.ask()
    with pytest.raises(WiringError, match="Expected the attempts of the 2 queries last asked for"):
        attack.tell([])


def test_bad_settings_are_refused_with_all_problems():
    problems = validate_attack("obfuscation", {"transform": "storry", "strength": 0.5})
    assert any("Did you mean 'story'" in problem for problem in problems)
    with pytest.raises(ConfigError, match=r"`obfuscation.queries`|`queries`"):
        create_attack("obfuscation", {"queries": 0})
    with pytest.raises(ConfigError, match="share between 0 and 1"):
        create_attack("obfuscation", {"strength": 2.0})
