import json

import pytest

from experiments.cli import main
from tests.experiments.attacks.made_up_outcomes import attempts_of, prompt_outcome, write_attack_file

NAMES = [f"r{n}" for n in range(12)]
SOFT, HARD = dict.fromkeys(NAMES, 1), {name: (2 if n % 4 == 0 else None) for n, name in enumerate(NAMES)}


@pytest.fixture
def files(tmp_path):
    found = []
    for label, broken in (("plain", SOFT), ("defended", HARD)):
        transcripts = {"search": attempts_of(broken, 4)}
        path = write_attack_file(tmp_path / label, label, [prompt_outcome("search", broken, 4)], transcripts)
        found.append(str(path))
    return found


def test_two_models_are_compared_and_the_comparison_is_written(files, tmp_path, capsys):
    assert main(["attack", "--compare", *files, "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "100.0%" in printed
    assert "25.0%" in printed
    stored = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [row["label"] for row in stored["rows"]] == ["plain", "defended"]
    assert (tmp_path / "out" / "comparison.md").read_text() in printed


def test_the_comparison_is_printed_as_json(files, capsys):
    assert main(["attack", "--json", "--baseline", "defended", "--compare", *files]) == 0
    assert json.loads(capsys.readouterr().out)["baseline"] == "defended"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "Expected a model and a suite, but got neither or one"),
        (["model"], "Expected a model and a suite, but got neither or one"),
        (["model", "small", "--floor", "0.9"], "Expected `--floor` to come with `--compare`"),
        (["model", "--compare", "file"], "Expected `--compare` to come without a model to attack, but got 'model'"),
        (["--compare", "missing.json"], "missing.json"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments, expected, capsys):
    assert main(["attack", *arguments]) == 2
    assert expected in capsys.readouterr().err
