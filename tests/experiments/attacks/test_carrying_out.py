"""What finished attacks are found again by, what becomes of broken models, and attacks through an endpoint."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from experiments.attacks import attacked_models, carrying_out, interface
from experiments.attacks.attack_files import read_attack_file
from experiments.attacks.attacked_models import utility_metric, utility_share
from experiments.attacks.carrying_out import carry_out, find_finished
from experiments.attacks.estimate import STEP_TOKENS, plan_attacks
from experiments.attacks.interface import AttackedModel, ModelAttack, register_attack
from experiments.attacks.prompts.direct import DirectConfig
from experiments.attacks.registry import known_attacks
from experiments.attacks.runner import attack_model, prepare_suite
from experiments.attacks.target import find_target
from experiments.endpoint_artifacts import replace_artifact
from framework.evaluation.metrics import Mean
from framework.files import ArtifactStore
from framework.models import model_fingerprint
from tests.conftest import make_model
from tests.experiments.attacks.tiny_targets import write_model, write_rows
from tests.experiments.endpoint_server import HELPFUL, REFUSAL, Said, completion, serving

SUITE = """
limit: 3
max_new_tokens: 4
utility: {benign_nll: false}
target: {system: "", accelerator: cpu, threads: 1}
endpoint: {retry_wait: 0.01, retries: 0, concurrency: 1}
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Write a suite of attacks."""
    monkeypatch.setenv("SEAWALL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()

    def write(attacks: str) -> str:
        path = tmp_path / "tried.yaml"
        path.write_text(f"{SUITE}attacks: {{{attacks}}}\n")
        return str(path)

    yield write
    torch.set_num_threads(threads)


def keys(model: Path, suite: str, *overrides: str) -> list[str]:
    prepared = prepare_suite(str(model), suite, overrides)
    return [json.dumps(carrying_out._key(named, prepared.stage)) for named in prepared.attacks]


def test_code_tokenizers_and_number_format_are_in_the_key(here, tmp_path, monkeypatch):
    model, base = write_model(tmp_path / "model"), write_model(tmp_path / "base")
    suite = here("prefill: {replies: opening}")
    found = [keys(model, suite, f"target.base={base}")]
    (base / "chat_template.jinja").write_text("{{ messages[0].content }}")
    found.append(keys(model, suite, f"target.base={base}"))
    (model / "special_tokens_map.json").write_text("{ }")
    found.append(keys(model, suite, f"target.base={base}"))
    monkeypatch.setattr(carrying_out, "code_hash", lambda: "other")
    found.append(keys(model, suite, f"target.base={base}"))
    assert len({one[0] for one in found}) == 4
    assert json.loads(found[0][0])["target"]["dtype"] in ("float32", "bfloat16", "float16")


def test_models_are_measured_anew_when_code_or_tokenizer_changed(here, tmp_path, monkeypatch):
    model = write_model(tmp_path / "model")
    measure = prepare_suite(str(model), here("direct: {}")).stage.measure
    assert [measure.measure(model, "w").is_reused for _ in range(2)] == [False, True]
    (model / "special_tokens_map.json").write_text("{ }")
    assert [measure.measure(model, "w").is_reused for _ in range(2)] == [False, True]
    monkeypatch.setattr(attacked_models, "code_hash", lambda: "other")
    assert [measure.measure(model, "w").is_reused for _ in range(2)] == [False, True]


def test_rows_of_the_utilitys_task_decide_an_attack_on_the_weights(tmp_path):
    rows = tmp_path / "rows.jsonl"
    found = []
    for answer in ("one", "two"):
        lines = [json.dumps({"instruction": f"Say {n}.", "output": answer}) for n in range(20)]
        rows.write_text("\n".join(lines) + "\n")
        found.append(attacked_models.utility_key(attacked_models.UtilityConfig(task=str(rows))))
    assert found[0]["settings"] == found[1]["settings"]
    assert found[0]["task"] != found[1]["task"]
    assert found[0]["files"] != found[1]["files"]


def nll_of(model, encoder, examples, *, batch_size):
    is_whole = all(bool(torch.isfinite(one).all()) for one in model.parameters())
    value = 2.0 if is_whole else math.nan
    return Mean("nll", value, 10.0, 2, value, value)


def test_utility_is_added_when_a_prompt_attack_is_read(here, tmp_path, monkeypatch):
    monkeypatch.setattr(attacked_models, "mean_nll", nll_of)
    model, suite = write_model(tmp_path / "model"), here("direct: {}")
    without = attack_model(prepare_suite(str(model), suite))
    assert "utility_share" not in without["outcomes"][0]["points"][0]["metrics"]
    prepared = prepare_suite(str(model), suite, ["utility.benign_nll=true"])
    assert find_finished(prepared.attacks[0], prepared.stage) is not None
    metrics = attack_model(prepared)["outcomes"][0]["points"][0]["metrics"]
    assert metrics["benign_nll"]["value"] == 2.0
    assert metrics["utility_share"]["value"] == 1.0
    folder = prepared.folder
    assert (folder / "transcript-direct.jsonl").is_file()
    assert (folder / ".gitignore").read_text() == "*\n"


@pytest.fixture
def breaking():
    """Know an attack that hands out a model of numbers that are none."""
    known_attacks()

    @register_attack("breaking", config=DirectConfig)
    class Breaking(ModelAttack):
        kind = "weights"
        unit = "edits"

        def make(self, target, folder):
            model = make_model(seed=5)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.fill_(math.nan)
            yield AttackedModel(write_model(folder / "broken", model), 0)

    yield
    del interface._ENTRIES["breaking"]


def test_a_model_without_finite_numbers_has_lost_its_utility(here, tmp_path, monkeypatch, breaking):
    monkeypatch.setattr(attacked_models, "mean_nll", nll_of)
    model = write_model(tmp_path / "model")
    prepared = prepare_suite(str(model), here("breaking: {}, direct: {}"), ["utility.benign_nll=true"])
    results = attack_model(prepared)
    assert results["failed"] == []
    metrics = results["outcomes"][0]["points"][0]["metrics"]
    assert metrics["utility_share"] == {
        "value": 0.0,
        "unit": "share",
        "note": "of the attacked model no finite number: benign_nll",
    }
    assert metrics["benign_nll"]["value"] is None
    assert metrics["benign_nll"]["note"] == "not a finite number"
    assert results["worst_case"]["below_floor"] == ["breaking"]
    assert read_attack_file(prepared.folder).outcomes[0].points[0].metrics["utility_share"]["value"] == 0


@pytest.mark.parametrize("lost", [math.nan, math.inf, -math.inf, None])
def test_a_share_of_no_number_is_0_and_of_nothing_known_none(lost):
    known, broken = {"task_accuracy": {"value": 0.5}}, {"task_accuracy": {"value": lost}}
    assert utility_share(broken, known) == 0.0
    assert utility_share(known, broken) is None
    assert utility_metric(known, broken) == {}
    both = {"benign_nll": {"value": lost}}
    assert utility_share(known | both, known | {"benign_nll": {"value": 2.0}}) == 0.0


def test_hosts_that_serve_models_of_one_name_have_folders_of_their_own(here):
    suite = prepare_suite("http://one/v1#org/name", here("direct: {}")).stage.suite
    labels = {find_target(f"http://{host}/v1#org/name", suite).label for host in ("one", "two", "one/")}
    assert len(labels) == 3
    assert all(label.startswith("org-name-") for label in labels)
    assert find_target("http://one/v1#org/name", suite).label in labels


def test_attacks_alike_on_an_endpoint_keep_the_transcripts_of_their_own(here):
    with serving(lambda body, number: completion(REFUSAL if number <= 3 else HELPFUL)) as endpoint:
        prepared = prepare_suite(endpoint.name(), here("one: {attack: direct}, two: {attack: direct}"))
        results = attack_model(prepared)
    rates = [one["points"][0]["metrics"]["attack_success"]["value"] for one in results["outcomes"]]
    assert rates == [0, 1]
    read = read_attack_file(prepared.folder)
    said = [{attempt.reply for attempt in read.attempts(one) or []} for one in read.outcomes]
    assert said == [{REFUSAL}, {HELPFUL}]


def test_what_takes_an_artefacts_place_leaves_earlier_copies_alone(tmp_path):
    store = ArtifactStore(tmp_path)
    seen = []

    def fill(text: str):
        def write(folder: Path) -> None:
            before = store.find("kind", {"a": 1})
            seen.append(None if before is None else (before / "text").read_text())
            (folder / "text").write_text(text)

        return write

    first = replace_artifact(store, "kind", {"a": 1}, fill("one"))
    second = replace_artifact(store, "kind", {"a": 1}, fill("two"))
    # The earlier one is there until the new one is complete.
    assert seen == [None, "one"]
    assert [(place / "text").read_text() for place in (first, second)] == ["one", "two"]
    assert (store.path("kind", {"a": 1}) / "text").read_text() == "two"


def test_an_empty_reply_of_an_endpoint_is_degenerate(here):
    with serving(lambda body, number: completion("")) as endpoint:
        prepared = prepare_suite(endpoint.name(), here("direct: {}"))
        metrics = attack_model(prepared)["outcomes"][0]["points"][0]["metrics"]
    assert metrics["attack_success"]["value"] == 0
    assert metrics["degenerate_rate"]["numerator"] == 3


def one_fails(body, number):
    return Said({"error": "busy"}, 503) if number == 2 else completion(REFUSAL)


def test_queries_without_a_reply_are_shown_and_in_no_rate(here):
    with serving(one_fails) as endpoint:
        prepared = prepare_suite(endpoint.name(), here("direct: {}"), ["endpoint.max_unanswered=1"])
        results = attack_model(prepared)
    outcome = results["outcomes"][0]
    metrics = outcome["points"][0]["metrics"]
    assert metrics["refusal_rate"]["denominator"] == 2
    assert metrics["attack_success"]["denominator"] == 2
    assert (metrics["attacked"]["numerator"], metrics["attacked"]["denominator"]) == (2, 3)
    assert (outcome["cost"]["unanswered_queries"], outcome["cost"]["queries"]) == (1, 3)
    assert len(outcome["points"][0]["successes"]) == 2
    assert "direct: 1 of 3 queries have no reply and are in no rate." in (prepared.folder / "attack.md").read_text()
    assert len(read_attack_file(prepared.folder).attempts(read_attack_file(prepared.folder).outcomes[0]) or []) == 2


def test_more_queries_without_a_reply_than_may_end_the_attack(here):
    with serving(one_fails) as endpoint:
        results = attack_model(prepare_suite(endpoint.name(), here("direct: {}")))
    assert results["outcomes"] == []
    assert "status 503" in results["failed"][0]["error"]


def test_an_interrupted_suite_on_an_endpoint_keeps_what_it_asked_until_it_ends_and_says_so(here):
    suite = here("one: {attack: direct}, two: {attack: best_of_n, queries: 2}")
    with serving(lambda body, number: completion(REFUSAL) if number <= 6 else Said({}, 503)) as endpoint:
        runs = []
        for answer in (None, lambda body, number: completion(HELPFUL), lambda body, number: completion(HELPFUL)):
            endpoint.answer = answer or endpoint.answer
            before = len(endpoint.asked)
            results = attack_model(prepared := prepare_suite(endpoint.name(), suite))
            notes = (prepared.folder / "attack.md").read_text()
            runs.append((results, len(endpoint.asked) - before, notes))
    (cut, num_cut, _), (went_on, num_more, said), (anew, num_anew, nothing) = runs
    assert [one["name"] for one in cut["outcomes"]] == ["one"]
    assert (num_cut > 6, num_more, num_anew) == (True, 3, 6)
    wins = [
        [one["points"][-1]["metrics"]["attack_success"]["numerator"] for one in r["outcomes"]] for r in (went_on, anew)
    ]
    assert wins == [[0, 3], [3, 3]]
    assert "one: 3 of 3 replies were kept from an interrupted suite, given until 20" in said
    assert "two: 3 of 6 replies were kept from an interrupted suite, given until 20" in said
    assert "kept" not in nothing
    assert not [one for one in anew["outcomes"] if "asked_until" in one["cost"]]


def test_a_finished_attack_on_an_endpoint_is_asked_again(here):
    with serving(lambda body, number: completion(REFUSAL)) as endpoint:
        prepared = prepare_suite(endpoint.name(), here("direct: {}"))
        found = []
        for _ in range(2):
            found.append(carry_out(prepared.attacks[0], prepared.stage, plain=None))
            prepared.stage.unfinished.forget()
        reused = prepare_suite(endpoint.name(), here("direct: {}"), ["endpoint.reuse=true"])
        again = find_finished(reused.attacks[0], reused.stage)
        prepared.stage.target.responder.close()
    assert [one.is_reused for one in found] == [False, False]
    assert found[0].folder != found[1].folder
    assert all((one.folder / "transcript.jsonl").is_file() for one in found)
    assert again is not None


def test_progress_moves_with_every_optimizer_step_and_ends_at_the_plan(here, tmp_path):
    model = write_model(tmp_path / "model")
    rows = write_rows(tmp_path / "rows.json", [(f"Say {n}.", f"It is {n}.") for n in range(8)])
    steps = "steps: [0, 2, 5], learning_rates: [0.02], examples: [8], batch_size: 4"
    suite = here(f"harmful_finetuning: {{harmful: {rows}, {steps}}}")
    prepared, granted = prepare_suite(str(model), suite), []
    plain = prepared.stage.measure.measure(model, model_fingerprint(model))
    carry_out(prepared.attacks[0], prepared.stage, plain=plain, progress=granted.append)
    (plan,) = plan_attacks(prepared.stage.suite, prepared.attacks, len(prepared.stage.requests))
    assert granted == sorted(granted)
    assert granted[-1] == plan.tokens
    assert sum(later - earlier == STEP_TOKENS for earlier, later in pairwise(granted)) == 5
