"""The compared table on made-up runs: pairing, correction, marks, and what is said about too little data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from experiments.comparison import FEW_SEEDS, compare_runs, flipped
from experiments.comparison_table import comparison_markdown, format_difference, print_comparison
from experiments.measured_runs import RunSamples, find_outcomes, higher_is_better, read_run, read_samples
from experiments.statistics import compare_pair
from framework.errors import DataError
from tests.experiments.measured import run_folder, run_samples, samples

DRAW = np.random.default_rng(0)
RIGHT = [1] * 90 + [0] * 10


def outcomes(rate: float, count: int = 120) -> list[int]:
    return [int(hit) for hit in DRAW.random(count) < rate]


def study(seeds: int = 3, **rates: float) -> list[RunSamples]:
    return [run_samples(label, seed, outcomes(rate), RIGHT) for label, rate in rates.items() for seed in range(seeds)]


def methods(group: dict) -> dict[str, dict]:
    return {method["label"]: method["metrics"] for method in group["methods"]}


def test_methods_stand_side_by_side_with_everything_about_them() -> None:
    runs = study(LoRA=0.6, AsFT=0.05, Same=0.58)
    (group,) = compare_runs(runs, reference="LoRA")
    found = methods(group)
    cell = found["AsFT"]["attack_success"]
    assert cell["denominator"] == 360
    assert cell["low"] < cell["value"] < cell["high"]
    assert cell["seed_low"] <= cell["low"]
    tables = {
        label: [list(run.outcomes["attack_success"].values()) for run in runs if run.label == label]
        for label in ("LoRA", "AsFT")
    }
    expected = compare_pair(tables["LoRA"], tables["AsFT"])
    assert cell["difference"]["mcnemar_p"] == expected.mcnemar_p
    assert cell["difference"]["difference"] == pytest.approx(expected.difference)
    assert cell["difference"]["adjusted_p"] >= expected.p_value
    assert cell["difference"]["verdict"] == "better"
    assert cell["is_winner"]
    assert found["Same"]["attack_success"]["difference"]["verdict"] == "unclear"
    assert not any(found[label]["task_accuracy"]["is_winner"] for label in found)
    assert found["LoRA"]["attack_success"]["difference"] is None
    assert group["notes"] == []


def test_without_the_second_view_no_other_number_changes() -> None:
    runs = study(LoRA=0.6, AsFT=0.3, Same=0.58)
    whole, short = (compare_runs(runs, reference="LoRA", with_hierarchical=given) for given in (True, False))
    for group in whole:
        for method in group["methods"]:
            for metric in method["metrics"].values():
                if metric["difference"]:
                    assert metric["difference"]["hierarchical_low"] is not None
                    metric["difference"].update(hierarchical_low=None, hierarchical_high=None)
    assert whole == short
    records = samples([1, 0, 1], [1, 1])
    every = find_outcomes(records)
    assert find_outcomes(records, rates=("over_refusal", "attack_success")) == {
        rate: found for rate, found in every.items() if rate in ("over_refusal", "attack_success")
    }


def test_the_trade_off_names_the_tax_and_the_dominated() -> None:
    (group,) = compare_runs(study(LoRA=0.6, AsFT=0.1, Worse=0.9), reference="LoRA")
    points = {point["name"]: point for point in group["tradeoff"]["points"]}
    assert points["Worse"]["is_dominated"]
    assert points["AsFT"]["safety_tax"] == 0.0
    assert [objective["key"] for objective in group["tradeoff"]["objectives"]] == [
        "attack_success",
        "task_accuracy",
        "cost/fit_seconds",
    ]


def test_below_three_seeds_there_is_no_verdict_and_no_winner() -> None:
    (group,) = compare_runs(study(2, LoRA=0.9, AsFT=0.0), reference="LoRA")
    cell = methods(group)["AsFT"]["attack_success"]
    assert cell["difference"]["mcnemar_p"] < 1e-9
    assert (cell["difference"]["verdict"], cell["seed_low"], cell["is_winner"]) == (None, None, False)
    assert FEW_SEEDS in group["notes"]


def test_numbers_without_prompts_are_compared_over_seeds() -> None:
    (group,) = compare_runs(study(LoRA=0.6, AsFT=0.1), reference="LoRA")
    cell = methods(group)["AsFT"]["benign_nll"]
    assert cell["value"] == pytest.approx(2.1)
    assert cell["seed_difference"]["difference"] == pytest.approx(0.0)
    assert cell["seed_difference"]["seed_p"] == 1.0
    assert methods(group)["LoRA"]["benign_nll"]["seed_difference"] is None


def test_only_prompts_that_every_run_answered_are_paired() -> None:
    runs = [run_samples("LoRA", 0, [1] * 10, [1]), run_samples("AsFT", 0, [0] * 8, [1])]
    (group,) = compare_runs(runs, reference="LoRA")
    assert methods(group)["LoRA"]["attack_success"]["denominator"] == 8
    assert "attack_success leaves out 2 prompts that have no outcome in some run" in group["notes"]
    assert any("small differences cannot be seen: attack_success (8), " in note for note in group["notes"])


def test_runs_whose_replies_are_gone_keep_their_counts() -> None:
    runs = [run_samples(label, 0, [1] * 10, [1], outcomes={}, samples=()) for label in ("LoRA", "AsFT")]
    (group,) = compare_runs(runs, reference="LoRA")
    cell = methods(group)["AsFT"]["attack_success"]
    assert (cell["numerator"], cell["denominator"]) == (10, 10)
    assert "the replies of these runs are gone: no paired tests" in group["notes"]


def test_groups_are_compared_apart() -> None:
    runs = [run_samples("LoRA", 0, [1, 0], [1], share=share) for share in (0.0, 0.1)]
    assert [group["share"] for group in compare_runs(runs, reference="LoRA")] == [0.0, 0.1]


def test_rates_under_attack_have_names_of_their_own() -> None:
    lines = samples([1, 0], [1])
    attacked = [
        {**line, "set": "prefill_8", "prefill": "Sure"} for line in samples([1, 1], []) if line["kind"] == "harmful"
    ]
    found = find_outcomes([*lines, *attacked])
    assert list(found["attack_success"].values()) == [True, False]
    assert list(found["prefill_8/attack_success"].values()) == [True, True]
    assert not higher_is_better("prefill_8/attack_success")


def test_replies_that_flipped() -> None:
    first, second = run_samples("LoRA", 0, [1, 1, 0], [1]), run_samples("AsFT", 0, [1, 0, 1], [1])
    pairs = flipped(first, second, "attack_success")
    assert [(before["id"], after["id"]) for before, after in pairs] == [("p1", "p1"), ("p2", "p2")]
    with pytest.raises(DataError, match="Expected run 'LoRA-0' to have the rate 'over_refusal'"):
        flipped(first, second, "over_refusal")
    with pytest.raises(DataError, match="Expected the replies of run 'AsFT-0', but got none"):
        flipped(first, run_samples("AsFT", 0, [1], [1], samples=()), "attack_success")


def test_a_folder_is_read_as_the_run_it_holds(tmp_path: Path) -> None:
    run = read_run(run_folder(tmp_path / "run", [1, 0], [1], seed=4, label="AsFT"))
    assert (run.label, run.model, run.task, run.share, run.seed) == ("AsFT", "tiny", "triage", 0.1, 4)
    assert run.outcomes["attack_success"] == {"harm/p0": True, "harm/p1": False}
    assert len(read_samples(tmp_path / "run" / "samples.jsonl")) == 3
    with pytest.raises(DataError, match="to hold samples of align, but got none"):
        read_samples(tmp_path / "run" / "samples.jsonl", point="align")


def test_a_reply_with_other_line_ends_stays_one_line(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", [1], [1])
    path = folder / "samples.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace("Here is", "Here\u2028is"), encoding="utf-8")
    assert len(read_run(folder).samples) == 2


@pytest.mark.parametrize(
    ("runs", "reference", "expected"),
    [
        ([], "LoRA", "Expected `runs` to be one or more finished runs, but got none"),
        (study(1, LoRA=0.5) * 2, "LoRA", "Expected one run of 'LoRA' with seed 0, but got 'LoRA-0' and 'LoRA-0'"),
        (study(1, LoRA=0.5), "AsFT", r"Expected the reference 'AsFT' among the runs, but got \['LoRA'\]"),
    ],
)
def test_bad_sets_of_runs_are_refused(runs, reference, expected) -> None:
    with pytest.raises(DataError, match=expected):
        compare_runs(runs, reference=reference)


def test_the_tables_show_winner_reference_and_notes(capsys) -> None:
    from rich.console import Console

    groups = compare_runs(study(LoRA=0.7, AsFT=0.02), reference="LoRA")
    text = comparison_markdown(groups)
    assert "## tiny, triage, harmful share 0.1, 3 seeds, against LoRA" in text
    row = next(line for line in text.splitlines() if line.startswith("| AsFT |"))
    assert row.endswith("| winner |")
    assert "< 0.001" in row
    assert "### Trade-off (hypervolume" in text
    assert comparison_markdown([]) == ""
    assert format_difference(None) == "\u2013"
    print_comparison(groups, Console(width=200))
    shown = capsys.readouterr().out
    assert "winner" in shown
    assert "over seeds" in shown
    print_comparison(groups, Console(width=80))
    narrow = capsys.readouterr().out
    assert "\u2026" not in narrow
    assert "reference" in narrow
    assert "over seeds" not in narrow
