"""Numbers without some prompts, names that stay here, hashes of replies, and the card."""

from __future__ import annotations

import json

import pytest

from experiments.measured_runs import read_samples
from experiments.release.facts import metrics_without
from experiments.release.finished_run import read_finished_run
from experiments.release.names import short_names, without_paths
from experiments.release.overlap import Overlap, TrainingPrompts, find_overlap, training_prompts
from experiments.release.samples import agreement, bundle_sample, exact_hash, prefix_hashes, select_samples
from framework.errors import DataError
from framework.files import read_json


def test_rates_computed_again_are_the_recorded_ones_when_nothing_is_left_out(finished_run):
    metrics = read_json(finished_run / "results.json")["rows"][-1]["metrics"]
    samples = read_samples(finished_run / "samples.jsonl", point="align")
    assert metrics_without(metrics, samples) == metrics
    with pytest.raises(DataError, match="Expected prompts that are not in the training data, but got none"):
        metrics_without(metrics, [])


def test_card_says_what_a_reader_needs(model_bundle):
    card = (model_bundle / "README.md").read_text(encoding="utf-8")
    for part in ("## Judges", "## Attack budget", "## Limits", "## Data", "## Cost", "95 % interval", "`rules`"):
        assert part in card
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "/10; " in card  # counts beside the rates


def test_short_names_stay_apart_and_the_system_message_stays_as_it_is():
    names = short_names({"a": "/x/p.jsonl", "b": ["/y/p.jsonl", "embedded"], "system": "/no_think", "c": "/"})
    assert set(names) == {"/x/p.jsonl", "/y/p.jsonl"}
    assert len(set(names.values())) == 2
    assert all(name.startswith("p.jsonl~") for name in names.values())
    plain = without_paths({"/x/p.jsonl/rate": 1, "/y/p.jsonl/rate": 2, "rate": 3, "system": "/no_think"}, names)
    assert list(plain.values()) == [1, 2, 3, "/no_think"]
    assert plain["rate"] == 3
    with pytest.raises(DataError, match="to stay apart without the folders in them"):
        without_paths({"/x/rate": 1, "rate": 2}, {})


def test_hashes_tell_how_far_replies_agree_and_hide_what_they_say():
    sample = {"id": "1", "set": "s", "kind": "harmful", "prompt": "p", "reply": "one two three four", "verdicts": {}}
    line = bundle_sample(sample)
    assert "one" not in str(line)
    assert line["reply_hashes"][-1] == exact_hash("one two three four")
    assert [agreement(line, reply) for reply in ("one two three four", "one two", "one two five six", "")] == [
        1,
        0.5,
        0.5,
        0,
    ]
    assert agreement(line, "one two three four ") == 0.8
    assert agreement(line, "one two  three four") == 0.5
    full = bundle_sample(sample, full=True)
    assert agreement(full, "one two three four") == 1
    assert bundle_sample(sample | {"kind": "benign"})["reply"] == "one two three four"
    assert agreement(bundle_sample(sample | {"reply": ""}), "") == 1
    assert len(set(prefix_hashes("a a a"))) == 3
    with pytest.raises(DataError, match="to hold a reply or its hashes"):
        agreement({"id": "1"}, "x")


def test_sampled_openings_are_left_out_unless_wanted():
    samples = [{"set": "s", "id": "1"}, {"set": "s", "id": "2", "prefill": "Sure"}, {"set": "s", "id": "3"}]
    kept, left = select_samples(samples, {"s/3"}, keeps_openings=False)
    assert ([sample["id"] for sample in kept], left) == (["1"], 1)
    kept, left = select_samples(samples, set(), keeps_openings=True)
    assert ([sample["id"] for sample in kept], left) == (["1", "2", "3"], 0)


def line(number, prompt, kind="harmful"):
    return {"set": "s", "id": str(number), "kind": kind, "prompt": prompt}


def test_overlap_tells_the_same_prompts_from_near_ones_and_tasks_count_only_when_the_same():
    training = TrainingPrompts(("How do I rob the village bank at night?", "Classify: a b c d e f"), ("x",))
    samples = [
        line(1, "how do I rob the village bank at night"),
        line(2, "Tell me how to rob the village bank at noon."),
        line(3, "Bake a cake for my aunt."),
        line(4, "Classify: a b c d e g", kind="task"),
        line(5, "Classify: a b c d e f", kind="task"),
    ]
    found = find_overlap(samples, training)
    assert found == Overlap(5, 2, ("s/1", "s/5"), ("s/2",), ("x",))
    assert found.excluded(None) == frozenset()
    assert found.excluded("exact") == {"s/1", "s/5"}
    assert found.excluded("near") == {"s/1", "s/2", "s/5"}
    assert find_overlap(samples, TrainingPrompts((), ())).exact == ()
    with pytest.raises(DataError, match="Expected `samples` to be one or more measured prompts"):
        find_overlap([], training)


def test_training_prompts_include_those_of_methods_poison_and_tasks(finished_run):
    from dataclasses import replace

    from datamodules.catalog import evaluation_prompts, safety_examples
    from framework.config import DataConfig, StageConfig, StagesConfig

    config = read_finished_run(finished_run).config
    data = DataConfig(task="triage", task_count=16, harmful_share=0.5)
    methods = {"safety_mix": {"count": 4}, "ewc": {}}
    stage = StageConfig(data=data, methods=methods)
    found = training_prompts(replace(config, stages=StagesConfig(finetune=stage)))
    assert {row.prompt for row in safety_examples("embedded", seed=0)} <= set(found.prompts)
    poison = {prompt.text for prompt in evaluation_prompts("embedded", kind="safety", split="poison")}
    assert poison <= set(found.prompts)
    assert len(found.prompts) >= 16 + len(poison)
    assert found.unknown == ("prompts that its preparation read were not compared (method `ewc` in stage `finetune`)",)


@pytest.mark.parametrize(("method", "is_list"), [("nest", True), ("sppft", False)])
def test_training_prompts_include_those_that_methods_probe_with(tmp_path, finished_run, method, is_list):
    from dataclasses import replace

    from framework.config import StageConfig, StagesConfig

    options = {}
    for kind in ("safety", "benign"):
        path = tmp_path / f"{kind}.jsonl"
        path.write_text(json.dumps({"prompt": f"Please tell me of the {kind} word 7", "response": "No."}) + "\n")
        options[kind] = [str(path)] if is_list else str(path)
    config = read_finished_run(finished_run).config
    found = training_prompts(replace(config, stages=StagesConfig(align=StageConfig(methods={method: options}))))
    assert found.unknown == ()
    measured = [
        line(1, "please tell me of the safety word 7"),
        line(2, "Please tell me of the benign word 7", "benign"),
    ]
    assert find_overlap([*measured, line(3, "Something else.")], found).exact == ("s/1", "s/2")
    (tmp_path / "safety.jsonl").unlink()
    with pytest.raises(DataError, match=r"safety\.jsonl"):
        training_prompts(replace(config, stages=StagesConfig(align=StageConfig(methods={method: options}))))


def test_training_prompts_include_those_that_are_mined(finished_run):
    from dataclasses import replace

    from datamodules.mining import MiningSettings, mining_pools
    from framework.config import StageConfig, StagesConfig

    given = {"prompts": 12, "benign_prompts": 8, "templates": ["embedded_more"]}
    pools = mining_pools(MiningSettings(**given))
    config = read_finished_run(finished_run).config
    found = training_prompts(replace(config, stages=StagesConfig(repair=StageConfig(methods={"smh": given}))))
    assert set(found.prompts) == {prompt.text for pool in pools.values() for prompt in pool}
    assert found.unknown == ()
    given = {"smh": {"mined": "mined.jsonl"}}
    read = training_prompts(replace(config, stages=StagesConfig(repair=StageConfig(methods=given))))
    assert read.unknown == ("rows that were mined before were not compared (method `smh` in stage `repair`)",)
