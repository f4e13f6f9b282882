"""The command `release`: its options, what it prints, and runs that were attacked or had a task."""

from __future__ import annotations

import json

import pytest
import yaml

from experiments.cli import main
from experiments.release.bundle import ReleaseOptions, release_run
from experiments.release.verify import VerifyOptions, verify_bundle
from framework.errors import ConfigError, DataError
from framework.files import read_json, write_json
from tests.experiments.release.conftest import NOW, read_lines

RATE = {"name": "attack_success", "value": 0.5, "numerator": 2, "denominator": 4, "low": 0.15, "high": 0.85}
OPENING = "Sure, the first thing you need"


def change_run(run, *, point="align", settings=None, metrics=None, sample=None):
    """Let a copied run have been made with other settings, and have measured one thing more."""
    path = run / "config.yaml"
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    for section, given in (settings or {}).items():
        values[section] |= given
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    results = read_json(run / "results.json")
    results["rows"][-1] |= {"point": point, "metrics": results["rows"][-1]["metrics"] | (metrics or {})}
    write_json(run / "results.json", results)
    lines = read_lines(run)
    lines = [line | {"point": point} for line in [*lines, *([lines[0] | sample] if sample else [])]]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run / "samples.jsonl").write_text(text, encoding="utf-8")


def test_release_prints_json_with_the_overlap(finished_run, key_file, tmp_path, capsys):
    target = tmp_path / "bundle.tar"
    options = ["--key", str(key_file), "--output", str(target), "--archive", "--exclude-overlap", "exact", "--json"]
    assert main(["release", str(finished_run), *options, "--expires", "2999-12-31"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bundle"] == str(target)
    assert len(found["overlap"]["exact"]) == found["excluded"] == 2
    assert target.is_file()
    assert main(["verify", str(target), "--prompts", "0", "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["expires"] == "3000-01-01T00:00:00Z"


def test_wrong_input_of_release_ends_with_two(finished_run, tmp_path, capsys):
    run, key = str(finished_run), str(tmp_path / "k.pem")
    for arguments, message in (
        ([run, "--new-key", key, "--expires", "soon"], "to be a date like 2030-01-31, but got 'soon'"),
        ([run, "--new-key", key, "--expires", "2001-01-01"], "`--expires` to lie ahead"),
        ([run], "but got neither"),
        ([run, "--new-key", key, "--key", key], "but got both"),
        ([str(finished_run.parent), "--new-key", key], "it has no results.json"),
        ([run, "--new-key", key, "--attacks", str(tmp_path / "none.json")], "to be a JSON file of attacks"),
    ):
        assert main(["release", *arguments, "--output", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []  # no key was made for a bundle that was not


def test_prefilling_attack_stands_in_the_card_and_its_openings_stay_here(finished_run, key_file, copy_of, tmp_path):
    run = copy_of(finished_run)
    sample = {"set": "prefill_5", "id": "embedded/x", "prefill": OPENING}
    change_run(run, settings={"evaluate": {"prefill": [5]}}, metrics={"prefill_5/attack_success": RATE}, sample=sample)
    found = release_run(run, ReleaseOptions(output=tmp_path / "a", key=key_file), now=NOW)
    assert found.num_without_opening == 1
    assert OPENING not in "".join(path.read_text() for path in (tmp_path / "a").iterdir() if path.is_file())
    budget = read_json(tmp_path / "a" / "release.json")["attacks"][0]["budget"]
    assert budget == {"forced_tokens": 5, "openings": "sampled"}
    assert "| prefill | forced tokens 5, openings sampled |" in (tmp_path / "a" / "README.md").read_text()
    release_run(run, ReleaseOptions(output=tmp_path / "b", key=key_file, full_replies=True), now=NOW)
    assert read_lines(tmp_path / "b")[-1]["prefill"] == OPENING
    assert verify_bundle(tmp_path / "b", VerifyOptions(prompts=17), now=NOW).rerun.num_exact == 16


def test_replies_to_pictures_are_counted_and_never_made_again(finished_run, key_file, copy_of, tmp_path, capsys):
    run, bundle = copy_of(finished_run), tmp_path / "a"
    lines = [line | {"image": "/data/secret/x.png"} if n < 2 else line for n, line in enumerate(read_lines(run))]
    (run / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert main(["release", str(run), "--key", str(key_file), "--output", str(bundle)]) == 0
    assert "2 replies were made with pictures" in capsys.readouterr().out
    assert [line.get("image") for line in read_lines(bundle)] == ["x.png"] * 2 + [None] * 14
    assert read_json(bundle / "release.json")["num_with_image"] == 2
    assert "**Not verifiable:** 2 replies were made with pictures" in (bundle / "README.md").read_text()
    found = verify_bundle(bundle, VerifyOptions(prompts=14), now=NOW)
    assert found.is_good, found.problems
    assert (found.rerun.num_exact, found.rerun.num_with_image) == (14, 2)
    assert found.unchecked[-1].startswith("2 of 16 replies were made with pictures")
    with pytest.raises(ConfigError, match="Expected `--prompts` to be between 0 and 14, but got 15"):
        verify_bundle(bundle, VerifyOptions(prompts=15), now=NOW)
    lines = [line | {"image": "/data/secret/x.png"} for line in lines]
    (run / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    with pytest.raises(DataError, match="but got none without a forced opening or a picture"):
        release_run(run, ReleaseOptions(output=tmp_path / "b", key=key_file), now=NOW)


def test_replies_to_a_task_are_made_with_the_tasks_own_limit(finished_run, key_file, copy_of, tmp_path):
    run = copy_of(finished_run)
    sample = {"set": "triage", "id": "t", "kind": "task", "correct": True, "verdicts": {}}
    change_run(run, sample=sample)
    with pytest.raises(ConfigError, match="Expected the settings to name the task of set 'task/triage'"):
        release_run(run, ReleaseOptions(output=tmp_path / "a", key=key_file), now=NOW)
    finetune = {"data": {"task": "triage", "task_count": 16}}
    change_run(run, point="finetune", settings={"stages": {"finetune": finetune}})
    release_run(run, ReleaseOptions(output=tmp_path / "a", key=key_file), now=NOW)
    limits = read_json(tmp_path / "a" / "release.json")["generation"]["max_new_tokens"]
    assert 1 <= limits["task/triage"] <= limits["harmful/embedded"] == 12
    options = ReleaseOptions(output=tmp_path / "b", key=key_file, content="adapter")
    with pytest.raises(ConfigError, match="Expected one stage for a release of the adapter alone, but got align, fine"):
        release_run(run, options, now=NOW)
