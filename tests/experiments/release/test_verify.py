"""Verifying: what makes a bundle bad, what is bad input, and what the command says and returns."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from datetime import timedelta

import pytest

from experiments.benchmarks.verify import change_bytes
from experiments.cli import main
from experiments.release.bundle import ReleaseOptions, release_run
from experiments.release.check import check_bundle
from experiments.release.facts import metrics_without
from experiments.release.manifest import canonical_json
from experiments.release.rerun import Tolerance
from experiments.release.signing import create_key, public_key_path, read_private_key, read_public_key, sign_manifest
from experiments.release.verify import VerifyOptions, verify_bundle
from framework.errors import ConfigError, ModelError
from framework.files import read_json, write_json
from tests.experiments.release.conftest import NOW, lively_model, read_lines

STATIC = VerifyOptions(prompts=0)


def bad_parts(bundle, options=STATIC, now=NOW):
    return verify_bundle(bundle, options, now=now).to_dict()["bad_parts"]


def resign(bundle, key_file):
    """Sign what lies there now, as its owner could."""
    from experiments.release.manifest import make_manifest

    for name in ("manifest.json", "signature.json"):
        (bundle / name).unlink()
    manifest = make_manifest(bundle, name="tiny", created=NOW, expires=None)
    (bundle / "manifest.json").write_bytes(manifest)
    (bundle / "signature.json").write_bytes(sign_manifest(manifest, read_private_key(key_file)))


def test_good_bundle_makes_its_replies_again(model_bundle, public_key):
    found = verify_bundle(model_bundle, VerifyOptions(key=public_key, prompts=16, seed=3), now=NOW)
    assert found.is_good, found.problems
    assert found.rerun.num_exact == found.rerun.num_prompts == 16
    assert found.rerun.mean_prefix == 1.0
    assert [count.what for count in found.rerun.counts] == ["degenerate", "rules refused"]
    assert all(count.now == count.recorded for count in found.rerun.counts)
    assert found.to_dict()["is_trusted_key"]


def test_sample_is_drawn_by_the_seed_and_anew_without_one(model_bundle):
    seeds = {verify_bundle(model_bundle, VerifyOptions(prompts=1), now=NOW).rerun.seed for _ in range(2)}
    assert len(seeds) == 2


def test_every_random_single_byte_change_is_detected(model_bundle, public_key, copy_of):
    bundle = copy_of(model_bundle)
    changes = list(change_bytes(bundle, count=45, seed=1, trusted=read_public_key(public_key), now=NOW))
    assert [change for change in changes if not change.problems] == []
    assert {change.path for change in changes} == {
        path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()
    }
    assert check_bundle(bundle, trusted=None, now=NOW).problems == []  # every change was taken back


def test_every_byte_of_manifest_and_signature_counts_without_a_key_too(model_bundle, copy_of):
    bundle = copy_of(model_bundle)
    for name in ("manifest.json", "signature.json"):
        path = bundle / name
        data = path.read_bytes()
        for place in [*range(0, len(data), 23), len(data) - 1]:
            for other in {data[place] ^ 1, data[place] ^ 0x20, 0x20} - {data[place]}:
                path.write_bytes(data[:place] + bytes([other]) + data[place + 1 :])
                assert check_bundle(bundle, trusted=None, now=NOW).problems, (name, place, other)
        path.write_bytes(data)


def weights_of(bundle):
    return bundle / "model" / "model.safetensors"


def move_and_link(path, place):
    path.rename(place / "elsewhere")
    path.symlink_to(place / "elsewhere")


def unlink(*names):
    return lambda bundle, place: [(bundle / name).unlink() for name in names]


def rewrite_manifest(bundle, place):
    (bundle / "manifest.json").write_text(json.dumps(read_json(bundle / "manifest.json"), indent=1))


DAMAGE = {
    "missing": (unlink("model/model.safetensors"), ["files"]),
    "extra": (lambda bundle, place: (bundle / "model" / "more.py").write_text("print(1)"), ["files"]),
    "empty folder": (lambda bundle, place: (bundle / "more").mkdir(), ["files"]),
    "link": (lambda bundle, place: move_and_link(weights_of(bundle), place), ["files"]),
    "linked folder": (lambda bundle, place: move_and_link(bundle / "model", place), ["files"]),
    "pipe": (lambda bundle, place: os.mkfifo(bundle / "pipe"), ["files"]),
    "longer": (lambda bundle, place: weights_of(bundle).write_bytes(weights_of(bundle).read_bytes() + b"x"), ["files"]),
    "unsigned": (unlink("signature.json"), ["signature"]),
    "no manifest": (unlink("manifest.json"), ["manifest"]),
    "neither": (unlink("manifest.json", "signature.json"), ["manifest", "signature"]),
    "linked manifest": (lambda bundle, place: move_and_link(bundle / "manifest.json", place), ["manifest", "files"]),
    "rewritten manifest": (rewrite_manifest, ["manifest", "signature"]),
}


@pytest.mark.parametrize("name", list(DAMAGE))
def test_damaged_bundle_names_the_bad_part(name, model_bundle, copy_of, tmp_path):
    bundle = copy_of(model_bundle)
    change, parts = DAMAGE[name]
    change(bundle, tmp_path)
    assert bad_parts(bundle) == parts


PLACES = ["../outside.txt", "/etc/hostname", "model/../../outside.txt", "C:/x", "a\\b", "manifest.json"]


@pytest.mark.parametrize("path", PLACES)
def test_signed_manifest_that_points_elsewhere_is_refused(path, model_bundle, key_file, copy_of):
    bundle = copy_of(model_bundle)
    value = read_json(bundle / "manifest.json")
    value["files"][path] = {"size": 1, "sha256": "0" * 64}
    (bundle / "manifest.json").write_bytes(canonical_json(value))
    (bundle / "signature.json").write_bytes(sign_manifest(canonical_json(value), read_private_key(key_file)))
    found = verify_bundle(bundle, STATIC, now=NOW)
    assert [problem.part for problem in found.problems] == ["manifest"]
    assert repr(path) in found.problems[0].detail


def test_another_key_and_a_bundle_signed_anew_are_told_apart(model_bundle, key_file, public_key, copy_of, tmp_path):
    stranger = tmp_path / "stranger.pem"
    create_key(stranger)
    found = verify_bundle(model_bundle, replace(STATIC, key=public_key_path(stranger)), now=NOW)
    assert found.to_dict()["bad_parts"] == ["signature"]
    assert "not by the one given" in found.problems[0].detail
    bundle = copy_of(model_bundle)
    (bundle / "README.md").write_text("Perfectly safe.")
    resign(bundle, stranger)
    assert bad_parts(bundle) == []  # consistent in itself: without the owner's key nobody can tell
    assert not verify_bundle(bundle, STATIC, now=NOW).to_dict()["is_trusted_key"]
    assert bad_parts(bundle, replace(STATIC, key=public_key)) == ["signature"]


def test_expired_bundle_and_prolonged_one_are_bad(finished_run, key_file, public_key, tmp_path):
    bundle = tmp_path / "bundle"
    end = NOW + timedelta(days=1)
    release_run(finished_run, ReleaseOptions(output=bundle, key=key_file, expires=end), now=NOW)
    options = replace(STATIC, key=public_key)
    assert bad_parts(bundle, options) == []
    assert bad_parts(bundle, options, now=end) == ["expiry"]
    altered = (bundle / "manifest.json").read_bytes().replace(b"2030-01-02T12", b"2039-01-02T12")
    (bundle / "manifest.json").write_bytes(altered)
    assert bad_parts(bundle, options, now=end) == ["signature"]


def test_signed_bundle_with_another_model_fails_on_its_replies(model_bundle, key_file, public_key, copy_of):
    bundle = copy_of(model_bundle)
    shutil.copy2(bundle / "model" / "config.json", bundle.parent / "config.json")
    lively_model(seed=5).save_pretrained(bundle / "model")
    shutil.copy2(bundle.parent / "config.json", bundle / "model" / "config.json")
    resign(bundle, key_file)
    found = verify_bundle(bundle, VerifyOptions(key=public_key, prompts=8, seed=0), now=NOW)
    assert {problem.part for problem in found.problems} == {"replies"}
    assert "of 8 replies are the same; 50% are needed" in found.problems[0].detail


def test_signed_bundle_that_does_not_say_how_it_replied_is_bad(model_bundle, key_file, copy_of):
    bundle = copy_of(model_bundle)
    facts = read_json(bundle / "release.json")
    write_json(bundle / "release.json", facts | {"generation": {"dtype": "pickle"}})
    resign(bundle, key_file)
    found = verify_bundle(bundle, VerifyOptions(prompts=1), now=NOW)
    assert "Expected the bundle to say how its replies were made" in found.problems[0].detail


def test_signed_bundle_in_which_every_prompt_has_a_picture_is_bad(model_bundle, key_file, copy_of):
    bundle = copy_of(model_bundle)
    lines = [line | {"image": "x.png"} for line in read_lines(bundle)]
    (bundle / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    resign(bundle, key_file)
    found = verify_bundle(bundle, VerifyOptions(), now=NOW)
    assert "no reply without a picture" in found.problems[0].detail


def rewrite_facts(bundle, **changes):
    write_json(bundle / "release.json", read_json(bundle / "release.json") | changes)


def test_verdict_counts_may_move_within_the_tolerance_only(model_bundle, key_file, copy_of):
    bundle = copy_of(model_bundle)
    lines = read_lines(bundle)
    for line in lines[:3]:
        line["verdicts"]["rules"]["refused"] = 1.0
    (bundle / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    metrics = read_json(bundle / "release.json")["metrics"]
    rewrite_facts(bundle, metrics=metrics | metrics_without(metrics, [{"reply": "", **line} for line in lines]))
    resign(bundle, key_file)
    details = [p.detail for p in verify_bundle(bundle, VerifyOptions(prompts=16, seed=0), now=NOW).problems]
    assert details == ["The count of `rules refused` went from 3 to 0; a change of 1 is allowed."]
    loose = VerifyOptions(prompts=16, seed=0, tolerance=Tolerance(max_shift=0.2))
    assert verify_bundle(bundle, loose, now=NOW).is_good


def test_claim_that_the_bundles_verdicts_do_not_give_is_bad(model_bundle, key_file, copy_of):
    bundle = copy_of(model_bundle)
    metrics = read_json(bundle / "release.json")["metrics"]
    for key in ("attack_success", "prompts.jsonl/refusal_rate"):
        metrics[key]["numerator"] += 1
    rewrite_facts(bundle, metrics=metrics)
    resign(bundle, key_file)
    details = [p.detail for p in verify_bundle(bundle, VerifyOptions(prompts=4, seed=0), now=NOW).problems]
    assert len(details) == 2
    assert details[0].startswith("The bundle claims ")
    assert any("claims attack_success" in text and "/10, but its verdicts give" in text for text in details)
    assert any("claims prompts.jsonl/refusal_rate" in text for text in details)


def test_claim_whose_value_or_bounds_contradict_its_own_counts_is_bad(model_bundle, key_file, copy_of):
    bundle = copy_of(model_bundle)
    metrics = read_json(bundle / "release.json")["metrics"]
    metrics["attack_success"]["value"] = 0.5
    metrics["prompts.jsonl/refusal_rate"]["high"] = 1.0
    rewrite_facts(bundle, metrics=metrics)
    resign(bundle, key_file)
    problems = verify_bundle(bundle, VerifyOptions(prompts=1, seed=0), now=NOW).problems
    assert {problem.part for problem in problems} == {"replies"}
    assert sorted(problem.detail.split(" has the ")[0] for problem in problems) == [
        "The claimed attack_success",
        "The claimed prompts.jsonl/refusal_rate",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"metrics": [1]}, "Expected the bundle to claim rates, but got list"), ({}, "to decide its rates, but got")],
)
def test_claims_that_cannot_be_counted_are_bad(changes, message, model_bundle, key_file, copy_of):
    bundle = copy_of(model_bundle)
    rewrite_facts(bundle, **changes)
    if not changes:
        lines = [line | {"verdicts": {}} for line in read_lines(bundle)]
        (bundle / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    resign(bundle, key_file)
    problems = verify_bundle(bundle, VerifyOptions(prompts=1, seed=0), now=NOW).problems
    assert [problem.part for problem in problems] == ["replies"]
    assert message in problems[0].detail


def test_bundle_none_of_whose_judges_can_be_asked_is_bad_unless_told_otherwise(
    model_bundle, key_file, copy_of, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "200")
    bundle = copy_of(model_bundle)
    rewrite_facts(bundle, judges=["stranger"])
    resign(bundle, key_file)
    details = [p.detail for p in verify_bundle(bundle, VerifyOptions(prompts=4, seed=0), now=NOW).problems]
    assert len(details) == 1
    assert details[0].startswith("None of the bundle's judges (stranger) can be asked here")
    arguments = ["verify", str(bundle), "--prompts", "4", "--seed", "0"]
    assert main(arguments) == 1
    assert main([*arguments, "--without-judges"]) == 3  # without --key nobody knows who signed
    assert "judge not asked: stranger" in capsys.readouterr().out


def test_adapter_bundle_needs_its_base(finished_run, model_bundle, key_file, public_key, release_home, tmp_path):
    bundle = tmp_path / "bundle"
    release_run(finished_run, ReleaseOptions(output=bundle, key=key_file, content="adapter"), now=NOW)
    base = str(release_home / "tinymodel")
    found = verify_bundle(bundle, VerifyOptions(key=public_key, prompts=16, base=base), now=NOW)
    assert found.is_good, found.problems
    assert found.rerun.num_exact == 16
    other = tmp_path / "other"
    shutil.copytree(base, other)
    lively_model(seed=9).save_pretrained(other)
    with pytest.raises(ModelError, match="Expected the base model to be the one the adapter was trained on"):
        verify_bundle(bundle, VerifyOptions(prompts=1, base=str(other)), now=NOW)
    with pytest.raises(ConfigError, match="Expected no `--base` for a bundle that holds a whole model"):
        verify_bundle(model_bundle, VerifyOptions(prompts=1, base=base), now=NOW)


def test_bad_input_is_no_verdict(model_bundle, key_file, tmp_path):
    with pytest.raises(ConfigError, match=r"to be a bundle, a folder or a \.tar file, but got nothing there"):
        verify_bundle(tmp_path / "none", STATIC, now=NOW)
    with pytest.raises(ConfigError, match="to hold a public key, but got a private one"):
        verify_bundle(model_bundle, replace(STATIC, key=key_file), now=NOW)
    with pytest.raises(ConfigError, match="Expected `--prompts` to be a whole number >= 0, but got -1"):
        verify_bundle(model_bundle, VerifyOptions(prompts=-1), now=NOW)
    with pytest.raises(ConfigError, match="Expected `--prompts` to be between 0 and 16, but got 17"):
        verify_bundle(model_bundle, VerifyOptions(prompts=17), now=NOW)
    with pytest.raises(ConfigError, match="Expected `min_exact` to be a share between 0 and 1"):
        Tolerance(min_exact=2.0)


def test_command_returns_zero_one_and_two_and_prints_what_it_found(
    model_bundle, public_key, copy_of, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "200")
    bundle = copy_of(model_bundle)
    arguments = ["verify", str(bundle), "--key", str(public_key), "--prompts", "2", "--seed", "1"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    for text in ("signature", "the key given", "2/2 the same (needed 50%)", "rules refused", "none missing"):
        assert text in shown
    assert "Nothing in the bundle decides these numbers, its signer states them: keyword_attack_success" in shown
    assert ", refusal_margin" in shown
    assert "NOT ALL CHECKED" not in shown
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["is_good"]
    assert found["rerun"]["num_exact"] == 2
    assert found["left_out"] == []
    assert "refusal_margin" in found["rerun"]["unchecked_claims"]
    assert "attack_success" not in found["rerun"]["unchecked_claims"]
    assert len(found["unchecked"]) == 1
    (bundle / "config.yaml").unlink()
    assert main([*arguments, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["bad_parts"] == ["files"]
    assert found["problems"] == [{"part": "files", "detail": "'config.yaml' is missing."}]
    assert main(arguments) == 1
    assert "BAD" in capsys.readouterr().out
    assert main(["verify", str(bundle / "none")]) == 2
    assert "nothing there" in capsys.readouterr().err
    assert main(["verify", str(model_bundle), "--key", str(public_key), "--prompts", "0"]) == 3
    shown = capsys.readouterr().out
    assert "NOT ALL CHECKED" in " ".join(shown.split())
    assert "What it says of its model is not checked: no reply was made again." in shown
    assert "Who signed it" not in shown
    assert main(["verify", str(model_bundle), "--prompts", "0", "--json"]) == 3
    unchecked = json.loads(capsys.readouterr().out)["unchecked"]
    assert unchecked[0] == "Who signed it is not checked: give the signer's public key with --key."
    assert len(unchecked) == 2
    assert main(["verify", str(model_bundle), "--prompts", "0"]) == 3
    shown = capsys.readouterr().out
    assert "WHO SIGNED IS NOT CHECKED" in shown
    assert "no reply was made again" in shown
