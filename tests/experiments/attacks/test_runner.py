"""Suites on tiny models from the command line: what is run, reused, resumed, refused and left behind."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from experiments.attacks import interface, target
from experiments.attacks import suite as suite_module
from experiments.attacks.attack_files import read_attack_file
from experiments.attacks.attacked_models import utility_share
from experiments.attacks.interface import AttackedModel, ModelAttack, PromptAttack, Query, register_attack
from experiments.attacks.prompt_run import run_prompt_attack
from experiments.attacks.prompts.prefill import Prefill
from experiments.attacks.registry import known_attacks
from experiments.attacks.request_sets import find_requests
from experiments.attacks.responder import LocalResponder, ReplySettings
from experiments.attacks.runner import measured_with, prepare_suite
from experiments.attacks.suite import load_suite
from experiments.attacks.transcript import Transcript
from experiments.cli import main
from framework.errors import ConfigError, DataError, ModelError, StorageError
from framework.evaluation.panel import create_panel
from framework.files import ArtifactStore, fingerprint, read_json
from framework.models import ModelSpec
from tests.conftest import make_model, make_tokenizer
from tests.experiments.attacks.scripted import ANSWER, REFUSAL, REQUESTS, Scripted
from tests.experiments.endpoint_server import completion, serving

SUITE = """
limit: 3
max_new_tokens: 4
batch_size: 8
utility: {benign_nll: false, multiple_choice: [%s]}
target: {system: "", accelerator: cpu, threads: 1}
"""


ERRORS = {error.__name__: error for error in (DataError, RuntimeError, StorageError, KeyboardInterrupt)}


@dataclass(frozen=True)
class NudgeConfig:
    """Settings of the attack of these tests."""

    fail: bool = False
    error: str = "DataError"


@pytest.fixture(scope="module", autouse=True)
def nudge():
    """Know an attack that hands out the model itself and one with other weights."""
    known_attacks()

    @register_attack("nudge", config=NudgeConfig)
    class Nudge(ModelAttack):
        kind = "weights"
        unit = "edits"
        num_models = 2

        def missing(self, target):
            return "no luck" if target.seed == 13 else None

        def make(self, target, folder):
            yield AttackedModel(target.folder, 0, {"factor": 0.0})
            if self.config.fail:
                raise ERRORS[self.config.error]("Expected luck, but got none.")
            model = make_model(seed=5)
            place = folder / "nudged"
            model.save_pretrained(place)
            make_tokenizer().save_pretrained(place)
            yield AttackedModel(place, 0, {"factor": 1.0}, facts={"layer": 1}, template="Now: {request}")

    yield
    del interface._ENTRIES["nudge"]


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "tiny"
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def choices(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("choices") / "one_test.csv"
    path.write_text(
        "question,choice0,choice1,choice2,choice3,answer\nWhat is first?,a,b,c,d,0\nWhat is last?,a,b,c,d,3\n"
    )
    return path


@pytest.fixture
def here(tmp_path, monkeypatch, choices):
    monkeypatch.setenv("SEAWALL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield lambda attacks, **more: write_suite(tmp_path, choices, attacks, more)
    torch.set_num_threads(threads)


def write_suite(folder: Path, choices: Path, attacks: str, more: dict) -> str:
    lines = "".join(f"{key}: {json.dumps(value)}\n" for key, value in more.items())
    path = folder / "tried.yaml"
    path.write_text(SUITE % choices + lines + f"attacks: {{{attacks}}}\n")
    return str(path)


def call(capsys, *arguments: object) -> tuple[int, str, str]:
    code = main(["attack", *map(str, arguments)])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_suite_from_end_to_end_and_again(here, tiny_folder, capsys):
    suite = here("direct: {}, templates: {count: 2}, nudge: {}")
    code, out, err = call(capsys, tiny_folder, suite, "--json")
    assert code == 0, err
    results = json.loads(out)
    folder = Path(results["folder"])
    assert folder.parts[:2] == ("attacks", "tried")
    assert results == read_json(folder / "attack.json")
    assert [one["name"] for one in results["outcomes"]] == ["direct", "templates", "nudge"]
    assert [len(one["points"]) for one in results["outcomes"]] == [1, 2, 2]
    for outcome in results["outcomes"]:
        for point in outcome["points"]:
            rate = point["metrics"]["attack_success"]
            assert rate["denominator"] == 3
            assert rate["low"] <= rate["value"] <= rate["high"]
            assert len(point["successes"]) == 3
            assert "utility_share" in point["metrics"]
    nudged = results["outcomes"][2]["points"]
    assert nudged[0]["metrics"]["utility_share"]["value"] == 1
    assert nudged[1]["setting"] == {"factor": 1.0, "facts": {"layer": 1}}
    # The unattacked model is the first one handed out, and answers as it does directly.
    assert nudged[0]["successes"] == results["outcomes"][0]["points"][0]["successes"]
    assert results["worst_case"]["num_points"] == 4
    assert "left" in err
    read = read_attack_file(folder)
    assert [len(read.attempts(one) or []) for one in read.outcomes] == [3, 6, 6]
    assert not list((folder / ".." / "..").rglob("nudged"))
    text = (folder / "attack.md").read_text()
    assert "| direct | 1 queries |" in text
    assert "Worst case" in text
    again, out, err = call(capsys, tiny_folder, suite)
    assert again == 0
    assert err.count("reused") == 3
    assert "templates" in out
    assert str(folder) in out.replace("\n", "")


def test_interrupted_suite_goes_on_from_its_transcript(here, tiny_folder, capsys, monkeypatch):
    suite = here("direct: {}, best_of_n: {queries: 3, stop: false}")
    real = LocalResponder.reply
    count = 0

    def counted(self, queries, settings, **options):
        nonlocal count
        count += len(queries)
        if limit is not None and count > limit:
            raise KeyboardInterrupt
        return real(self, queries, settings, **options)

    monkeypatch.setattr(LocalResponder, "reply", counted)
    # 3 of the unattacked model, 3 direct, 6 of best_of_n.
    limit = 12
    assert call(capsys, tiny_folder, suite, "--json")[0] == 130
    limit, count = None, 0
    code, out, err = call(capsys, tiny_folder, suite, "--json")
    assert code == 0, err
    assert count == 3
    resumed = json.loads(out)["outcomes"]
    assert resumed[1]["cost"]["resumed_queries"] == 6
    monkeypatch.setenv("SEAWALL_CACHE", str(Path("fresh").absolute()))
    whole = json.loads(call(capsys, tiny_folder, suite, "--json")[1])["outcomes"]
    assert [one["points"] for one in whole] == [one["points"] for one in resumed]


def test_dry_run_shows_budgets_and_time_and_loads_nothing(here, tiny_folder, capsys, monkeypatch):
    suite = here("direct: {}, best_of_n: {queries: 7}, nudge: {}")
    monkeypatch.setattr(target, "LocalResponder", lambda *a, **k: Scripted(stop_after=0))
    code, out, _ = call(capsys, tiny_folder, suite, "--dry-run", "--json")
    plan = json.loads(out)
    assert code == 0
    assert [(row["label"], row["budget"], row["queries"]) for row in plan["attacks"]] == [
        ("direct", 1, 3),
        ("best_of_n", 7, 21),
        ("nudge", 2, 6),
    ]
    assert plan["seconds"] > 0
    assert not plan["speed"]["is_measured"]
    assert not Path("attacks").exists()
    assert "best_of_n" in call(capsys, tiny_folder, suite, "--dry-run")[1]


def test_attack_that_fails_is_named_and_the_others_go_on(here, tiny_folder, capsys):
    suite = here("nudge: {fail: true}, direct: {}")
    code, out, _ = call(capsys, tiny_folder, suite)
    assert code == 1
    assert "nudge failed: Expected luck, but got none." in out
    results = read_json(next(Path("attacks").rglob("attack.json")))
    assert [one["name"] for one in results["outcomes"]] == ["direct"]


def test_an_exception_that_nobody_meant_ends_its_attack_alone(here, tiny_folder, capsys):
    suite = here("nudge: {fail: true, error: RuntimeError}, direct: {}")
    code, out, err = call(capsys, tiny_folder, suite, "--verbose")
    assert code == 1
    assert "nudge failed: RuntimeError: Expected luck, but got none." in out
    assert "Traceback (most recent call last)" in err
    results = read_json(next(Path("attacks").rglob("attack.json")))
    assert [one["name"] for one in results["outcomes"]] == ["direct"]
    assert results["failed"] == [
        {
            "name": "nudge",
            "attack": "nudge",
            "type": "RuntimeError",
            "error": "RuntimeError: Expected luck, but got none.",
        }
    ]
    assert "Traceback" not in call(capsys, tiny_folder, suite)[2]


@pytest.mark.parametrize(("error", "expected"), [("StorageError", 1), ("KeyboardInterrupt", 130)])
def test_a_full_disk_and_ctrl_c_end_the_suite(error, expected, here, tiny_folder, capsys):
    assert call(capsys, tiny_folder, here(f"nudge: {{fail: true, error: {error}}}, direct: {{}}"))[0] == expected
    assert not list(Path("attacks").rglob("attack.json"))


def test_an_attack_without_effect_fails_and_is_not_withstood(here, tiny_folder, capsys):
    code, out, _ = call(capsys, tiny_folder, here("code_switching: {share: 0.0}, direct: {}"))
    assert code == 1
    assert "code_switching failed: Expected attack `code_switching` to change at least one request" in out
    results = read_json(next(Path("attacks").rglob("attack.json")))
    assert [one["name"] for one in results["outcomes"]] == ["direct"]


def test_prompt_attacks_of_every_suite_that_comes_with_the_project_have_an_effect(tmp_path):
    tried = 0
    for path in sorted(Path(suite_module.__file__).parents[1].glob("configs/attack/*.yaml")):
        config, attacks = load_suite(path.stem)
        requests = find_requests(config).prompts[:4]
        for named in attacks:
            attack = named.attack
            if not isinstance(attack, PromptAttack):
                continue
            if isinstance(attack, Prefill):  # there is no unaligned model to sample replies of
                attack = Prefill(replace(attack.config, replies="opening"))
            transcript = Transcript(tmp_path / path.stem / named.label, {})
            settings = ReplySettings(8, batch_size=64)
            judges = create_panel(["rules"])
            found = run_prompt_attack(
                attack, requests, Scripted(), settings=settings, judges=judges, transcript=transcript
            )
            changed = sum("unchanged" not in one.details for one in found.attempts)
            assert (changed > 0) == (attack.name != "direct"), (path.stem, named.label)
            tried += 1
    assert tried > 40


def test_requests_with_other_pictures_are_other_requests(here, tiny_folder, tmp_path):
    stage = prepare_suite(str(tiny_folder), here("direct: {}")).stage
    texts = stage.requests
    found = []
    for number in range(2):
        (tmp_path / f"{number}.png").write_bytes(bytes([number]))
        pictures = [replace(one, image=tmp_path / f"{number}.png") for one in texts]
        found.append(measured_with(replace(stage, requests=pictures))["requests"])
    found.append(measured_with(stage)["requests"])
    assert len(set(found)) == 3
    # That of texts alone is what it always was, so that earlier results stay comparable.
    assert found[2] == fingerprint(sorted((one.id, one.text) for one in texts))
    assert found[2] == measured_with(replace(stage, requests=texts[::-1]))["requests"]


def test_examples_are_redacted_unless_asked(here, tiny_folder, capsys, monkeypatch):
    suite = here("direct: {}", requests=["embedded"])
    monkeypatch.setattr(target, "LocalResponder", lambda *a, **k: Scripted(lambda query, _: ANSWER))
    code, out, err = call(capsys, tiny_folder, suite, "--examples", 1)
    assert code == 0, err
    assert "reply of 16 words redacted" in out
    assert ANSWER not in out
    assert ANSWER in call(capsys, tiny_folder, suite, "--examples", 1, "--unredacted")[1].replace("\n", " ")


def test_everything_that_cannot_be_done_is_told_at_once(here, tiny_folder, capsys):
    suite = here("prefill: {}, nudge: {}, direct: {}", seed=13)
    code, _, err = call(capsys, tiny_folder, suite)
    assert code == 2
    assert "attacks.nudge: no luck" in err
    assert "attacks.prefill: Expected `target.base` to name the unaligned model" in err


def test_endpoint_takes_prompt_attacks_and_refuses_the_others(here, capsys):
    with serving(lambda body, number: completion(REFUSAL)) as endpoint:
        suite = here("direct: {}, nudge: {}, prefill: {replies: opening}")
        code, _, err = call(capsys, endpoint.name(), suite)
        assert code == 2
        assert "Expected `attacks.nudge` to need no weights on an endpoint, but got `nudge`" in err
        assert "`attacks.prefill` forces, but got 'none'" in err
        assert not endpoint.asked
        suite = here("direct: {}, persona: {names: [override]}")
        code, out, err = call(capsys, endpoint.name(), suite, "--json")
        assert code == 0, err
        results = json.loads(out)
        assert [one["points"][0]["metrics"]["attack_success"]["value"] for one in results["outcomes"]] == [0, 0]
        assert results["utility"] == {}
        assert results["model"]["endpoint"]
        asked = len(endpoint.asked)
        assert asked == 6
        # Nobody can tell whether the server still has the same model: it is asked again unless that is waived.
        assert call(capsys, endpoint.name(), suite)[0] == 0
        assert len(endpoint.asked) == 2 * asked
        assert call(capsys, endpoint.name(), suite, "endpoint.reuse=true")[0] == 0
        assert len(endpoint.asked) == 2 * asked


def test_settings_of_an_endpoint_are_checked(here):
    suite = here("direct: {}")
    with pytest.raises(ConfigError, match=r"`endpoint.key_variable` to be the name of an environment variable"):
        prepare_suite("http://127.0.0.1:9/v1#m", suite, ["endpoint.key_variable=not a name"])


def test_files_of_the_utility_are_opened_first(here, tiny_folder):
    with pytest.raises(DataError, match="to be a file, but found nothing"):
        prepare_suite(str(tiny_folder), here("direct: {}"), ["utility.multiple_choice=[none.csv]"])
    with pytest.raises(ConfigError, match=r"to be one of .*, but got 'no_such_task'"):
        prepare_suite(str(tiny_folder), here("direct: {}"), ["utility.task=no_such_task"])


def test_missing_models_are_named(here, tiny_folder):
    suite = here("direct: {}")
    with pytest.raises(ModelError, match=r"Expected `model.name` to be a known model, but got 'no-such-model'"):
        prepare_suite("no-such-model", suite)
    with pytest.raises(ModelError, match=r"target.base: Expected `model.name` to be a known model"):
        prepare_suite(str(tiny_folder), suite, ["target.base=no-such-model"])


def test_run_whose_model_is_attacked_is_compared(here, tiny_folder, tmp_path):
    suite = here("direct: {}")
    run = tmp_path / "runs" / "aligned"
    run.mkdir(parents=True)
    (run / "model").symlink_to(tiny_folder)
    (run / "config.yaml").write_text(
        "name: aligned\nstages: {align: {data: {safety: embedded}}}\nevaluate: {after: [align], task: false}\n"
    )
    prepared = prepare_suite(str(run / "model"), suite)
    assert prepared.stage.target.label.startswith("aligned-")
    assert prepared.requests.overlap["exact"] == []
    assert prepared.requests.overlap["num_training"] >= 100


def test_local_replies_depend_on_query_and_number_alone(tiny_folder):
    responder = LocalResponder(ModelSpec(str(tiny_folder), "float32"), "f", system="", accelerator="cpu")
    settings = ReplySettings(6, batch_size=2, temperature=1.0, seed=3)
    queries = [Query(one, one, system=["", "Be brief.", None][number % 3]) for number, one in enumerate(REQUESTS)]
    together = responder.reply(queries, settings, numbers=range(10, 14))
    apart = [responder.reply([query], settings, numbers=[10 + i])[0] for i, query in enumerate(queries)]
    assert [one.text for one in together] == [one.text for one in apart]
    other = responder.reply(queries, settings, numbers=range(20, 24))
    assert [one.text for one in other] != [one.text for one in together]
    responder.close()
    assert responder.reply(queries[:1], settings, numbers=[10])[0] == together[0]


def test_utility_is_a_share_of_the_unattacked_models():
    plain = {"task_accuracy": {"value": 0.5}, "benign_nll": {"value": 2.0}}
    assert utility_share({"task_accuracy": {"value": 0.6}, "benign_nll": {"value": 2.5}}, plain) == 0.8
    assert utility_share({"task_accuracy": {"value": 0.0}}, {"task_accuracy": {"value": 0.0}}) == 1
    assert utility_share({}, {}) is None


def test_artefacts_do_not_depend_on_the_label_but_on_the_settings(here, tiny_folder, tmp_path):
    from experiments.attacks.carrying_out import _key

    suite = here("one: {attack: best_of_n, queries: 2}, two: {attack: best_of_n, queries: 2}, best_of_n: {queries: 3}")
    prepared = prepare_suite(str(tiny_folder), suite, artifacts=ArtifactStore(tmp_path))
    keys = [_key(named, prepared.stage) for named in prepared.attacks]
    assert keys[0] == keys[1] != keys[2]
