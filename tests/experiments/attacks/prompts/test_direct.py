"""The plain request."""

from __future__ import annotations

from experiments.attacks.prompts.direct import Direct, DirectConfig
from tests.experiments.attacks.scripted import REQUESTS


def test_every_request_is_sent_once_as_it_is():
    attack = Direct(DirectConfig())
    attack.start(REQUESTS, seed=0)
    assert [query.prompt for query in attack.ask()] == REQUESTS
    assert attack.ask() == []
    assert attack.budget == 1
