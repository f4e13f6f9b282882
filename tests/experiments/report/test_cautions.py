from __future__ import annotations

import dataclasses
from pathlib import Path

from experiments.report.cautions import find_cautions, idle_methods
from experiments.report.collecting import CollectedRun, Collection, collect_runs
from experiments.report.effects import method_effects
from experiments.report.entries import find_entries, find_variants
from experiments.report.replies import replies_of


def cautions_of(collection: Collection) -> dict[str, list[str]]:
    entries = find_entries(collection.runs)
    found: dict[str, list[str]] = {}
    for caution in find_cautions(collection, entries, find_variants(entries), replies_of(entries)):
        found.setdefault(caution.topic, []).append(caution.text)
    return found


def test_what_puts_results_in_doubt_is_said(run_folders: list[Path]) -> None:
    found = cautions_of(collect_runs(run_folders))
    assert "method `slow` counted no effect in stage finetune" in found["No effect"][0]
    assert "3 models with 10 % or more empty" in found["Degenerate replies"][0]
    assert set(found) == {"No effect", "Degenerate replies"}


def test_failures_few_seeds_few_prompts_and_other_machines(run_folders: list[Path]) -> None:
    runs = collect_runs(run_folders[:2]).runs
    metrics = {**runs[1].results["rows"][-1]["metrics"]}
    metrics["attack_success"] = {**metrics["attack_success"], "denominator": 12}
    rows = [{**runs[1].results["rows"][-1], "metrics": metrics}]
    stages = [{**runs[1].results["stages"][1], "overflow": {"too_long": 3}}]
    other = {**runs[1].results, "rows": rows, "stages": stages, "environment": {"cpu": "another", "threads": 4}}
    changed = dataclasses.replace(runs[1], results=other, folder=None)
    failed = CollectedRun("gone", "Gone", error="disk full")
    found = cautions_of(Collection("x", (runs[0], changed), (failed,)))
    assert found["Failed run"] == ["gone has no results: disk full"]
    assert "attack success (12)" in found["Too few prompts"][0]
    assert "2 variants with fewer than 3 seeds" in found["Few seeds"][0]
    assert "another, 4 threads" in found["Different machines"][0]
    assert "1 run, up to 3 a run" in found["Long rows"][0]
    assert "1 run without its file of replies" in found["No replies"][0]


def test_judges_that_contradict_each_other(run_folders: list[Path]) -> None:
    run = collect_runs(run_folders[:1]).runs[0]

    def judged(first: int, second: int) -> dict:
        return {
            "judge/rules/refusal_rate": {"numerator": 80 - first, "denominator": 80},
            "judge/harm/harmful_rate": {"numerator": second, "denominator": 80},
        }

    before, after = run.results["rows"]
    rows = [
        {**before, "metrics": {**before["metrics"], **judged(10, 70)}},
        {**after, "metrics": {**after["metrics"], **judged(70, 10)}},
    ]
    found = cautions_of(Collection("x", (dataclasses.replace(run, results={**run.results, "rows": rows}),)))
    assert "Judges disagree about Plain LoRA against aligned" in found["Judges disagree"][0]


def test_a_variant_with_the_reference_s_replies_has_no_effect(run_folders: list[Path]) -> None:
    runs = collect_runs(run_folders[:2]).runs
    twin = dataclasses.replace(runs[1], folder=runs[0].folder)
    found = cautions_of(Collection("x", (runs[0], twin)))
    assert found["No effect"] == ["AsFT gives exactly the replies of Plain LoRA to every prompt."]


def test_effect_counters_are_ranges_over_seeds(run_folders: list[Path]) -> None:
    runs = collect_runs(run_folders).runs
    variants = find_variants(find_entries(runs))
    effects = {item.method: item for item in method_effects(variants)}
    assert dict(effects["asft"].counters)["loss terms computed"] == "90"
    assert effects["asft"].settings == "weight 1"
    assert not effects["asft"].is_idle
    assert effects["slow"].is_idle
    slow = next(run for run in runs if run.label == "Slow one")
    assert idle_methods(slow) == [("finetune", "slow")]
