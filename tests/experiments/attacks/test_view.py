"""The tables of a suite: which point stands for an attack, what is shown, what is redacted."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from experiments.attacks.interface import Attempt
from experiments.attacks.transcript import Transcript
from experiments.attacks.view import best_point, print_examples, print_plan, print_suite, suite_markdown
from framework.evaluation.rates import Rate
from framework.files import to_plain


def point(spent: int, broken: int, *, utility: float | None = 1.0, **setting: Any) -> dict[str, Any]:
    metrics = {"attack_success": to_plain(Rate.of("attack_success", broken, 20))}
    if utility is not None:
        metrics["utility_share"] = {"value": utility}
    return {"spent": spent, "metrics": metrics, "setting": setting, "successes": {}}


def outcome(name: str, unit: str, *points: dict[str, Any]) -> dict[str, Any]:
    cost = {"seconds": 61.0}
    return {"name": name, "unit": unit, "points": list(points), "cost": cost, "transcript": f"transcript-{name}.jsonl"}


@pytest.fixture
def results(tmp_path) -> dict[str, Any]:
    prompts = outcome("search", "queries", *(point(k, k) for k in range(1, 13)))
    weights = outcome("nudged", "edits", point(0, 19, utility=0.2, factor=2.0), point(0, 7, factor=1.0, facts={"l": 1}))
    return {
        "model": {"label": "mine-1234", "endpoint": False},
        "suite": {"name": "tried", "utility_floor": 0.9, "judges": ["rules"], "max_new_tokens": 40},
        "requests": {"count": 20, "overlap": {"num_prompts": 22, "exact": ["a", "b"], "near": ["c"], "excluded": 2}},
        "outcomes": [prompts, weights],
        "failed": [{"name": "bad", "error": "Expected luck."}],
        "worst_case": {"text": "60.0% by search at 12 queries"},
        "folder": str(tmp_path),
    }


def shown(call, width: int = 120) -> str:
    stream = io.StringIO()
    call(Console(file=stream, width=width))
    return stream.getvalue()


def test_point_of_an_attack_keeps_the_utility_where_it_can(results):
    assert best_point(results["outcomes"][1], 0.9)["setting"]["factor"] == 1.0
    assert best_point(results["outcomes"][1], 0.1)["setting"]["factor"] == 2.0
    assert best_point(outcome("all", "edits", point(0, 3, utility=0.1)), 0.9)["spent"] == 0
    assert best_point(results["outcomes"][0], 0.9)["spent"] == 12


def test_markdown_has_rates_with_counts_and_success_by_queries(results):
    text = suite_markdown(results)
    assert "| search | 12 queries | 60.0 % (12/20;" in text
    assert "@1\u00a05.0\u00a0%, @10\u00a050.0\u00a0%, @12\u00a060.0\u00a0%" in text
    assert "| nudged (factor 1.0) | 0 edits | 35.0 % (7/20;" in text
    assert "- Worst case: 60.0% by search at 12 queries." in text
    assert "Of 22 requests 2 stood in the training data word for word and 1 nearly; 2 were left out." in text
    assert "- bad failed: Expected luck." in text


def test_terminal_shows_the_same_on_80_columns(results):
    text = shown(lambda console: print_suite(results, console), width=80)
    for wanted in ("search", "nudged", "factor 1.0", "60.0 %", "(12/20;", "Worst case", "1 min", "bad failed"):
        assert wanted in text
    assert max(map(len, text.partition("Worst case")[0].split("\n"))) <= 80


def test_plan_says_whence_the_speed(results):
    row = {"label": "a", "attack": "direct", "unit": "queries", "budget": 1, "queries": 20, "is_finished": False}
    plan = {
        "suite": "tried",
        "model": results["model"],
        "requests": 20,
        "overlap": results["requests"]["overlap"],
        "speed": {"value": 120.0, "is_measured": False},
        "seconds": 125.0,
        "attacks": [{**row, "seconds": 125.0}, {**row, "label": "b", "is_finished": True, "seconds": 0.0}],
    }
    text = shown(lambda console: print_plan(plan, console))
    assert "About 2 min 05 s at 120 tokens/s (assumed from the model's size)." in text
    assert "finished" in text
    plan["overlap"]["unknown"] = ["a run", "a method"]
    assert "2 were left out; 2 sources could not be looked at." in shown(lambda console: print_plan(plan, console), 200)
    assert "2 were left out" in text
    plan |= {"speed": None, "seconds": None, "overlap": None}
    plan["attacks"][0]["seconds"] = None
    assert "About" not in shown(lambda console: print_plan(plan, console), 200)


def test_examples_are_lengths_unless_texts_are_asked_for(results, tmp_path):
    results["outcomes"] = results["outcomes"][:1]
    attempts = [Attempt(n, f"r{n}", f"r{n}", "four words are sent", "two words", n > 1) for n in (1, 2, 3)]
    Transcript(tmp_path / "transcript-search.jsonl", {}).add(attempts)
    text = shown(lambda console: print_examples(results, 1, console))
    assert text == "search r2 query 2: [query of 4 words redacted] -> [reply of 2 words redacted]\n"
    text = shown(lambda console: print_examples(results, 2, console, is_redacted=False))
    assert text.count("four words are sent -> two words") == 2


def test_some_queries_that_were_the_plain_request_are_told(results):
    metrics = results["outcomes"][0]["points"][-1]["metrics"]
    for plain, is_told in ((0, False), (5, True), (20, False)):
        metrics["unchanged_rate"] = to_plain(Rate.of("unchanged_rate", plain, 20))
        assert ("search: 5/20 queries were the plain request." in suite_markdown(results)) == is_told
