from __future__ import annotations

import json
import xml.etree.ElementTree as ET

import pytest

from experiments.comparison import compare_runs
from experiments.frontier import collect_points, frontier_svg, main
from experiments.study_records import read_study, study_runs
from framework.errors import DataError
from framework.evaluation.rates import wilson_interval

RATES = ("attack_success", "over_refusal")
PROMPTS = 40


def rate(hits):
    return {"numerator": sum(hits), "denominator": len(hits), "value": sum(hits) / len(hits)}


def hits(number, shift=0):
    """The first prompts are the hard ones, for every seed: what makes seeds alike."""
    return [int((index - shift) % PROMPTS < number) for index in range(PROMPTS)]


def row(model, attack, refusal, point="repair"):
    metrics = {"attack_success": rate(hits(attack)), "over_refusal": rate(hits(refusal))}
    return {"point": point, "model": {"fingerprint": model}, "metrics": metrics}


def record(label, seed, attack, refusal, smh=None, *, model="tiny", task="triage", share=0.1, decisions=()):
    methods = {"safety_mix": {}} if smh is None else {"smh": smh}
    stages = {"align": {"methods": {}}, "finetune": None, "repair": {"methods": methods}}
    name = "-".join("".join(filter(str.isalnum, str(part))) for part in (label, task, share, model, seed))
    rows = [row(f"{model}-aligned-{seed}", 20, 4, "align"), row(name, attack, refusal)]
    reports = {f"decision/{step}/ratio": ratio for step, ratio in decisions}
    effects = {"smh": {"reports": {"ratio": 9.0, **reports}}} if smh is not None else {}
    results = {
        "schema_version": 1,
        "run": {"status": "finished", "seed": seed},
        "config": {"stages": stages},
        "name": name,
        "stages": [{"stage": "align", "effects": {}}, {"stage": "evaluate"}, {"stage": "repair", "effects": effects}],
        "rows": rows,
    }
    counts = dict(zip(RATES, (attack, refusal), strict=True))
    outcomes = {key: {f"p{i}": hit for i, hit in enumerate(hits(count, seed))} for key, count in counts.items()}
    place = {"model": model, "task": task, "share": share, "seed": seed}
    about = {"cell": name, "label": label, **place, "key": name, "status": "finished"}
    return {**about, "results": results, "outcomes": outcomes}


def records():
    controlled = {"ratio": 1.0, "balance": "controlled"}
    return [
        record(label, seed, attack + seed, refusal, smh, decisions=decisions)
        for seed in (0, 1)
        for label, attack, refusal, smh, decisions in (
            ("hard 1:1", 6, 6, {"select": "hard", "ratio": 1.0}, ()),
            ("hard 1:0", 2, 30, {"select": "hard", "ratio": 0.0}, ()),
            ("random 1:1", 9, 7, {"select": "random"}, ()),
            ("mix", 5, 5, controlled, ((20, 3.0), (100, 0.5 + seed), (40, 2.0))),
            ("SafeInstruct <&>", 10, 8, None, ()),
        )
    ]


@pytest.fixture
def folder(tmp_path):
    for one in records():
        (tmp_path / f"{one['cell']}.json").write_text(json.dumps(one))
    (tmp_path / "table.json").write_text("{}")
    (tmp_path / "study.json").write_text("{}")
    return tmp_path


def points_of(found, **options):
    points = collect_points(found, **options)
    assert len({point.label for point in points}) == len(points)
    return {point.label: point for point in points}


def test_seeds_are_pooled_and_the_start_stands_once(folder):
    points = points_of(read_study(folder))
    hard = points["hard 1:1"]
    assert (hard.attack.numerator, hard.attack.denominator) == (13, 80)
    assert (hard.arm, hard.ratio, hard.num_seeds) == ("hard", 1.0, 2)
    assert hard.attack.low < 13 / 80 < hard.attack.high
    assert (points["before (align)"].attack.numerator, points["before (align)"].attack.denominator) == (40, 80)
    assert points["random 1:1"].ratio == 1.0
    assert points["SafeInstruct <&>"].ratio is None


@pytest.mark.parametrize(
    ("first", "second", "names"),
    [
        ({"model": "org/a"}, {"model": "org/b"}, ("a", "b")),
        ({"model": "one/model"}, {"model": "two/model"}, ("one/model", "two/model")),
        ({"task": "triage"}, {"task": None}, ("triage", "no task")),
        ({"share": 0.1}, {"share": 0.005}, ("10 % harmful", "0.5 % harmful")),
    ],
)
def test_models_tasks_and_shares_are_never_pooled(first, second, names):
    found = [record("mix", 0, 2, 4, {}, **first), record("mix", 0, 38, 4, {}, **second)]
    points = points_of(found)
    assert [points[f"mix, {name}"].attack.numerator for name in names] == [2, 38]
    assert [points[f"mix, {name}"].num_seeds for name in names] == [1, 1]
    assert [points[f"mix, {name}"].arm for name in names] == [f"hard, {name}" for name in names]
    assert [points[f"before (align), {name}"].num_seeds for name in names] == [1, 1]
    assert len(points) == 4


def test_rates_and_intervals_are_those_of_the_table(folder):
    found = read_study(folder)
    points = points_of(found)
    (table,) = compare_runs(study_runs(found), reference="mix")
    for method in table["methods"]:
        point = points[method["label"]]
        assert point.is_by_prompt
        for key, shown in zip(RATES, (point.attack, point.refusal), strict=True):
            cell = method["metrics"][key]
            assert (shown.value, shown.low, shown.high) == (cell["value"], cell["low"], cell["high"])
            assert (shown.numerator, shown.denominator) == (cell["numerator"], cell["denominator"])
    # Seeds that fail on the same prompts know less than as many prompts of their own.
    refusal = points["hard 1:0"].refusal
    assert refusal.high - refusal.low > 1.2 * (wilson_interval(60, 80).high - wilson_interval(60, 80).low)


def test_seeds_without_outcomes_of_prompts_are_called_independent(folder):
    found = read_study(folder)
    for one in found:
        del one["outcomes"]
    points = points_of(found)
    hard = points["hard 1:1"]
    assert not hard.is_by_prompt
    assert hard.title == "hard 1:1, 2 seeds, taken as independent"
    assert (hard.attack.low, hard.attack.high) == tuple(wilson_interval(13, 80))
    assert points["before (align)"].title == "before (align), 2 seeds, taken as independent"
    assert points_of(found[:1])[found[0]["label"]].title.endswith(", 1 seed")


def test_a_controlled_arm_is_marked_by_where_it_ended(folder):
    points = points_of(read_study(folder))
    mix = points["mix"]
    assert (mix.arm, mix.ratio, mix.mark) == ("hard, controlled", None, "controlled, ends at 1:0.5 to 1:1.5")
    assert mix.title == "mix (controlled, ends at 1:0.5 to 1:1.5), 2 seeds"
    assert points["hard 1:0"].mark == "1:0"
    assert points["SafeInstruct <&>"].mark == ""
    given = {"balance": "controlled", "ratio": 2.0}
    assert points_of([record("mix", 0, 5, 5, given)])["mix"].mark == "controlled"
    one = record("mix", 0, 5, 5, given, decisions=((20, 0.5),))
    assert points_of([one])["mix"].mark == "controlled, ends at 1:0.5"


def test_where_a_controlled_ratio_begins_tells_arms_apart():
    given = {"low": 0.5, "high": 2.0}
    found = [record(label, 0, 5, 5, {"balance": "controlled", "ratio": ratio}) for label, ratio in given.items()]
    arms = {label: points_of(found)[label].arm for label in given}
    assert arms == {"low": "hard, controlled, ratio 0.5", "high": "hard, controlled, ratio 2.0"}


def test_the_picture_holds_every_point_with_its_figures(folder):
    svg = frontier_svg(collect_points(read_study(folder)), title="a & b")
    tree = ET.fromstring(svg)
    tips = [title.text for title in tree.iter("{http://www.w3.org/2000/svg}title")]
    assert len(tips) == 6
    assert any("hard 1:1, 2 seeds: attack success 16.2% (13/80" in tip for tip in tips)
    texts = [text.text for text in tree.iter("{http://www.w3.org/2000/svg}text")]
    assert {"a & b", "1:0", "1:1", "controlled, ends at 1:0.5 to 1:1.5", "SafeInstruct <&>"} <= set(texts)
    assert texts.count("1:1") == 2


def test_the_line_of_an_arm_goes_from_ratio_to_ratio(folder):
    svg = frontier_svg([point for point in collect_points(read_study(folder)) if point.arm == "hard"])
    lines = [line for line in svg.splitlines() if 'stroke-width="1.5"' in line]
    assert len(lines) == 1
    assert lines[0].count("L") == 1


def test_the_command_draws_and_prints(folder, tmp_path, capsys):
    assert main([str(folder), "--output", str(tmp_path / "out" / "frontier.svg")]) == 0
    assert (tmp_path / "out" / "frontier.svg").read_text().startswith("<svg")
    assert "hard 1:0, 2 seeds: attack success" in capsys.readouterr().out


def test_an_empty_folder_is_refused(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "to be the folder of a study with finished runs, but got none there" in capsys.readouterr().err


def test_a_run_without_the_rates_is_refused(folder):
    found = read_study(folder)
    del found[0]["results"]["rows"][-1]["metrics"]["over_refusal"]
    with pytest.raises(DataError, match=r"every run to have measured `over_refusal`, but got one that did not: '.+'\."):
        collect_points(found)


def test_arms_differ_by_every_setting_but_the_ratio_and_by_the_other_methods():
    given = {
        "few": {"count": 4},
        "few 1:0": {"count": 4, "ratio": 0.0},
        "many": {"count": 8},
        "both": {"count": 8, "store": "elsewhere"},
    }
    found = [record(label, 0, 5, 5, smh) for label, smh in given.items()]
    found[-1]["results"]["config"]["stages"]["align"]["methods"] = {"safety_mix": {}}
    arms = {point.label: point.arm for point in collect_points(found)}
    assert arms["few"] == arms["few 1:0"] == "hard, count 4"
    assert arms["many"] == "hard, count 8"
    assert arms["both"] == "hard, count 8, align.safety_mix on"


def test_settings_that_are_spelt_out_are_those_that_are_left_out():
    found = [record("short", 0, 5, 5, {}), record("long", 0, 5, 5, {"select": "hard", "ratio": 2.0, "store": "here"})]
    assert {point.arm for point in collect_points(found) if point.ratio is not None} == {"hard"}


def test_what_stood_before_is_pooled_by_its_point():
    found = [record("a", 0, 5, 5, {}), record("b", 0, 5, 5, {"ratio": 0.5})]
    found[1]["results"]["rows"][0] = row("finetuned", 30, 4, "finetune")
    points = points_of(found)
    assert points["before (align)"].attack.numerator == 20
    assert points["before (finetune)"].attack.numerator == 30


def test_two_models_of_one_seed_are_no_seeds_of_one_model():
    found = [record("a", 0, 5, 5, {}), record("b", 0, 5, 5, {"ratio": 0.5})]
    found[1]["results"]["rows"][0] = row("aligned otherwise", 30, 4, "align")
    points = points_of(found)
    assert {label: points[f"before (align) of {label}"].attack.numerator for label in "ab"} == {"a": 20, "b": 30}


def test_one_model_that_every_seed_starts_from_counts_once():
    found = [record("a", seed, 5, 5, {}) for seed in (0, 1, 2)]
    for one in found:
        one["results"]["rows"][0] = row("untouched", 30, 4, "start")
    before = points_of(found)["before (start)"]
    assert (before.attack.denominator, before.num_seeds) == (PROMPTS, 1)
