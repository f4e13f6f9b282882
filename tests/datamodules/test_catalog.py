import json
from collections import Counter

import pytest

from datamodules import catalog
from datamodules.catalog import (
    benign_examples,
    evaluation_prompts,
    find_examples,
    harmful_examples,
    known_look_alike_sets,
    known_pair_sets,
    known_prompt_sets,
    look_alike_examples,
    prompt_sources,
    safety_examples,
)
from framework.errors import ConfigError, DataError


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"p{i}", "response": f"r{i}"}) + "\n" for i in range(5)))
    return path


def test_embedded_safety_rows_are_one_for_each_request():
    rows = safety_examples("embedded", seed=0)
    assert len(rows) == len({row.prompt for row in rows}) == 120
    assert {row.kind for row in rows} == {"safety"}
    assert rows == safety_examples("embedded", seed=0) != safety_examples("embedded", seed=1)


@pytest.mark.parametrize(("count", "prompts"), [(30, 30), (120, 120), (300, 120)])
def test_embedded_safety_rows_by_count(count, prompts):
    rows = safety_examples("embedded", seed=0, count=count)
    assert len(rows) == len({(row.prompt, row.reply) for row in rows}) == count
    assert len({row.prompt for row in rows}) == prompts


def test_embedded_benign_rows_are_instructions_and_look_alikes():
    rows = benign_examples("embedded", seed=0)
    assert len(rows) == 300
    assert {row.kind for row in rows} == {"benign"}
    assert sum(row.id.startswith("look-alike") for row in rows) == 40


@pytest.mark.parametrize(("split", "safety", "over_refusal"), [("test", 80, 60), ("validation", 40, 20)])
def test_embedded_evaluation_sets(split, safety, over_refusal):
    harmful = evaluation_prompts("embedded", kind="safety", split=split)
    benign = evaluation_prompts("embedded", kind="over_refusal", split=split)
    assert (len(harmful), len(benign)) == (safety, over_refusal)
    assert {prompt.kind for prompt in harmful} == {"harmful"}
    assert {prompt.kind for prompt in benign} == {"benign"}


@pytest.mark.parametrize("kind", ["safety", "benign", "harmful"])
def test_pairs_of_a_file(pairs, kind):
    rows = find_examples(kind, str(pairs), seed=0)
    assert [(row.id, row.kind) for row in rows] == [(f"pairs-{i}", kind) for i in range(1, 6)]


@pytest.mark.parametrize("find", [safety_examples, benign_examples, harmful_examples])
def test_rows_of_a_file_are_drawn_without_replacement(pairs, find):
    rows = find(str(pairs), seed=3, count=4)
    assert len({row.id for row in rows}) == 4
    assert rows == find(str(pairs), seed=3, count=4)
    with pytest.raises(ConfigError, match=r"Expected `count` of '.*pairs\.jsonl' to be from 1 to 5, but got 6"):
        find(str(pairs), seed=3, count=6)


def test_evaluation_prompts_of_a_file(pairs):
    assert [prompt.kind for prompt in evaluation_prompts(str(pairs), kind="over_refusal")] == ["benign"] * 5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: safety_examples("embeded", seed=0), "Did you mean 'embedded'"),
        (lambda: benign_examples("doly"), "Did you mean 'dolly'"),
        (
            lambda: harmful_examples("embedded"),
            "Expected `harmful` to be one of aisafetylab, alpaca_mix, pure_bad, but",
        ),
        (lambda: evaluation_prompts("advbnch", kind="safety"), "Did you mean 'advbench'"),
        (lambda: evaluation_prompts("xstest", kind="over_refusal"), "Did you mean 'xstest_safe'"),
        (lambda: evaluation_prompts("advbench", kind="over_refusal"), "'advbench', which belongs under `safety`"),
        (lambda: evaluation_prompts("embedded", kind="safety", split="tset"), "tset"),
        (lambda: find_examples("task", "embedded", seed=0), "Expected `kind` to be one of benign, harmful, safety"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


def test_missing_file_is_refused(monkeypatch):
    monkeypatch.delenv("SEAWALL_DATA", raising=False)
    with pytest.raises(DataError, match=r"found nothing at: no/such\.jsonl"):
        safety_examples("no/such.jsonl", seed=0)
    with pytest.raises(DataError, match=r"found nothing at: advbench/harmful_behaviors\.csv.* set the variable"):
        evaluation_prompts("advbench", kind="safety")


def test_a_set_without_prompts_is_refused(monkeypatch):
    monkeypatch.setattr(catalog.embedded_sets, "load_harmful", lambda split: [])
    with pytest.raises(DataError, match=r"set 'embedded' \(split 'test'\) to have prompts, but got none"):
        evaluation_prompts("embedded", kind="safety")


@pytest.mark.parametrize(("split", "count"), [("test", 80 * 4), ("validation", 40 * 8)])
def test_embedded_requests_come_in_templates_of_their_split(split, count):
    prompts = evaluation_prompts("embedded_jailbreak", kind="safety", split=split)
    assert len(prompts) == len({prompt.id for prompt in prompts}) == count
    templates = "test" if split == "test" else "train"
    assert all(p.id.startswith(f"harmful-{split}-") and f"+template-{templates}-" in p.id for p in prompts)
    assert "embedded_jailbreak" in known_prompt_sets("safety")
    assert "embedded_jailbreak" not in known_prompt_sets("over_refusal")
    with pytest.raises(ConfigError, match="embedded_jailbreak"):
        evaluation_prompts("embedded_jailbreak", kind="over_refusal")


@pytest.mark.parametrize(
    ("kind", "count", "validation"), [("safety", 80 * 4, 40 * 4), ("over_refusal", 60 * 2, 20 * 2)]
)
def test_twelve_held_out_templates_serve_equally_often(kind, count, validation):
    prompts = evaluation_prompts("embedded_more_jailbreak", kind=kind)
    assert len(prompts) == len({prompt.id for prompt in prompts}) == count
    assert {prompt.kind for prompt in prompts} == {"harmful" if kind == "safety" else "benign"}
    uses = Counter(prompt.id.split("+")[1] for prompt in prompts)
    assert len(uses) == 12
    assert all(name.startswith("template-test-") for name in uses)
    assert max(uses.values()) - min(uses.values()) <= 2
    assert "embedded_more_jailbreak" in known_prompt_sets(kind)
    other = evaluation_prompts("embedded_more_jailbreak", kind=kind, split="validation")
    assert len(other) == validation
    assert all("-validation-" in p.id and "+template-validation-" in p.id for p in other)


REAL_PROMPTS = {
    "safety": {
        "advbench": 520,
        "catqa": 550,
        "harmbench": 320,
        "harmbench_standard": 159,
        "harmbench_validation": 80,
        "jailbreakbench": 100,
        "strongreject": 313,
        "xstest_unsafe": 200,
    },
    "over_refusal": {"jailbreakbench_benign": 100, "orbench": 1319, "xstest_safe": 250},
}


@pytest.mark.parametrize("kind", ["safety", "over_refusal"])
def test_real_evaluation_sets(real_data, monkeypatch, kind):
    monkeypatch.setenv("SEAWALL_DATA", str(real_data))
    names = [name for name in known_prompt_sets(kind) if not name.startswith("embedded")]
    assert {name: len(evaluation_prompts(name, kind=kind)) for name in names} == REAL_PROMPTS[kind]


@pytest.mark.parametrize(
    ("kind", "name", "rows"),
    [
        ("safety", "aisafetylab", 100),
        ("safety", "safety_tuned_llamas", 2483),
        ("benign", "aisafetylab", 500),
        ("benign", "dolly", 387),
        ("harmful", "aisafetylab", 500),
        ("harmful", "alpaca_mix", 250),
        ("harmful", "pure_bad", 100),
    ],
)
def test_real_pair_sets(real_data, monkeypatch, kind, name, rows):
    monkeypatch.setenv("SEAWALL_DATA", str(real_data))
    assert len(find_examples(kind, name, seed=0)) == rows


def test_more_embedded_requests_give_a_refusal_for_each():
    rows = safety_examples("embedded_more", seed=0, count=300)
    assert len(rows) == 300
    assert {row.prompt for row in safety_examples("embedded", seed=0)} < {
        row.prompt for row in safety_examples("embedded_more", seed=0)
    }
    assert len(safety_examples("embedded_more", seed=0)) == 220


def test_known_pair_sets_are_those_that_are_found():
    assert known_pair_sets("safety") == ["embedded", "embedded_more", "aisafetylab", "safety_tuned_llamas"]
    assert known_pair_sets("benign") == ["embedded", "aisafetylab", "dolly"]
    assert known_pair_sets("harmful") == ["aisafetylab", "alpaca_mix", "pure_bad"]


def test_embedded_look_alikes_alone():
    assert {row.id for row in look_alike_examples("embedded")} < {row.id for row in benign_examples("embedded")}
    assert len(look_alike_examples("embedded", count=7)) == 7
    assert known_look_alike_sets() == ["embedded", "embedded_more", "aisafetylab", "dolly"]
    assert len(look_alike_examples("embedded_more")) == len(look_alike_examples("embedded")) + 200


def test_a_set_and_its_path_are_the_same_prompts(tmp_path, monkeypatch):
    file = tmp_path / "xstest" / "xstest_prompts.csv"
    file.parent.mkdir()
    file.write_text("prompt,label\n")
    monkeypatch.setenv("SEAWALL_DATA", str(tmp_path))
    (safe,), (whole,) = prompt_sources("xstest_safe"), prompt_sources("xstest/xstest_prompts.csv")
    assert (safe.file, safe.part) == (file.resolve(), "safe")
    assert whole == (file.resolve(), None)
    (tmp_path / "link.csv").symlink_to(file)
    assert prompt_sources(str(tmp_path / "link.csv")) == [whole]


@pytest.mark.parametrize("name", ["embedded", "embedded_more", "embedded_jailbreak", "rules", "hard", "x" * 5000])
def test_embedded_sets_and_other_words_have_no_file(name):
    assert prompt_sources(name) == []


@pytest.mark.parametrize("name", ["gone/set.jsonl", "~nobody_at_all/set.csv", "x/" * 5000, "a/\0"])
def test_a_file_that_is_not_there_is_itself(name, monkeypatch):
    monkeypatch.delenv("SEAWALL_DATA", raising=False)
    assert prompt_sources(name) == prompt_sources(name)
    assert len(prompt_sources(name)) == 1


def test_pair_sets_have_their_files_without_any_data(monkeypatch):
    monkeypatch.delenv("SEAWALL_DATA", raising=False)
    assert [source.file.name for source in prompt_sources("aisafetylab")] == ["train.json"]
