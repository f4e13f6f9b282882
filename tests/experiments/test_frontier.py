from __future__ import annotations

import json
import xml.etree.ElementTree as ET

import pytest

from experiments.frontier import collect_points, frontier_svg, main, read_runs
from framework.errors import DataError


def rate(numerator, denominator=40):
    return {"numerator": numerator, "denominator": denominator, "value": numerator / denominator}


def row(model, attack, refusal, point="repair"):
    metrics = {"attack_success": rate(attack), "over_refusal": rate(refusal)}
    return {"point": point, "model": {"fingerprint": model}, "metrics": metrics}


def run(label, seed, attack, refusal, smh=None):
    methods = {"safety_mix": {}} if smh is None else {"smh": smh}
    stages = {"align": {"methods": {}}, "finetune": None, "repair": {"methods": methods}}
    rows = [row(f"aligned-{seed}", 20, 4, "align"), row(f"{label}-{seed}", attack, refusal)]
    return {"label": label, "seed": seed, "status": "finished", "results": {"config": {"stages": stages}, "rows": rows}}


RUNS = [
    run(label, seed, attack + seed, refusal, smh)
    for seed in (0, 1)
    for label, attack, refusal, smh in (
        ("hard 1:1", 6, 6, {"select": "hard", "ratio": 1.0}),
        ("hard 1:0", 2, 30, {"select": "hard", "ratio": 0.0}),
        ("random 1:1", 9, 7, {"select": "random"}),
        ("controlled", 5, 5, {"ratio": 1.0, "balance": "controlled"}),
        ("SafeInstruct <&>", 10, 8, None),
    )
]


@pytest.fixture
def folder(tmp_path):
    for one in RUNS:
        name = f"{one['label']}-{one['seed']}".replace(":", "-").replace(" ", "-").replace("<&>", "x")
        (tmp_path / f"{name}.json").write_text(json.dumps(one))
    (tmp_path / "table.json").write_text("{}")
    return tmp_path


def test_seeds_are_pooled_and_the_start_stands_once(folder):
    points = {point.label: point for point in collect_points(read_runs(folder))}
    hard = points["hard 1:1"]
    assert (hard.attack.numerator, hard.attack.denominator) == (13, 80)
    assert (hard.arm, hard.ratio, hard.num_seeds) == ("hard", 1.0, 2)
    assert hard.attack.low < 13 / 80 < hard.attack.high
    assert (points["before (align)"].attack.numerator, points["before (align)"].attack.denominator) == (40, 80)
    assert points["random 1:1"].ratio == 1.0
    assert points["controlled"].arm == "hard, controlled"
    assert points["SafeInstruct <&>"].ratio is None


def test_the_picture_holds_every_point_with_its_figures(folder):
    svg = frontier_svg(collect_points(read_runs(folder)), title="a & b")
    tree = ET.fromstring(svg)
    tips = [title.text for title in tree.iter("{http://www.w3.org/2000/svg}title")]
    assert len(tips) == 6
    assert any("hard 1:1, 2 seeds: attack success 16.2% (13/80" in tip for tip in tips)
    texts = [text.text for text in tree.iter("{http://www.w3.org/2000/svg}text")]
    assert {"a & b", "1:0", "1:1", "attack success", "SafeInstruct <&>"} <= set(texts)


def test_the_line_of_an_arm_goes_from_ratio_to_ratio(folder):
    svg = frontier_svg([point for point in collect_points(read_runs(folder)) if point.arm == "hard"])
    lines = [line for line in svg.splitlines() if 'stroke-width="1.5"' in line]
    assert len(lines) == 1
    assert lines[0].count("L") == 1


def test_the_command_draws_and_prints(folder, tmp_path, capsys):
    assert main([str(folder), "--output", str(tmp_path / "out" / "frontier.svg")]) == 0
    assert (tmp_path / "out" / "frontier.svg").read_text().startswith("<svg")
    assert "hard 1:0: attack success" in capsys.readouterr().out


def test_an_empty_folder_is_refused(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "to hold finished runs of a study, but got none" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"Name the folder of `seawall compare`"):
        read_runs(tmp_path)


def test_a_run_without_the_rates_is_refused(folder):
    runs = read_runs(folder)
    del runs[0]["results"]["rows"][-1]["metrics"]["over_refusal"]
    with pytest.raises(DataError, match=r"to have measured `over_refusal`, but got one that did not. Name sets in"):
        collect_points(runs)


def test_arms_differ_by_every_setting_but_the_ratio_and_by_the_other_methods():
    given = {
        "few": {"count": 4},
        "few 1:0": {"count": 4, "ratio": 0.0},
        "many": {"count": 8},
        "both": {"count": 8, "store": "elsewhere"},
    }
    runs = [run(label, 0, 5, 5, smh) for label, smh in given.items()]
    runs[-1]["results"]["config"]["stages"]["align"]["methods"] = {"safety_mix": {}}
    arms = {point.label: point.arm for point in collect_points(runs)}
    assert arms["few"] == arms["few 1:0"] == "hard, count 4"
    assert arms["many"] == "hard, count 8"
    assert arms["both"] == "hard, count 8, align.safety_mix on"


def test_settings_that_are_spelt_out_are_those_that_are_left_out():
    runs = [run("short", 0, 5, 5, {}), run("long", 0, 5, 5, {"select": "hard", "ratio": 2.0, "store": "here"})]
    assert {point.arm for point in collect_points(runs) if point.ratio is not None} == {"hard"}


def test_what_stood_before_is_pooled_by_its_point():
    runs = [run("a", 0, 5, 5, {}), run("b", 0, 5, 5, {"ratio": 0.5})]
    runs[1]["results"]["rows"][0] = row("finetuned", 30, 4, "finetune")
    points = {point.label: point.attack.numerator for point in collect_points(runs)}
    assert points["before (align)"] == 20
    assert points["before (finetune)"] == 30
