"""System messages that take the deployer's place."""

from __future__ import annotations

import pytest

from experiments.attacks.prompts.persona import PERSONAS, Persona, PersonaConfig
from framework.errors import ConfigError, DataError
from tests.experiments.attacks.scripted import REQUESTS


def test_every_persona_is_tried_on_the_plain_request():
    attack = Persona(PersonaConfig())
    attack.start(REQUESTS[:1], seed=0)
    asked = [query for _ in range(attack.budget) for query in attack.ask()]
    assert [query.system for query in asked] == list(PERSONAS.values())
    assert {query.prompt.text for query in asked} == {REQUESTS[0].text}
    assert len({query.prompt.id for query in asked}) == len(PERSONAS)


def test_personas_of_a_file(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text('{"name": "sailor", "system": "You are a sailor."}\n')
    assert Persona(PersonaConfig(file=str(path))).personas == {"sailor": "You are a sailor."}
    path.write_text('{"name": "sailor"}\n')
    with pytest.raises(DataError, match=r"Expected row 1 of .* to have the texts `name` and `system`"):
        Persona(PersonaConfig(file=str(path)))


def test_unknown_persona_is_refused():
    with pytest.raises(ConfigError, match="Expected `names` to be one of character, empty"):
        Persona(PersonaConfig(names=["pirate"]))
    with pytest.raises(ConfigError, match="`names` to be a list"):
        PersonaConfig(names="empty")
