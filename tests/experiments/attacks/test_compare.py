import json
from xml.etree import ElementTree

import pytest

from experiments.attacks.attack_files import read_attack_file
from experiments.attacks.compare import compare_attacks, comparison_markdown, main, write_comparison
from framework.errors import ConfigError, DataError
from tests.experiments.attacks.made_up_outcomes import (
    MEASURED_WITH,
    attempts_of,
    outcome,
    point,
    prompt_outcome,
    write_attack_file,
)

NAMES = [f"r{n}" for n in range(20)]
SOFT = {name: 1 + n // 2 for n, name in enumerate(NAMES)}
HARD = {name: (5 if n % 5 == 0 else None) for n, name in enumerate(NAMES)}


def tuned(*counts):
    return outcome(
        "harmful",
        [point(range(n), total=20, spent=10 * k, learning_rate=1e-4) for k, n in enumerate(counts)],
        unit="steps",
    )


def files(folder):
    plain = [
        prompt_outcome("search", SOFT, 10),
        tuned(2, 12, 20),
        outcome("interpolate", [point(range(19), total=20, utility=0.3)]),
    ]
    safe = [prompt_outcome("search", HARD, 10), tuned(0, 1, 6), outcome("interpolate", [point([1], total=20)])]
    first = write_attack_file(folder / "plain", "plain", plain, {"search": attempts_of(SOFT, 10)})
    second = write_attack_file(folder / "asft", "asft", safe)
    return [first, second]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("attacks")
    return compare_attacks(files(folder)), folder


def test_the_first_model_is_the_baseline_and_the_suites_floor_holds(compared):
    found, _ = compared
    assert (found.baseline, found.floor) == ("plain", 0.9)
    plain, safe = found.rows
    assert (str(plain.worst.leading), str(safe.worst.leading)) == (
        "search at 10 queries",
        "harmful (learning_rate 0.0001) at 20 steps",
    )
    assert len(plain.worst.below_floor) == 1
    assert (plain.paired, plain.held) == ((), ())
    assert {str(one.point) for one in safe.paired} == {
        "search at 10 queries",
        "harmful (learning_rate 0.0001) at 20 steps",
        "interpolate",
    }
    assert {one.title for one in safe.held} == {"search", "harmful (learning_rate 0.0001)"}
    assert all(one.p_holm >= one.test.p_value for one in safe.held)
    assert max(one.p_holm for one in safe.held) < 0.05


def test_another_baseline_and_limits(compared):
    _, folder = compared
    found = compare_attacks([folder / "plain", folder / "asft"], baseline="asft", floor=0.0, limits={"queries": 1})
    assert found.rows[1].paired == ()
    assert str(found.rows[0].worst.leading).startswith("harmful")
    assert found.rows[0].worst.num_points == 5


def test_the_markdown_holds_every_part_and_no_text_of_a_request(compared):
    text = comparison_markdown(compared[0])
    for part in (
        "| search | 100.0% (20/20",
        "## Worst case (utility floor 90%)",
        "@1 | @10 | @40",
        "## Paired with plain",
    ):
        assert part in text
    assert "| interpolate | 95.0% (19/20, 76.4% to 99.1%) † | 5.0% (1/20, 0.9% to 23.6%) |" in text
    assert "† The attacked model lost its utility" in text
    assert "20/20 in 10 queries | 5 (" in text
    assert "4/20 in 10 queries | not reached" in text
    assert "log-rank chi-square" in text
    assert "reply" not in text.replace("replies", "")


def test_every_number_of_steps_has_its_rate(compared):
    found, _ = compared
    title = "harmful (learning_rate 0.0001)"
    assert {step: rate["numerator"] for step, rate in found.rows[0].steps[title].items()} == {0: 2, 10: 12, 20: 20}
    text = comparison_markdown(found)
    assert "| attack | steps | plain | asft |" in text
    assert f"| {title} | 10 | 60.0% (12/20, 38.7% to 78.1%) | 5.0% (1/20, 0.9% to 23.6%) |" in text
    assert all("search" not in row.steps for row in found.rows)


def test_files_are_written_and_the_pictures_stand_alone(compared, tmp_path):
    paths = write_comparison(compared[0], tmp_path)
    assert [path.name for path in paths] == [
        "comparison.json",
        "comparison.md",
        "attack-curves.svg",
        "attack-curves.png",
        "attack-survival.svg",
        "attack-survival.png",
    ]
    rows = json.loads(paths[0].read_text())["rows"]
    assert rows[1]["worst"]["leading"]["rate"]["numerator"] == 6
    assert "held" not in rows[0]["curves"][0]
    for path in paths[2::2]:
        text = path.read_text()
        assert "var(" not in text
        assert ElementTree.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"
        assert "search" in text
    assert paths[3].read_bytes().startswith(b"\x89PNG")


def test_edits_alone_have_no_picture(tmp_path):
    path = write_attack_file(tmp_path, "model", [outcome("quantise", [point([1])])])
    assert len(write_comparison(compare_attacks([path]), tmp_path / "out")) == 2


def test_the_module_is_a_command(compared, tmp_path, capsys):
    _, folder = compared
    assert main([str(folder / "plain"), str(folder / "asft"), "--baseline", "asft"]) == 0
    assert "## Paired with asft" in capsys.readouterr().out
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "Expected" in capsys.readouterr().err


def test_a_label_falls_back_to_the_folder(tmp_path):
    path = write_attack_file(tmp_path / "mine", "", [outcome("quantise", [point([1])])])
    assert read_attack_file(path).label == "mine"
    assert read_attack_file(f"Plain LoRA={path}").label == "Plain LoRA"
    assert read_attack_file(f"org/plain={path.parent}").label == "org/plain"
    odd = write_attack_file(tmp_path / "rate=3", "own", [outcome("quantise", [point([1])])])
    assert read_attack_file(odd).label == read_attack_file(odd.parent).label == "own"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "to be the results of `seawall attack`, but got FileNotFoundError"),
        ("{", "JSONDecodeError"),
        ('{"format": 9, "outcomes": []}', "in format 1 or 2, but got others"),
        ('{"format": 1, "outcomes": []}', "at least one finished attack"),
        ('{"format": 2, "outcomes": []}', "at least one finished attack"),
        ('{"format": 1, "outcomes": [{"points": []}]}', "every outcome in .* to be complete"),
    ],
)
def test_other_files_are_refused(content, message, tmp_path):
    path = tmp_path / "attack.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=message):
        compare_attacks([path])


def test_what_cannot_be_compared_is_refused(compared):
    _, folder = compared
    with pytest.raises(DataError, match="at least one results file"):
        compare_attacks([])
    with pytest.raises(DataError, match="a label of its own, but got plain twice"):
        compare_attacks([folder / "plain", folder / "plain"])
    with pytest.raises(ConfigError, match="Expected `baseline` to be one of asft, plain"):
        compare_attacks([folder / "plain", folder / "asft"], baseline="other")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"requests": "4567"}, r"but got other requests \('0123' and '4567'\)"),
        ({"judges": [{"name": "guard"}]}, r"but got other judges \('rules' and 'guard'\)"),
        (
            {"max_new_tokens": 80, "system": "x"},
            r"other max_new_tokens \(40 and 80\) and other system \(None and 'x'\)",
        ),
        (None, "the results of `first` to say|the results of `second` to say what they were measured with"),
    ],
)
def test_models_that_were_measured_differently_are_refused(other, message, tmp_path):
    made = [outcome("quantise", [point([1])])]
    measured = other if other is None else {**MEASURED_WITH, **other}
    first = write_attack_file(tmp_path / "first", "first", made)
    second = write_attack_file(tmp_path / "second", "second", made, measured_with=measured)
    with pytest.raises(DataError, match=message):
        compare_attacks([first, second])


def test_attacks_that_a_model_lacks_are_told(tmp_path):
    both, extra = outcome("quantise", [point([1])]), outcome("prune", [point([1, 2])])
    first = write_attack_file(tmp_path / "first", "first", [both, extra])
    failed = [{"name": "search", "attack": "search", "error": "Expected luck."}]
    second = write_attack_file(tmp_path / "second", "second", [both], failed=failed)
    found = compare_attacks([first, second])
    assert [row.missing for row in found.rows] == [("search",), ("prune", "search (failed)")]
    assert found.rows[0].worst.leading.name == "prune"
    text = comparison_markdown(found)
    assert "- second has no results of prune, search (failed)." in text
    assert "attacks that failed and are not in it: 1" in text


def stopped(folder, label, counts, **failed):
    made = [point(range(n), total=20, spent=steps, learning_rate=rate) for (rate, steps), n in counts.items()]
    made += [point([0], total=20, learning_rate=rate, training="failed") for rate in failed.values()]
    return write_attack_file(folder / label, label, [outcome("harmful", made, unit="steps")])


def test_a_smaller_budget_than_the_neighbours_is_marked_and_what_is_not_paired_is_named(tmp_path):
    plain = {(1e-4, 50): 1, (1e-4, 100): 2, (1e-3, 50): 2, (1e-3, 100): 12, (1e-2, 100): 20}
    early = {(1e-4, 50): 1, (1e-4, 100): 2, (1e-3, 50): 19}
    found = compare_attacks([stopped(tmp_path, "plain", plain), stopped(tmp_path, "safe", early, rate=1e-2)])
    text = comparison_markdown(found)
    assert [str(one.point).partition(") ")[2] for one in found.rows[1].paired] == ["at 100 steps", "at 50 steps"]
    plains, safes = "60.0% (12/20, 38.7% to 78.1%)", "95.0% (19/20, 76.4% to 99.1%) ‡ 50 steps"
    assert f"| harmful (learning_rate 0.001) | {plains} | {safes} |" in text
    assert text.count("‡") == 2
    assert "‡ Measured with this smaller budget alone" in text
    assert (
        "- safe, harmful (learning_rate 0.01): the model could not be trained, the baseline was measured at 100 steps."
    ) in text
    assert found.rows[0].unpaired == ()
    whole = comparison_markdown(compare_attacks([tmp_path / "plain"]))
    assert "‡" not in whole
    assert "could not be paired" not in whole


@pytest.mark.parametrize("floor", [90, -0.1, float("nan")])
def test_a_floor_that_is_no_share_is_refused_before_anything_is_read(floor, tmp_path):
    with pytest.raises(ConfigError, match=f"Expected `floor` to be a share between 0 and 1, but got {floor!r}"):
        compare_attacks([tmp_path / "nowhere"], floor=floor)
    assert main([str(tmp_path / "nowhere"), "--floor", str(floor)]) == 2
