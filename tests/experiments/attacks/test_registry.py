"""Attacks by name: cards, settings, and what is refused."""

from __future__ import annotations

import pytest

from experiments.attacks.interface import Attack, register_attack
from experiments.attacks.prompts.direct import DirectConfig
from experiments.attacks.registry import create_attack, known_attacks, validate_attack
from framework.errors import ConfigError

PROMPT_ATTACKS = {"direct", "templates", "persona", "prefill", "best_of_n", "code_switching"}


def test_every_attack_has_a_card_and_settings():
    known = known_attacks()
    assert set(known) >= PROMPT_ATTACKS
    for entry in known.values():
        assert ":" in entry.summary
        assert entry.attack_class.name == entry.name
        assert entry.attack_class.kind in ("prompt", "weights", "finetuning")


@pytest.mark.parametrize("name", sorted(PROMPT_ATTACKS))
def test_defaults_make_an_attack_with_a_budget(name):
    assert create_attack(name).budget >= 1


def test_every_problem_is_named_at_its_place():
    problems = validate_attack("best_of_n", {"queries": 0, "sigm": 1, "sigma": 2}, path="attacks.bon")
    assert any("`attacks.bon.queries` to be a whole number ≥ 1, but got 0" in one for one in problems)
    assert any("but got 'sigm'. Did you mean `sigma`?" in one for one in problems)
    assert any("`attacks.bon.sigma` to be a share between 0 and 1, but got 2" in one for one in problems)


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"Expected `attack` to be one of .*templates.* Did you mean 'templates'"):
        create_attack("template")


def test_budget_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="`prefill` to have a budget of at least 1 query a request, but got 0"):
        create_attack("prefill", {"tokens": []})


def test_what_an_attack_says_of_its_settings_is_passed_on():
    with pytest.raises(ConfigError, match=r"persona: Expected `names` to be one of .* but got 'nobody'"):
        create_attack("persona", {"names": ["nobody"]})


def test_a_name_is_taken_once():
    class Other(Attack):
        kind = "prompt"

    with pytest.raises(ConfigError, match="Expected the attack name `direct` to be free"):
        register_attack("direct", config=DirectConfig)(Other)
