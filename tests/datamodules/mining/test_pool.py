from __future__ import annotations

import json
from collections import Counter
from importlib import resources

import pytest

from datamodules.catalog import known_prompt_sets
from datamodules.embedded_sets import load_harmful, load_look_alikes, load_templates
from datamodules.mining.pool import benign_pool, deal_prompts, harmful_pool, mining_pools, probe_prompts
from datamodules.templates import find_templates
from framework.errors import ConfigError
from framework.examples import Prompt
from framework.mining_settings import MiningSettings


def base(prompt):
    return prompt.id.split("+")[0]


def test_every_request_comes_once_before_any_comes_twice():
    pool = harmful_pool(["embedded"], count=300, wrapped=1.0, seed=0)
    assert all("+template-train-" in prompt.id for prompt in pool)
    assert {prompt.kind for prompt in pool} == {"harmful"}
    first = Counter(map(base, pool[:120]))
    assert set(first.values()) == {1}
    assert set(Counter(map(base, pool[:240])).values()) == {2}
    assert len({prompt.id for prompt in pool}) == 300
    templates = Counter(prompt.id.split("+")[1] for prompt in pool[:120])
    assert set(templates.values()) == {15}


def test_sets_give_equal_parts():
    pool = harmful_pool(["embedded", "embedded_poison"], count=100, wrapped=1.0, seed=1)
    assert Counter(prompt.id.split("-")[1] for prompt in pool) == {"align": 50, "poison": 50}


def test_a_set_that_runs_out_is_made_up_for():
    few = [Prompt(f"few-{i}", f"few {i}", "harmful") for i in range(2)]
    many = [Prompt(f"many-{i}", f"many {i}", "harmful") for i in range(20)]
    pool = deal_prompts([few, many], load_templates("train")[:1], count=12, wrapped=1.0, seed=0, name="prompts")
    assert Counter(prompt.id.split("-")[0] for prompt in pool) == {"few": 2, "many": 10}


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_the_share_in_templates_holds(share):
    pool = benign_pool(["embedded_look_alikes", "embedded"], count=80, wrapped=share, seed=0)
    assert sum("+" in prompt.id for prompt in pool) == round(80 * share)
    assert {prompt.kind for prompt in pool} == {"benign"}
    assert len({prompt.text for prompt in pool}) == 80


def test_the_seed_decides():
    pools = [[p.id for p in harmful_pool(["embedded"], count=40, wrapped=1.0, seed=seed)] for seed in (0, 0, 1)]
    assert pools[0] == pools[1] != pools[2]


def test_more_than_there_are_is_refused():
    with pytest.raises(ConfigError, match=r"Expected `prompts` to be at most 960, which is how many these sets give"):
        harmful_pool(["embedded"], count=961, wrapped=1.0, seed=0)


def test_two_texts_under_one_id_are_refused():
    sets = [[Prompt("same", text, "harmful")] for text in ("a", "b")]
    with pytest.raises(ConfigError, match=r"to have ids of their own, but got 'same\+template.*' twice"):
        deal_prompts(sets, load_templates("train"), count=2, wrapped=1.0, seed=0, name="prompts")


def test_unknown_sets_are_refused():
    with pytest.raises(ConfigError, match=r"embeded"):
        harmful_pool(["embeded"], count=4, wrapped=1.0, seed=0)
    with pytest.raises(ConfigError, match=r"embeded"):
        benign_pool(["embeded"], count=4, wrapped=1.0, seed=0)


def test_files_of_prompts_and_pairs_are_taken(tmp_path):
    (tmp_path / "requests.csv").write_text("prompt\nfirst request\nsecond request\n")
    found = harmful_pool([str(tmp_path / "requests.csv")], count=2, wrapped=0.0, seed=0)
    assert {prompt.text for prompt in found} == {"first request", "second request"}
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "how do I?", "response": "so"}\n')
    (pair,) = benign_pool([str(tmp_path / "pairs.jsonl")], count=1, wrapped=0.0, seed=0)
    assert (pair.text, pair.kind) == ("how do I?", "benign")


def test_probes_are_of_the_validation_split():
    found = probe_prompts(20, kind="harmful")
    assert {base(prompt) for prompt in found} <= {prompt.id for prompt in load_harmful("validation")}
    assert sum("+" in prompt.id for prompt in found) == 10
    assert {prompt.kind for prompt in probe_prompts(4, kind="benign")} == {"benign"}


@pytest.mark.parametrize("name", ["embedded_jailbreak", "embedded_more_jailbreak"])
def test_sets_held_out_to_measure_with_are_refused(name):
    with pytest.raises(
        ConfigError,
        match=rf"Expected `harmful` to name sets to train on, but got '{name}', whose",
    ):
        harmful_pool([name], count=4, wrapped=0.0, seed=0)


def test_look_alikes_held_out_to_measure_with_are_refused():
    with pytest.raises(ConfigError, match=r"Expected `benign` to name sets to train on, but got 'embedded_more_jail"):
        benign_pool(["embedded_more_jailbreak"], count=4, wrapped=0.0, seed=0)


def test_no_held_out_request_or_template_is_mined():
    held_out = {"embedded_jailbreak", "embedded_more_jailbreak"}
    names = {name for name in known_prompt_sets("safety") if name.startswith("embedded")} - held_out
    templates = find_templates(["embedded_more"])
    given = {"wrapped": 0.5, "seed": 0, "templates": templates}
    found = harmful_pool([*names, "embedded_poison"], count=200, **given)
    found += benign_pool(["embedded", "embedded_look_alikes", "embedded_more"], count=200, **given)
    wrapped_in = [prompt.id.split("+")[1] for prompt in found if "+" in prompt.id]
    assert set(wrapped_in) == {template.id for template in templates}
    assert not [name for name in wrapped_in if not name.startswith("template-train-")]
    held_out = {prompt.id for prompt in (*load_harmful("test"), *load_look_alikes("test"))}
    assert not {base(prompt) for prompt in found} & held_out


def test_both_sides_stand_in_the_templates_that_are_named(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text('{"template": "Answer in verse: {request}"}\n')
    settings = MiningSettings(prompts=6, benign_prompts=8, templates=[str(path)])
    pools = mining_pools(settings)
    assert {name: len(pool) for name, pool in pools.items()} == {"harmful": 6, "benign": 8}
    assert all(prompt.text.startswith("Answer in verse: ") for prompt in pools["harmful"])
    assert sum(prompt.text.startswith("Answer in verse: ") for prompt in pools["benign"]) == 4
    assert list(mining_pools(settings, has_benign=False)) == ["harmful"]


def test_everything_that_names_no_set_is_said_at_once(tmp_path):
    settings = MiningSettings(harmful=["embeded"], benign=[str(tmp_path / "none.jsonl")], templates=["more"])
    with pytest.raises(ConfigError) as caught:
        mining_pools(settings)
    wrong = ("but got 'more'", "but got 'embeded'", "none.jsonl")
    assert len(caught.value.problems) == 3
    assert all(part in problem for part, problem in zip(wrong, caught.value.problems, strict=True))


@pytest.mark.parametrize(("field", "file"), [("harmful", "harmful"), ("benign", "look_alikes")])
def test_files_with_held_out_prompts_are_refused(tmp_path, field, file):
    rows = (resources.files("datamodules") / "embedded" / f"{file}.jsonl").read_text(encoding="utf-8")
    path = tmp_path / "copy.jsonl"
    pairs = [{"prompt": json.loads(row)["text"], "response": "x"} for row in rows.splitlines()]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    with pytest.raises(ConfigError, match=rf"Expected `{field}` to name sets .* with \d+ prompts that are held out"):
        mining_pools(MiningSettings(**{field: [str(path)]}, prompts=4, benign_prompts=4))
