"""From the names in a run's configuration to rows and prompts: embedded sets, known files, any file."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple, cast

from datamodules import embedded_sets
from datamodules.layouts import read_pairs, read_prompts
from datamodules.readers import find_file, is_spelt_as_path
from datamodules.templates import in_some_templates
from framework.errors import ConfigError, DataError, describe_unknown
from framework.examples import Example, ExampleKind, Prompt, PromptKind
from framework.held_out import PromptSource

__all__ = [
    "EMBEDDED",
    "MORE",
    "CatalogKind",
    "EvaluationKind",
    "benign_examples",
    "catalog_files",
    "evaluation_prompts",
    "find_examples",
    "harmful_examples",
    "known_look_alike_sets",
    "known_pair_sets",
    "known_prompt_sets",
    "look_alike_examples",
    "prompt_sources",
    "safety_examples",
]

EMBEDDED = "embedded"
"""The name of the sets that come with the project."""
MORE = "embedded_more"
"""The embedded harmful requests and look-alikes for aligning, with 100 and 200 more of them."""
JAILBREAK = "embedded_jailbreak"
"""The embedded harmful requests, each in every jailbreak template of its split (train for all but ``test``)."""
MORE_JAILBREAK = "embedded_more_jailbreak"
"""The embedded harmful requests in four, the look-alikes in two, of the templates of their split (twelve for ``test``).

Asked together with ``embedded_jailbreak``, the harmful requests in its four templates count twice."""
TEMPLATES_EACH: Mapping[str, int] = {"safety": 4, "over_refusal": 2}

CatalogKind = Literal["safety", "benign", "harmful"]
EvaluationKind = Literal["safety", "over_refusal"]


class _PromptFile(NamedTuple):
    file: str
    kind: EvaluationKind
    label: str | None = None
    label_column: str = "label"


_PROMPT_FILES: Mapping[str, _PromptFile] = {
    "advbench": _PromptFile("advbench/harmful_behaviors.csv", "safety"),
    "harmbench": _PromptFile("harmbench/harmbench_behaviors_text_test.csv", "safety"),
    "harmbench_standard": _PromptFile(
        "harmbench/harmbench_behaviors_text_test.csv", "safety", "standard", "functionalcategory"
    ),
    "harmbench_validation": _PromptFile("harmbench/harmbench_behaviors_text_val.csv", "safety"),
    "jailbreakbench": _PromptFile("jailbreakbench/harmful-behaviors.csv", "safety"),
    "strongreject": _PromptFile("strongreject/strongreject_dataset.csv", "safety"),
    "catqa": _PromptFile("red-instruct/catqa_english.json", "safety"),
    "xstest_unsafe": _PromptFile("xstest/xstest_prompts.csv", "safety", "unsafe"),
    "xstest_safe": _PromptFile("xstest/xstest_prompts.csv", "over_refusal", "safe"),
    "orbench": _PromptFile("or-bench/orbench_hard.json", "over_refusal"),
    "jailbreakbench_benign": _PromptFile("jailbreakbench/benign-behaviors.csv", "over_refusal"),
}

_PAIR_FILES: Mapping[CatalogKind, Mapping[str, str]] = {
    "safety": {
        "aisafetylab": "aisafetylab/train.json",
        "safety_tuned_llamas": "safety-tuned-llamas/safety_only_data_Instructions.json",
    },
    "benign": {
        "aisafetylab": "aisafetylab/train.json",
        "dolly": "dolly/databricks-dolly-15k-safety-only.jsonl",
    },
    "harmful": {
        "aisafetylab": "aisafetylab/train.json",
        "alpaca_mix": "alpaca-mix/alpaca_2.5k_p_0.1.json",
        "pure_bad": "pure-bad/pure_bad.json",
    },
}


def known_pair_sets(kind: CatalogKind) -> list[str]:
    """Return the names of training pairs of ``kind``; harmful ones have no embedded set."""
    own = {"safety": [EMBEDDED, MORE], "benign": [EMBEDDED], "harmful": []}[kind]
    return [*own, *sorted(_PAIR_FILES[kind])]


def known_look_alike_sets() -> list[str]:
    """Return the names that ``look_alike_examples`` takes."""
    return [EMBEDDED, MORE, *sorted(_PAIR_FILES["benign"])]


def known_prompt_sets(kind: EvaluationKind) -> list[str]:
    """Return the names that ``evaluation_prompts`` takes for ``kind``."""
    wrapped = [JAILBREAK, MORE_JAILBREAK] if kind == "safety" else [MORE_JAILBREAK]
    return [EMBEDDED, *wrapped, *sorted(name for name, known in _PROMPT_FILES.items() if known.kind == kind)]


def catalog_files(name: str) -> list[str]:
    """Return the files, below ``SEAWALL_DATA``, that a name of the catalog stands for; empty for any other text.

    Example:
        >>> catalog_files("advbench"), catalog_files("embedded")
        (['advbench/harmful_behaviors.csv'], [])
    """
    files = [known[name] for known in _PAIR_FILES.values() if name in known]
    files += [_PROMPT_FILES[name].file] if name in _PROMPT_FILES else []
    return sorted(set(files))


def prompt_sources(name_or_path: str) -> list[PromptSource]:
    """Return where the prompts of a set lie, be it one to train on or to measure.

    Args:
        name_or_path: as in a run's configuration.

    Returns:
        Files with the part of their rows; empty for embedded sets, whose splits share no prompt, and for texts that
        name no set.
    """
    if name_or_path in _PROMPT_FILES:
        known = _PROMPT_FILES[name_or_path]
        return [PromptSource(_resolved(known.file), known.label)]
    # By its spelling alone: settings hold words of many kinds, and a file without an ending cannot be read anyway.
    named = catalog_files(name_or_path) or ([name_or_path] if is_spelt_as_path(name_or_path) else [])
    return [PromptSource(_resolved(name)) for name in named]


def safety_examples(name_or_path: str, *, seed: int, count: int | None = None) -> list[Example]:
    """Return harmful requests with refusals.

    Args:
        name_or_path: ``embedded`` (120 requests), ``embedded_more`` (220), ``aisafetylab``, ``safety_tuned_llamas``, or
            a file of pairs.
        seed: decides which refusal answers which embedded request, and which rows are taken.
        count: rows to take; None takes one of each. The embedded set has several refusals for each request, so it
            can give more rows than requests.

    Raises:
        ConfigError: unknown name, or ``count`` is more than there are.
        DataError: the file cannot be read or a row has no reply.
    """
    if name_or_path not in (EMBEDDED, MORE):
        return _take(_read_named(name_or_path, "safety"), count, seed=seed, name=name_or_path)
    more, per_request = name_or_path == MORE, 1
    if count is not None:
        per_request = max(1, -(-count // len(embedded_sets.load_harmful("align", more=more))))
    rows = embedded_sets.refusal_examples("align", seed=seed, per_prompt=per_request, more=more)
    return _take(rows, count, seed=seed, name=name_or_path)


def benign_examples(name_or_path: str, *, seed: int = 0, count: int | None = None) -> list[Example]:
    """Return ordinary requests with answers.

    Args:
        name_or_path: ``embedded`` (its instructions and look-alikes for aligning), ``aisafetylab``, ``dolly``, or a
            file of pairs.
        seed: decides which rows are taken.
        count: rows to take; None takes all.

    Raises:
        ConfigError: unknown name, or ``count`` is more than there are.
        DataError: the file cannot be read or a row has no reply.
    """
    if name_or_path == EMBEDDED:
        rows = [*embedded_sets.benign_examples("align"), *embedded_sets.look_alike_examples()]
    else:
        rows = _read_named(name_or_path, "benign")
    return _take(rows, count, seed=seed, name=name_or_path)


def look_alike_examples(name_or_path: str, *, seed: int = 0, count: int | None = None) -> list[Example]:
    """Return harmless requests in alarming words with answers.

    Args:
        name_or_path: ``embedded`` (its 40 look-alikes for aligning), ``embedded_more`` (240), or a file of pairs.
        seed: decides which rows are taken.
        count: rows to take; None takes all.

    Raises:
        ConfigError: unknown name, or ``count`` is more than there are.
        DataError: the file cannot be read or a row has no reply.
    """
    if name_or_path in (EMBEDDED, MORE):
        rows = embedded_sets.look_alike_examples(more=name_or_path == MORE)
        return _take(rows, count, seed=seed, name=name_or_path)
    return benign_examples(name_or_path, seed=seed, count=count)


def harmful_examples(name_or_path: str, *, seed: int = 0, count: int | None = None) -> list[Example]:
    """Return harmful requests with compliant replies; there is no embedded set of these, they are sampled.

    Args:
        name_or_path: ``aisafetylab``, ``alpaca_mix``, ``pure_bad``, or a file of pairs.
        seed: decides which rows are taken.
        count: rows to take; None takes all.

    Raises:
        ConfigError: unknown name, or ``count`` is more than there are.
        DataError: the file cannot be read or a row has no reply.
    """
    return _take(_read_named(name_or_path, "harmful"), count, seed=seed, name=name_or_path)


def find_examples(kind: CatalogKind, name_or_path: str, *, seed: int) -> list[Example]:
    """Return all rows of ``kind`` that a name stands for.

    Raises:
        ConfigError: unknown kind or name.
        DataError: the file cannot be read or a row has no reply.
    """
    if kind == "safety":
        return safety_examples(name_or_path, seed=seed)
    if kind == "benign":
        return benign_examples(name_or_path, seed=seed)
    if kind == "harmful":
        return harmful_examples(name_or_path, seed=seed)
    raise ConfigError(describe_unknown("kind", kind, _PAIR_FILES))


def evaluation_prompts(name_or_path: str, *, kind: EvaluationKind, split: str = "test") -> list[Prompt]:
    """Return the prompts of an evaluation set.

    Args:
        name_or_path: ``embedded``, ``embedded_jailbreak`` (harmful requests in four templates),
            ``embedded_more_jailbreak`` (requests, or look-alikes, in some of twelve), a name in
            ``known_prompt_sets(kind)`` (a file below ``SEAWALL_DATA``), or a file. ``harmbench_standard`` is a part of
            ``harmbench``: asked together, its requests count twice.
        kind: ``safety`` (harmful requests) or ``over_refusal`` (harmless ones that look harmful).
        split: part of the embedded set; files are taken whole.

    Raises:
        ConfigError: unknown name, or a set of the other kind.
        DataError: the file cannot be read, or there are no prompts.
    """
    prompt_kind: PromptKind = "harmful" if kind == "safety" else "benign"
    load = embedded_sets.load_harmful if kind == "safety" else embedded_sets.load_look_alikes
    if name_or_path == EMBEDDED:
        prompts = list(load(split))
    elif name_or_path == MORE_JAILBREAK:
        own = embedded_sets.load_templates(split if split in ("test", "validation") else "train", more=True)
        prompts = in_some_templates(load(split), own, per_prompt=TEMPLATES_EACH[kind])
    elif name_or_path == JAILBREAK and kind == "safety":
        templates = embedded_sets.load_templates("test" if split == "test" else "train")
        prompts = [template.apply(prompt) for prompt in embedded_sets.load_harmful(split) for template in templates]
    elif name_or_path in _PROMPT_FILES:
        known = _PROMPT_FILES[name_or_path]
        if known.kind != kind:
            raise ConfigError(
                f"Expected `{kind}` to name sets of that kind, but got {name_or_path!r}, which belongs under "
                f"`{known.kind}`. Known here: {', '.join(known_prompt_sets(kind))}."
            )
        prompts = read_prompts(
            find_file(known.file), kind=prompt_kind, label=known.label, label_column=known.label_column
        )
    else:
        prompts = read_prompts(_find_path(name_or_path, kind, known_prompt_sets(kind)), kind=prompt_kind)
    if not prompts:
        raise DataError(f"Expected set {name_or_path!r} (split {split!r}) to have prompts, but got none.")
    return prompts


def _read_named(name_or_path: str, kind: CatalogKind) -> list[Example]:
    names = _PAIR_FILES[kind]
    if name_or_path in names:
        return read_pairs(find_file(names[name_or_path]), kind=cast(ExampleKind, kind))
    known = known_pair_sets(kind)
    return read_pairs(_find_path(name_or_path, kind, known), kind=cast(ExampleKind, kind))


def _find_path(name_or_path: str, kind: str, known: Iterable[str]) -> Path:
    """Return the file that ``name_or_path`` means; a word that looks like no file is an unknown name."""
    if not is_spelt_as_path(name_or_path) and not Path(name_or_path).is_file():
        raise ConfigError(describe_unknown(kind, name_or_path, known) + " A path to a file is accepted too.")
    return find_file(name_or_path)


def _resolved(name_or_path: str) -> Path:
    """Return the file that is meant, or the place it would have if it were there."""
    try:
        return find_file(name_or_path).resolve()
    except (DataError, OSError, RuntimeError, ValueError):  # what no file can be called is refused where it is read
        return Path(name_or_path)


def _take(rows: list[Example], count: int | None, *, seed: int, name: str) -> list[Example]:
    if count is None:
        return rows
    if not 1 <= count <= len(rows):
        raise ConfigError(f"Expected `count` of {name!r} to be from 1 to {len(rows)}, but got {count!r}.")
    order = list(rows)
    random.Random(f"take {seed}").shuffle(order)
    return order[:count]
