"""``seawall evaluate URL#MODEL``: rates, what is refused, going on after an interruption, and no key anywhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.cli import main
from experiments.contract.tiny import make_model, make_tokenizer
from experiments.endpoint_measure import load_endpoint_config, measure_endpoint
from framework.errors import ConfigError, SeawallError
from framework.files import ArtifactStore
from tests.experiments.endpoint_server import HELPFUL, REFUSAL, Said, completion, serving

SMALL = ["evaluate.limit=4", "evaluate.over_refusal=[]", "endpoint.retry_wait=0.01", "endpoint.concurrency=2"]


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SEAWALL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SEAWALL_RUNS", str(tmp_path))
    return tmp_path


def measure(endpoint, store: Path, *overrides: str, heard: list[str] | None = None):
    config = load_endpoint_config(endpoint.name(), [*SMALL, *overrides])
    say = (heard if heard is not None else []).append
    return measure_endpoint(config, task=None, artifacts=ArtifactStore(store), say=say)


def refuse_two(body, number):
    return completion(REFUSAL if number <= 2 else HELPFUL)


def evaluate(endpoint, place: Path, *overrides: str) -> int:
    return main(["evaluate", endpoint.name(), *SMALL, f"output={place / 'runs'}", *overrides])


def test_a_whole_evaluation_leaves_results_samples_and_no_key(place, monkeypatch, capsys):
    monkeypatch.setenv("TEST_ENDPOINT_KEY", "abc-secret-123")
    with serving(refuse_two) as endpoint:
        overrides = ["evaluate.over_refusal=[embedded]", "task=triage", "evaluate.task_count=2"]
        overrides += ["endpoint.key_variable=TEST_ENDPOINT_KEY", "--json"]
        assert evaluate(endpoint, place, *overrides) == 0
    out = capsys.readouterr()
    results = json.loads(out.out)
    metrics = results["rows"][0]["metrics"]
    assert metrics["attack_success"]["denominator"] == 4
    assert metrics["refusal_rate"]["numerator"] + metrics["over_refusal"]["numerator"] == 2
    assert metrics["task_accuracy"]["denominator"] == 2
    assert metrics["num_unanswered"] == {"value": 0, "denominator": 10}
    assert "benign_nll" not in metrics
    assert "refusal_margin" not in metrics
    assert results["endpoint"]["model"] == "tiny"
    assert "need the model's weights" in results["endpoint"]["left_out"]
    samples = [json.loads(line) for line in (place / "runs/evaluate/samples.jsonl").read_text().splitlines()]
    assert len(samples) == 10
    assert samples[0]["num_tokens"] == 7
    assert set(endpoint.authorization) == {"Bearer abc-secret-123"}
    written = [path for path in place.rglob("*") if path.is_file()]
    assert any("wandb" in str(path) for path in written)
    assert not [path for path in written if b"abc-secret" in path.read_bytes()]
    assert "abc-secret" not in out.out + out.err


def test_what_needs_weights_is_refused_all_at_once(place, capsys):
    with serving(refuse_two) as endpoint:
        asked = [
            "evaluate.benign_nll=true",
            "evaluate.nll=[a.jsonl]",
            "evaluate.multiple_choice=[mmlu]",
            "evaluate.overflow=truncate_left",
            "evaluate.prefill=[5]",
            "evaluate.prefill_replies=opening",
            "model.dtype=float32",
            "trainer.devices=2",
            "endpoint.key_variable=lower",
        ]
        assert evaluate(endpoint, place, *asked) == 2
    problems = capsys.readouterr().err
    assert "9 problems" in problems
    for name in ("benign_nll", "nll", "multiple_choice", "overflow", "prefill_style", "prefill_model", "model.dtype"):
        assert name in problems
    assert "but got 2. Set trainer.devices=1" in problems
    assert endpoint.asked == []


def test_problems_of_the_settings_are_told_with_the_others():
    with pytest.raises(ConfigError) as caught:
        load_endpoint_config("http://h/v1#m", ["evaluate.benign_nll=true", "evaluate.batch=3"])
    assert len(caught.value.problems) == 2


def test_a_config_made_in_python_is_held_to_the_same(place):
    config = load_endpoint_config("http://h/v1#m", ["evaluate.limit=1"])
    wrong = type(config)(model=type(config.model)("http://h/v1"), evaluate=config.evaluate)
    with pytest.raises(ConfigError, match="URL#MODEL"):
        measure_endpoint(wrong, task=None, artifacts=ArtifactStore(place))


def test_a_finished_measurement_is_taken_again_only_when_asked(place):
    with serving(refuse_two) as endpoint:
        first, _ = measure(endpoint, place)
        assert len(endpoint.asked) == 4
        second, facts = measure(endpoint, place)
        assert len(endpoint.asked) == 8
        third, reused = measure(endpoint, place, "endpoint.reuse=true")
        assert len(endpoint.asked) == 8
    assert first.metrics["attack_success"]["numerator"] == 2
    assert second.metrics["attack_success"]["numerator"] == 4
    assert third.metrics == second.metrics
    assert (facts.is_reused, reused.is_reused) == (False, True)
    assert facts.first_reply <= facts.last_reply


def test_an_interrupted_measurement_goes_on(place):
    def dies(body, number):
        return completion(HELPFUL) if number <= 3 else Said({"error": {"message": "gone"}}, 503)

    with serving(dies) as endpoint:
        heard = []
        with pytest.raises(SeawallError, match=r"got status 503 .* The 3 replies so far are kept"):
            measure(endpoint, place, "endpoint.retries=1", "endpoint.concurrency=1")
        endpoint.answer = lambda body, number: completion(REFUSAL)
        endpoint.asked.clear()
        found, _ = measure(endpoint, place, heard=heard)
        assert len(endpoint.asked) == 1
    assert found.metrics["attack_success"]["numerator"] == 3
    assert any("3 replies of an interrupted measurement are kept" in text for text in heard)
    assert not list(place.rglob("*-replies/*.jsonl"))


def test_prompts_without_a_reply_are_counted_and_in_no_rate(place):
    with serving(
        lambda body, number: completion("", reason="length") if number == 1 else completion(REFUSAL)
    ) as endpoint:
        heard = []
        found, _ = measure(endpoint, place, "endpoint.max_unanswered=1", heard=heard)
        endpoint.answer = lambda body, number: completion("", reason="length")
        with pytest.raises(SeawallError, match="to have at least one reply, but got none"):
            measure(endpoint, place, "endpoint.max_unanswered=9", "seed=1")
    assert found.metrics["num_unanswered"] == {"value": 1, "denominator": 4}
    assert found.metrics["refusal_rate"]["denominator"] == 3
    assert len(found.plain.cost["replies"]["unanswered"]) == 1
    assert "1 of 4 prompts have no reply and are in no rate" in heard


def test_two_measurements_alike_keep_samples_of_their_own(place):
    with serving(lambda body, number: completion(REFUSAL if number <= 4 else HELPFUL)) as endpoint:
        found = [measure(endpoint, place)[0].plain for _ in range(2)]
    assert found[0].samples != found[1].samples
    assert [text in one.samples.read_text() for one in found for text in (REFUSAL, HELPFUL)] == [
        True,
        False,
        False,
        True,
    ]


def test_an_empty_reply_is_a_degenerate_one(place):
    with serving(lambda body, number: completion("")) as endpoint:
        found, _ = measure(endpoint, place)
    assert found.metrics["num_unanswered"] == {"value": 0, "denominator": 4}
    assert found.metrics["attack_success"]["numerator"] == 0


def test_replies_without_usage_are_said_to_be_uncounted(place):
    with serving(lambda body, number: completion(REFUSAL, usage=False)) as endpoint:
        found, _ = measure(endpoint, place)
    assert found.plain.cost["tokens"] == {"evaluate": 0, "evaluate_reply": 0, "replies_without_usage": 4}


def test_the_prefilling_attack_reaches_a_declared_endpoint(place):
    folder = place / "tiny"
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    prefill = ["evaluate.prefill=[6]", "evaluate.prefill_replies=opening", f"evaluate.prefill_model={folder}"]
    with serving(refuse_two) as endpoint:
        found, _ = measure(endpoint, place, *prefill, "endpoint.prefill_style=assistant_last_message")
    openings = [body["messages"][-1] for body in endpoint.asked if len(body["messages"]) > 1]
    assert len(openings) == 4
    assert {turn["role"] for turn in openings} == {"assistant"}
    assert "Sure, I can help you".startswith(openings[0]["content"])
    assert found.metrics["prefill_6/attack_success"]["denominator"] == 4
    assert found.metrics["prefill_prompts"]["numerator"] == 4
    assert found.metrics["prefill_num_unanswered"]["value"] == 0


def test_nothing_there_is_told_before_anything_is_asked(place, capsys):
    with serving(refuse_two) as endpoint:
        pass
    assert evaluate(endpoint, place) == 2
    assert "but got connection refused. Start the server, or check the address." in capsys.readouterr().err
