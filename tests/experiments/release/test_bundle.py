"""Making a bundle: what is in it, what must never be in it, and which runs and options are refused."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import yaml

from experiments.release import bundle as bundle_module
from experiments.release.bundle import ReleaseOptions, release_run
from experiments.release.check import check_bundle
from experiments.release.signing import create_key, read_private_key, secret_forms
from framework.errors import ConfigError, DataError, ModelError, SeawallError, StorageError
from framework.files import read_json, write_json
from tests.experiments.release.conftest import NOW, TRAINED, read_lines

FILES = {"README.md", "config.yaml", "manifest.json", "release.json", "results.json", "samples.jsonl", "signature.json"}

LOAD = """
import sys
sys.meta_path = [f for f in sys.meta_path if "editable" not in str(getattr(f, "__module__", f)).lower()]
sys.path = [place for place in sys.path if place and place != {project!r}]
try:
    import framework
except ImportError:
    print("no project")
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained({model!r})
chat = [{{"role": "user", "content": "hello"}}]
ids = tokenizer(tokenizer.apply_chat_template(chat, tokenize=False), return_tensors="pt")["input_ids"]
whole = AutoModelForCausalLM.from_pretrained({model!r})
patched = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base!r}), {adapter!r})
print(whole.generate(ids, max_new_tokens=3, do_sample=False).shape[1] - ids.shape[1])
with torch.no_grad():
    print(float((whole(ids).logits - patched(ids).logits).abs().max()) < 1e-3)
print(sorted(m for m in sys.modules if m.split(".")[0] in ("framework", "experiments", "methods", "datamodules")))
"""


def test_bundle_holds_what_verification_and_readers_need(model_bundle):
    names = {path.name for path in model_bundle.iterdir()}
    assert names == FILES | {"model"}
    facts = read_json(model_bundle / "release.json")
    assert facts["metrics"]["attack_success"]["denominator"] == 10
    samples = read_lines(model_bundle)
    assert len(samples) == 16
    harmful = [sample for sample in samples if sample["kind"] == "harmful"]
    assert all("reply" not in sample and sample["reply_hashes"] for sample in harmful)
    assert all("reply" in sample for sample in samples if sample["kind"] != "harmful")
    assert not any(path.is_symlink() or path.stat().st_nlink > 1 for path in model_bundle.rglob("*") if path.is_file())


def test_bundles_load_with_transformers_and_peft_where_the_project_is_not(
    finished_run, model_bundle, key_file, release_home, tmp_path
):
    adapter = tmp_path / "bundle"
    release_run(finished_run, ReleaseOptions(output=adapter, key=key_file, content="adapter"), now=NOW)
    assert read_json(adapter / "adapter" / "adapter_config.json")["base_model_name_or_path"] == "tinymodel"
    assert not (adapter / "model").exists()
    code = LOAD.format(
        project=str(Path(__file__).parents[3]),
        model=str(model_bundle / "model"),
        base=str(release_home / "tinymodel"),
        adapter=str(adapter / "adapter"),
    )
    command = [sys.executable, "-I", "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == ["no project", "3", "True", "[]"]


def test_no_bundle_names_a_folder_of_this_machine(model_bundle):
    for path in model_bundle.rglob("*"):
        if path.is_file() and path.suffix != ".safetensors":
            assert "secretplace" not in path.read_text(encoding="utf-8"), path.name


def test_private_key_is_nowhere_but_in_its_file(finished_run, tmp_path, monkeypatch, capfd):
    from experiments.cli import main

    monkeypatch.chdir(tmp_path)
    key = tmp_path / "keys" / "mine.pem"
    assert main(["release", str(finished_run), "--new-key", str(key), "--output", "out", "--verbose"]) == 0
    assert main(["release", str(finished_run), "--key", str(key), "--archive", "--output", "out.tar", "--json"]) == 0
    assert main(["verify", "out", "--key", "keys/mine.pub.pem", "--prompts", "2"]) == 0
    forms = [*secret_forms(read_private_key(key)), b"PRIVATE KEY"]
    said = "".join(capfd.readouterr()).encode()
    assert not any(form in said for form in forms)
    places = [path for root in (tmp_path, finished_run) for path in root.rglob("*") if path.is_file() and path != key]
    assert len(places) > 10
    for path in places:
        assert not any(form in path.read_bytes() for form in forms), path
    assert key.stat().st_mode & 0o777 == 0o600
    assert b"PRIVATE KEY" in key.read_bytes()


def test_key_left_among_the_models_files_is_refused(finished_run, key_file, copy_of, tmp_path):
    run = copy_of(finished_run)
    (run / "model" / "owner.pem").write_bytes(key_file.read_bytes())
    with pytest.raises(DataError, match=r"Expected .* to hold only files of a model .* but got 'owner.pem'"):
        release_run(run, ReleaseOptions(output=tmp_path / "out", key=key_file), now=NOW)
    (run / "model" / "owner.pem").rename(run / "model" / "notes.txt")
    with pytest.raises(DataError, match=r"bundle without private keys, but 'model/notes\.txt' holds one"):
        release_run(run, ReleaseOptions(output=tmp_path / "out", key=key_file), now=NOW)
    (run / "model" / "notes.txt").write_bytes(b"x" * 100 + secret_forms(read_private_key(key_file))[1])
    with pytest.raises(DataError, match=r"bundle without its signing key, but 'model/notes\.txt' holds it"):
        release_run(run, ReleaseOptions(output=tmp_path / "out", key=key_file), now=NOW)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_measured_prompts_of_the_training_data_are_reported_and_left_out_on_request(finished_run, key_file, tmp_path):
    plain = release_run(finished_run, ReleaseOptions(output=tmp_path / "a", key=key_file), now=NOW)
    assert len(plain.overlap.exact) == TRAINED
    assert [name.rsplit("/", 1)[1] for name in plain.overlap.exact] == ["prompts-1", "prompts-2"]
    assert plain.num_excluded == 0
    assert f"{TRAINED} are the same" in (tmp_path / "a" / "README.md").read_text()
    options = ReleaseOptions(output=tmp_path / "b", key=key_file, exclude="exact")
    assert release_run(finished_run, options, now=NOW).num_excluded == TRAINED
    facts = read_json(tmp_path / "b" / "release.json")
    assert facts["metrics"]["attack_success"]["denominator"] == 10 - TRAINED
    assert facts["metrics"]["refusal_margin"] == read_json(tmp_path / "a" / "release.json")["metrics"]["refusal_margin"]
    assert facts["overlap"]["excluded"] == ["prompts.jsonl/prompts-1", "prompts.jsonl/prompts-2"]
    ids = [line["id"] for line in read_lines(tmp_path / "b")]
    assert len(ids) == 16 - TRAINED
    assert "2 prompts that stood in the training data were left out" in (tmp_path / "b" / "README.md").read_text()


def attacked(run, count):
    """Give a finished run a prefilling attack of ``count`` tokens: all harmful prompts but the last were attacked."""
    from experiments.release.facts import metrics_without

    lines = read_lines(run)
    harmful = [line for line in lines if line["kind"] == "harmful"][:-1]
    lines += [
        line | {"set": f"prefill_{count}", "id": f"{line['set']}/{line['id']}", "prefill": "Sure,"} for line in harmful
    ]
    (run / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    results = read_json(run / "results.json")
    metrics = results["rows"][-1]["metrics"]
    rates = ("refusal_rate", "keyword_attack_success", "attack_success", "degenerate_rate")
    metrics |= {key: {} for key in ("prefill_prompts", *(f"prefill_{count}/{rate}" for rate in rates))}
    results["rows"][-1]["metrics"] = metrics_without(metrics, lines)
    write_json(run / "results.json", results)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["evaluate"] |= {"prefill": [count], "prefill_replies": "opening"}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    return run


def test_attack_stays_in_the_card_when_prompts_are_left_out(finished_run, key_file, copy_of, tmp_path):
    run = attacked(copy_of(finished_run), 8)
    for place, exclude in (("a", None), ("b", "exact")):
        release_run(run, ReleaseOptions(output=tmp_path / place, key=key_file, exclude=exclude), now=NOW)
    whole, part = (read_json(tmp_path / place / "release.json") for place in ("a", "b"))
    assert part["metrics"].keys() == whole["metrics"].keys()
    counts = [facts["metrics"]["prefill_8/attack_success"]["denominator"] for facts in (whole, part)]
    assert counts == [9, 9 - TRAINED]
    shares = [facts["metrics"]["prefill_prompts"] for facts in (whole, part)]
    assert [(share["numerator"], share["denominator"]) for share in shares] == [(9, 10), (9 - TRAINED, 10 - TRAINED)]
    assert part["attacks"][0]["metrics"]["attack_success"]["denominator"] == 9 - TRAINED
    assert "No attack was tried" not in (tmp_path / "b" / "README.md").read_text()


def test_model_that_is_not_the_measured_one_is_refused(finished_run, key_file, copy_of, tmp_path):
    from safetensors.torch import load_file, save_file

    options = ReleaseOptions(output=tmp_path / "out", key=key_file)
    run = copy_of(finished_run)
    path = run / "model" / "model.safetensors"
    weights = {name: tensor * 2 for name, tensor in load_file(path).items()}
    path.unlink()
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"Expected .* to hold the measured model, with fingerprint .*, but got"):
        release_run(run, options, now=NOW)
    results = read_json(run / "results.json")
    del results["rows"][-1]["model"]["weights"]
    write_json(run / "results.json", results)
    release_run(run, options, now=NOW)
    assert read_json(tmp_path / "out" / "release.json")["is_model_checked"] is False
    assert "**Not checked:** whether these weights are the measured ones" in (tmp_path / "out/README.md").read_text()


def test_checked_model_needs_no_note(model_bundle):
    assert read_json(model_bundle / "release.json")["is_model_checked"] is True
    assert "Not checked" not in (model_bundle / "README.md").read_text()


def test_training_data_that_is_gone_is_said_or_refused(finished_run, key_file, copy_of, tmp_path):
    run = copy_of(finished_run)
    config = (run / "config.yaml").read_text().replace("safety: embedded", "safety: /nowhere/gone.jsonl", 1)
    (run / "config.yaml").write_text(config)
    released = release_run(run, ReleaseOptions(output=tmp_path / "a", key=key_file), now=NOW)
    assert "could not be read again" in released.overlap.unknown[0]
    assert "Not covered: the training data could not be read again" in (tmp_path / "a" / "README.md").read_text()
    with pytest.raises(DataError, match="Expected the run's training data to be there for `--exclude-overlap`"):
        release_run(run, ReleaseOptions(output=tmp_path / "b", key=key_file, exclude="near"), now=NOW)


def test_full_replies_are_kept_on_request(finished_run, key_file, tmp_path):
    release_run(finished_run, ReleaseOptions(output=tmp_path / "a", key=key_file, full_replies=True), now=NOW)
    lines = read_lines(tmp_path / "a")
    assert all("reply" in line and "reply_hashes" not in line for line in lines)


def damage(name):
    def unfinished(run):
        (run / "results.json").unlink()

    def stopped(run):
        results = read_json(run / "results.json")
        write_json(run / "results.json", results | {"run": results["run"] | {"status": "interrupted"}})

    def garbled(run):
        (run / "results.json").write_text("{")

    def unmeasured(run):
        results = read_json(run / "results.json")
        write_json(run / "results.json", results | {"rows": [results["rows"][0] | {"point": "start"}]})

    def no_replies(run):
        (run / "samples.jsonl").unlink()

    def no_settings(run):
        (run / "config.yaml").unlink()

    def wrong_settings(run):
        (run / "config.yaml").write_text("name: tiny\nsede: 1\n")

    return locals()[name]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("unfinished", "Expected .* to be the folder of a finished run, but it has no results.json"),
        ("stopped", "to be finished, but got status 'interrupted'"),
        ("garbled", "Expected .* to be JSON"),
        ("unmeasured", "to have measured its last model, after `align`, but got numbers after `start`"),
        ("no_replies", "Expected .*samples.jsonl` to be the replies of a run"),
        ("no_settings", "Expected .*config.yaml` to be the settings of the run"),
        ("wrong_settings", "Expected .*config.yaml` to be the settings of a run, but got: .*sede"),
    ],
)
def test_run_that_is_not_finished_is_refused(name, message, finished_run, key_file, copy_of, tmp_path):
    run = copy_of(finished_run)
    damage(name)(run)
    with pytest.raises(DataError, match=message):
        release_run(run, ReleaseOptions(output=tmp_path / "out", key=key_file), now=NOW)
    assert not (tmp_path / "out").exists()


def test_missing_folder_and_missing_model_are_refused(finished_run, key_file, copy_of, tmp_path):
    with pytest.raises(DataError, match="to be the folder of a run, but got no such folder"):
        release_run(tmp_path / "none", ReleaseOptions(output=tmp_path / "out", key=key_file), now=NOW)
    run = copy_of(finished_run)
    (run / "model" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"to hold weights as \.safetensors, but got none"):
        release_run(run, ReleaseOptions(output=tmp_path / "out", key=key_file), now=NOW)


def test_options_that_do_not_go_together_are_refused_together(finished_run, tmp_path):
    options = ReleaseOptions(output=tmp_path, is_archive=True, expires=NOW - timedelta(days=1))
    with pytest.raises(ConfigError) as caught:
        release_run(finished_run, options, now=NOW)
    text = str(caught.value)
    for part in (
        "`--key FILE` or `--new-key FILE`, but got neither",
        "`--expires` to lie ahead",
        "end in .tar",
        "be new",
    ):
        assert part in text


def test_new_key_inside_the_run_or_the_bundle_is_refused(finished_run, tmp_path):
    for place in (finished_run / "model" / "k.pem", tmp_path / "out" / "k.pem"):
        with pytest.raises(ConfigError, match="Expected `--new-key` to lie outside run and bundle"):
            release_run(finished_run, ReleaseOptions(output=tmp_path / "out", new_key=place), now=NOW)
        assert not place.exists()


def test_wrong_kind_of_key_is_refused_before_anything_is_written(finished_run, public_key, tmp_path):
    with pytest.raises(ConfigError, match="to hold a private key as PEM, but got something else"):
        release_run(finished_run, ReleaseOptions(output=tmp_path / "out", key=public_key), now=NOW)
    assert list(tmp_path.iterdir()) == []


def test_adapter_that_is_not_the_measured_model_is_refused(finished_run, key_file, copy_of, tmp_path):
    from safetensors.torch import load_file, save_file

    options = ReleaseOptions(output=tmp_path / "out", key=key_file, content="adapter")
    run = copy_of(finished_run)
    path = run / "adapter" / "adapter_model.safetensors"
    weights = {name: tensor * 2 for name, tensor in load_file(path).items()}
    path.unlink()
    save_file(weights, path)
    with pytest.raises(ConfigError, match="Expected base and adapter to give the measured model, but got a tensor"):
        release_run(run, options, now=NOW)
    path.write_bytes(b"no weights")
    with pytest.raises(ModelError, match="to hold a complete adapter, but got"):
        release_run(run, options, now=NOW)
    (run / "adapter" / "adapter_config.json").unlink()
    with pytest.raises(ConfigError, match="to hold an adapter, but got none"):
        release_run(run, options, now=NOW)


def test_new_bundle_passes_and_a_second_one_is_another(model_bundle, finished_run, key_file, tmp_path):
    key = read_private_key(key_file)
    assert check_bundle(model_bundle, trusted=key.public_key(), now=NOW).problems == []
    again = tmp_path / "again"
    release_run(finished_run, ReleaseOptions(output=again, key=key_file), now=NOW)
    assert (again / "manifest.json").read_bytes() == (model_bundle / "manifest.json").read_bytes()
    assert (again / "signature.json").read_bytes() == (model_bundle / "signature.json").read_bytes()
    other = create_key(tmp_path / "other.pem")
    assert check_bundle(again, trusted=other.public_key(), now=NOW).problems[0].part == "signature"


def refuse(*_, **__):
    raise OSError(28, "No space left on device")


def test_full_disk_leaves_no_half_of_a_bundle(finished_run, key_file, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="to be writable, but got"):
        release_run(finished_run, ReleaseOptions(output=tmp_path / "file" / "out", key=key_file), now=NOW)
    for place, name in ((bundle_module.shutil, "copyfile"), (bundle_module.os, "rename")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, refuse)
            with pytest.raises(StorageError, match="to be writable, but got No space left on device"):
                release_run(finished_run, ReleaseOptions(output=tmp_path / "out", key=key_file), now=NOW)
        assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_bundle_that_fails_its_own_checks_is_never_handed_out(finished_run, key_file, tmp_path, monkeypatch):
    monkeypatch.setattr(bundle_module, "sign_manifest", lambda manifest, key: b"{}")
    with pytest.raises(SeawallError, match="Expected the new bundle to pass its own checks, but got: signature"):
        release_run(finished_run, ReleaseOptions(output=tmp_path / "out", key=key_file), now=NOW)
    assert list(tmp_path.iterdir()) == []


def test_run_without_a_reply_that_can_be_made_again_is_refused(finished_run, key_file, copy_of, tmp_path):
    run = copy_of(finished_run)
    lines = [line | {"prefill": "Sure"} for line in read_lines(run)]
    (run / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DataError, match="Expected replies that verification can make again"):
        release_run(run, ReleaseOptions(output=tmp_path / "out", key=key_file), now=NOW)
