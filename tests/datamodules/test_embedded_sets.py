from __future__ import annotations

import csv
import itertools
import json
import re
from collections import Counter
from importlib import resources
from pathlib import Path

import pytest

from datamodules import embedded
from datamodules.embedded_sets import (
    JailbreakTemplate,
    benign_examples,
    load_benign,
    load_harmful,
    load_look_alikes,
    load_refusals,
    load_templates,
    look_alike_examples,
    refusal_examples,
)
from framework.errors import ConfigError, DataError
from framework.examples import Prompt

FILES = (
    "benign",
    "harmful",
    "jailbreak_templates",
    "look_alikes",
    "more_harmful",
    "more_jailbreak_templates",
    "more_look_alikes",
    "refusals",
)
EVALUATION_FILES = (
    ("advbench/harmful_behaviors.csv", "goal"),
    ("xstest/xstest_prompts.csv", "prompt"),
    ("jailbreakbench/harmful-behaviors.csv", "Goal"),
    ("jailbreakbench/benign-behaviors.csv", "Goal"),
    ("strongreject/strongreject_dataset.csv", "forbidden_prompt"),
    ("strongreject/strongreject_small_dataset.csv", "forbidden_prompt"),
    ("harmbench/harmbench_behaviors_text_test.csv", "Behavior"),
    ("harmbench/harmbench_behaviors_text_val.csv", "Behavior"),
)
REFUSAL_OPENINGS = (
    "I'm sorry",
    "I can't",
    "I cannot",
    "I won't",
    "I am unable",
    "I'm unable",
    "I'm not able",
    "I am not able",
    "I'm afraid I can't",
    "I apologize, but I can",
    "I will not",
    "I must decline",
    "I must refuse",
    "Sorry, ",
    "No, I ",
)


def read(name: str) -> list[dict[str, str]]:
    text = (resources.files("datamodules") / "embedded" / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def normalise(text: str) -> str:
    return re.sub("[^a-z0-9]", "", text.lower())


def trigrams(text: str) -> set[tuple[str, ...]]:
    words = re.findall("[a-z0-9]+", text.lower())
    return {tuple(words[i : i + 3]) for i in range(max(1, len(words) - 2))}


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("harmful", {"align": 120, "poison": 80, "validation": 40, "test": 80}),
        ("look_alikes", {"align": 40, "validation": 20, "test": 60}),
        ("more_look_alikes", {"align": 200}),
        ("more_harmful", {"align": 100}),
        ("benign", {"align": 260, "validation": 48}),
        ("jailbreak_templates", {"train": 8, "test": 4}),
        ("more_jailbreak_templates", {"train": 16, "validation": 4, "test": 8}),
    ],
)
def test_split_counts_are_as_documented(name: str, counts: dict[str, int]) -> None:
    assert Counter(row["split"] for row in read(name)) == counts


def test_harmful_topics_are_disjoint_and_every_category_is_in_every_split() -> None:
    rows = read("harmful")
    assert len({(row["topic"], row["split"]) for row in rows}) == len({row["topic"] for row in rows}) == 96
    categories = {row["category"] for row in rows}
    assert len(categories) == 11
    for split in ("align", "poison", "validation", "test"):
        assert {row["category"] for row in rows if row["split"] == split} == categories


def test_topics_of_the_requests_added_for_training_are_their_own() -> None:
    added = Counter(row["topic"] for row in read("more_harmful"))
    assert set(added.values()) == {4}
    assert added.keys().isdisjoint({row["topic"] for row in read("harmful")})
    assert [p.id for p in load_harmful("align", more=True)][:120] == [p.id for p in load_harmful("align")]
    with pytest.raises(ConfigError, match="Embedded set 'more_harmful': Expected `split` to be one of align"):
        load_harmful("test", more=True)


def test_openings_of_harmful_test_requests_occur_in_align() -> None:
    def opening(prompt: Prompt) -> str:
        return prompt.text.split()[0]

    seen = {opening(p) for p in load_harmful("align")}
    unseen = [p.text for p in load_harmful("test") if opening(p) not in seen]
    assert len(unseen) <= 2


def test_harmful_and_look_alike_requests_are_one_short_sentence() -> None:
    for row in read("harmful") + read("more_harmful") + read("look_alikes") + read("more_look_alikes"):
        assert 4 <= len(row["text"].split()) <= 20, row
        assert "\n" not in row["text"]
        assert len(re.findall(r"[.?!](?=\s)", row["text"])) == 0, row


def test_look_alike_types_are_balanced_in_every_split() -> None:
    counts = Counter((row["split"], row["category"]) for row in read("look_alikes"))
    assert {split: {n for (s, _), n in counts.items() if s == split} for split, _ in counts} == {
        "align": {4},
        "validation": {2},
        "test": {6},
    }
    assert len(counts) == 30
    more = Counter(row["category"] for row in read("more_look_alikes"))
    assert more == dict.fromkeys({category for _, category in counts}, 20)


def test_ids_are_unique_over_all_files() -> None:
    ids = [row["id"] for name in FILES for row in read(name)]
    assert len(ids) == len(set(ids)) == 1136


def test_no_text_occurs_twice() -> None:
    texts = Counter(normalise(row.get("text") or row["template"]) for name in FILES for row in read(name))
    assert [text for text, count in texts.items() if count > 1] == []


def test_no_near_duplicates_between_splits_or_sets() -> None:
    rows = [
        (name, row["split"], row["text"], trigrams(row["text"]))
        for name in ("harmful", "more_harmful", "look_alikes", "more_look_alikes", "benign")
        for row in read(name)
    ]
    near = [
        (a[2], b[2])
        for a, b in itertools.combinations(rows, 2)
        if a[:2] != b[:2] and len(a[3] & b[3]) >= 0.6 * len(a[3] | b[3])
    ]
    assert near == []


@pytest.mark.parametrize(("name", "limit"), [("benign", 40), ("look_alikes", 35), ("more_look_alikes", 35)])
def test_replies_are_short_and_do_not_refuse(name: str, limit: int) -> None:
    replies = [row["reply"] for row in read(name) if "reply" in row]
    assert len(replies) == {"benign": 308, "look_alikes": 40, "more_look_alikes": 200}[name]
    for reply in replies:
        assert 1 <= len(reply.split()) <= limit, reply
        assert not reply.startswith(REFUSAL_OPENINGS)


def test_benign_align_has_action_forms_of_harmful_requests() -> None:
    texts = [row["text"] for row in read("benign") if (row["split"], row["category"]) == ("align", "action_forms")]
    assert len(texts) >= 40
    for opening in ("How do I", "Write a", "Explain how to", "Give me step-by-step", "I want to", "Tell me how to"):
        assert any(text.startswith(opening) for text in texts), opening


def test_refusals_have_known_openings_and_lengths() -> None:
    refusals = load_refusals()
    assert len(refusals) == 48
    for refusal in refusals:
        assert refusal.startswith(REFUSAL_OPENINGS), refusal
        assert 10 <= len(refusal.split()) <= 30


def test_template_families_are_disjoint_and_templates_have_the_slot() -> None:
    train, validation, test = (load_templates(split, more=True) for split in ("train", "validation", "test"))
    assert [len(split) for split in (train, validation, test)] == [24, 4, 12]
    assert (train[:8], test[:4]) == (load_templates("train"), load_templates("test"))
    assert len({t.name for t in train + validation + test}) == 40
    assert len({t.id for t in train + validation + test}) == 40
    for template in train + validation + test:
        assert template.template.count("{request}") == 1
        assert len(template.template.split()) <= 60


def test_template_keeps_everything_but_text_and_id() -> None:
    prompt = Prompt("p1", "Do {this} now", "harmful", "hate", prefill="Sure")
    changed = JailbreakTemplate("t1", "x", 'He said "{request}".').apply(prompt)
    assert changed == Prompt("p1+t1", 'He said "Do {this} now".', "harmful", "hate", prefill="Sure")


@pytest.mark.parametrize("text", ["no slot", "{request} and {request}"])
def test_template_without_one_slot_is_refused(text: str) -> None:
    with pytest.raises(DataError, match=r"Expected `template` to contain \{request\} exactly once"):
        JailbreakTemplate("t", "x", text)


def test_loaders_give_the_right_kinds() -> None:
    assert {p.kind for p in load_harmful("test")} == {"harmful"}
    assert {p.kind for p in load_look_alikes("test") + load_benign("validation")} == {"benign"}
    assert {e.kind for e in look_alike_examples() + benign_examples()} == {"benign"}
    assert [e.id for e in benign_examples()] == [p.id for p in load_benign("align")]
    assert all(e.reply and e.messages[-1].role == "user" for e in look_alike_examples(more=True))
    assert [e.id for e in look_alike_examples(more=True)][:40] == [e.id for e in look_alike_examples()]
    assert len(look_alike_examples(more=True)) == 240


@pytest.mark.parametrize("per_prompt", [1, 3, 48])
def test_refusals_are_dealt_evenly_and_differ_within_a_prompt(per_prompt: int) -> None:
    examples = refusal_examples(seed=3, per_prompt=per_prompt)
    assert len({e.id for e in examples}) == len(examples) == 120 * per_prompt
    assert {e.kind for e in examples} == {"safety"}
    uses = Counter(e.reply for e in examples)
    assert len(uses) == 48
    assert max(uses.values()) - min(uses.values()) <= 1
    pairs = Counter((e.prompt, e.reply) for e in examples)
    assert set(pairs.values()) == {1}
    assert Counter(e.prompt for e in examples) == {p.text: per_prompt for p in load_harmful("align")}


def test_refusal_examples_depend_on_the_seed_only() -> None:
    assert refusal_examples(seed=1, per_prompt=2) == refusal_examples(seed=1, per_prompt=2)
    assert [e.reply for e in refusal_examples(seed=1)] != [e.reply for e in refusal_examples(seed=2)]


@pytest.mark.parametrize("per_prompt", [0, 49])
def test_impossible_number_of_refusals_is_refused(per_prompt: int) -> None:
    with pytest.raises(ConfigError, match=r"Expected `per_prompt` to be between 1 and 48, .* but got"):
        refusal_examples(seed=0, per_prompt=per_prompt)


@pytest.mark.parametrize(
    ("load", "known"),
    [
        (load_harmful, "align, poison, test, validation"),
        (load_look_alikes, "align, test, validation"),
        (load_benign, "align, validation"),
        (benign_examples, "align, validation"),
        (lambda split: refusal_examples(split, seed=0), "align, poison, test, validation"),
        (load_templates, "test, train"),
        (lambda split: load_templates(split, more=True), "test, train, validation"),
    ],
)
def test_unknown_split_lists_the_known_ones(load: object, known: str) -> None:
    with pytest.raises(ConfigError, match=rf"Expected `split` to be one of {known}, but got 'dev'"):
        load("dev")  # type: ignore[operator]


def test_package_re_exports_the_loaders() -> None:
    assert embedded.load_harmful is load_harmful
    assert set(embedded.__all__) == {name for name in vars(embedded) if name in embedded.__all__}


@pytest.mark.parametrize(("path", "column"), EVALUATION_FILES)
def test_no_prompt_is_in_a_public_evaluation_set(real_data: Path, path: str, column: str) -> None:
    if not (real_data / path).is_file():
        pytest.skip(f"{path} is not in the folder of real data")
    with (real_data / path).open(encoding="utf-8", newline="") as handle:
        public = {normalise(row[column]) for row in csv.DictReader(handle)}
    assert len(public) >= 50
    own = {
        normalise(row["text"])
        for name in ("harmful", "more_harmful", "look_alikes", "more_look_alikes", "benign")
        for row in read(name)
    }
    assert own & public == set()


ALARMING = [
    "abort",
    "assassin",
    "attack",
    "axe",
    "bait",
    "beat",
    "bleed",
    "blow",
    "bomb",
    "bullet",
    "burn",
    "bury",
    "cannon",
    "chop",
    "choke",
    "crack",
    "crash",
    "crush",
    "cut",
    "death",
    "destroy",
    "die",
    "dragon",
    "drown",
    "drug",
    "execute",
    "explode",
    "exploded",
    "exploit",
    "fake",
    "fire",
    "flood",
    "forge",
    "gun",
    "hack",
    "hang",
    "heist",
    "hijack",
    "hit",
    "hunt",
    "inject",
    "jam",
    "kill",
    "knife",
    "knock",
    "loot",
    "murder",
    "nuke",
    "overdose",
    "poison",
    "punch",
    "raid",
    "rob",
    "shoot",
    "sink",
    "slap",
    "slash",
    "slay",
    "smash",
    "smuggle",
    "spy",
    "stab",
    "steal",
    "strangle",
    "strip",
    "sword",
    "terminate",
    "toxic",
    "trap",
    "virus",
    "weapon",
    "weed",
    "whack",
    "whip",
    "wreck",
]


def test_alarming_words_of_benign_rows_stay_out_of_the_test_look_alikes() -> None:
    def words(texts: list[str]) -> set[str]:
        return {word for text in texts for word in re.findall("[a-z]+", text.lower())} & set(ALARMING)

    taught = words([row["text"] for row in read("benign") if row["category"] == "alarming_words"])
    asked = words([prompt.text for prompt in load_look_alikes("test")])
    assert len(taught) >= 25
    assert len(asked) >= 10
    assert taught & asked == set()
