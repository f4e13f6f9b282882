"""The prompts that are mined: requests of several sets in equal parts, bare or in jailbreak templates."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from datamodules.catalog import EMBEDDED, EvaluationKind, evaluation_prompts, find_examples, known_prompt_sets
from datamodules.embedded_sets import (
    JailbreakTemplate,
    load_benign,
    load_harmful,
    load_look_alikes,
    load_templates,
    look_alike_examples,
)
from datamodules.templates import find_templates
from framework.errors import ConfigError, DataError
from framework.examples import Prompt, PromptKind
from framework.mining_settings import MiningSettings

__all__ = ["benign_pool", "deal_prompts", "harmful_pool", "mining_pools", "probe_prompts"]

TRAIN = "train"
"""Templates used for training; those of the other splits are held out."""
T = TypeVar("T")


def mining_pools(settings: MiningSettings, *, has_benign: bool = True) -> dict[str, list[Prompt]]:
    """Return the prompts of each side that mining with ``settings`` samples; opens every file they come from.

    Args:
        settings: what is mined.
        has_benign: False leaves the harmless prompts out.

    Raises:
        ConfigError: an unknown name, a set held out to measure with, the sets give fewer prompts, or a file cannot be
            read; lists every problem.
    """
    problems: list[str] = []
    # Stand-ins where they cannot be found, so that what else is wrong is found as well; then nothing is returned.
    templates = _collecting(problems, lambda: find_templates(settings.templates)) or load_templates(TRAIN)
    own: dict[str, Any] = {"seed": settings.mining_seed, "templates": templates}
    pools = {
        "harmful": _collecting(
            problems,
            lambda: harmful_pool(settings.harmful, count=settings.prompts, wrapped=settings.wrapped, **own),
        )
    }
    if has_benign:
        count, wrapped = settings.benign_prompts, settings.benign_wrapped
        pools["benign"] = _collecting(
            problems, lambda: benign_pool(settings.benign, count=count, wrapped=wrapped, **own)
        )
    if problems:
        raise ConfigError(problems)
    return pools


def harmful_pool(
    names: Sequence[str],
    *,
    count: int,
    wrapped: float,
    seed: int,
    templates: Sequence[JailbreakTemplate] | None = None,
) -> list[Prompt]:
    """Return ``count`` harmful prompts, each set giving as many.

    Args:
        names: ``embedded`` (the align split), ``embedded_more``, ``embedded_poison``, known sets of harmful prompts, or
            files.
        count: prompts in all; a request may come in several templates.
        wrapped: share of them in a template.
        seed: decides which.
        templates: to choose from; None takes the eight embedded ones for training.

    Raises:
        ConfigError: unknown name, a set held out to measure with, or the sets give fewer prompts.
        DataError: a file cannot be read.
    """
    sets = [_harmful_set(name) for name in names]
    templates = load_templates(TRAIN) if templates is None else templates
    return deal_prompts(sets, templates, count=count, wrapped=wrapped, seed=seed, name="prompts")


def benign_pool(
    names: Sequence[str],
    *,
    count: int,
    wrapped: float,
    seed: int,
    templates: Sequence[JailbreakTemplate] | None = None,
) -> list[Prompt]:
    """Return ``count`` harmless prompts, each set giving as many; arguments and errors as ``harmful_pool``.

    Args:
        names: ``embedded`` (ordinary instructions), ``embedded_look_alikes``, ``embedded_more`` (240 look-alikes),
            known sets, or files.
        count: prompts in all.
        wrapped: share of them in a template.
        seed: decides which.
        templates: as for ``harmful_pool``.
    """
    templates = load_templates(TRAIN) if templates is None else templates
    sets = [_benign_set(name, seed=seed) for name in names]
    return deal_prompts(sets, templates, count=count, wrapped=wrapped, seed=seed, name="benign_prompts")


def probe_prompts(count: int, *, kind: PromptKind) -> list[Prompt]:
    """Return prompts of the validation splits, in turn bare and in a training template: what a controller looks at.

    Args:
        count: at most so many of them.
        kind: harmful requests, or harmless look-alikes for ``benign``.
    """
    prompts = load_harmful("validation") if kind == "harmful" else load_look_alikes("validation")
    order = list(prompts)
    random.Random(f"probe {kind}").shuffle(order)
    templates = load_templates(TRAIN)
    mixed = [templates[i // 2 % len(templates)].apply(p) if i % 2 else p for i, p in enumerate(order)]
    return mixed[:count]


def deal_prompts(
    sets: Sequence[Sequence[Prompt]],
    templates: Sequence[JailbreakTemplate],
    *,
    count: int,
    wrapped: float,
    seed: int,
    name: str,
) -> list[Prompt]:
    """Return ``count`` prompts, every set giving as many; what one set lacks the others make up for.

    A request comes in a second template only when every request of its set has come in a first one.

    Args:
        sets: prompts of each set.
        templates: what requests are wrapped in.
        count: prompts in all.
        wrapped: share of the prompts of a set that stand in a template.
        seed: decides order and templates.
        name: of the setting, for the error.

    Raises:
        ConfigError: there are fewer prompts than asked for.
    """
    variants = [_variants(own, templates, wrapped=wrapped, seed=seed) for own in sets]
    found: dict[tuple[str, str], Prompt] = {}  # one request may stand in two sets
    turn = 0
    while len(found) < count and any(turn < len(own) for own in variants):
        found |= {(own[turn].id, own[turn].text): own[turn] for own in variants if turn < len(own)}
        turn += 1
    unique = list(found.values())[:count]
    if len(unique) < count:
        raise ConfigError(
            f"Expected `{name}` to be at most {len(unique)}, which is how many these sets give in {len(templates)} "
            f"templates, but got {count}. Name more sets, or lower it."
        )
    ids = [prompt.id for prompt in unique]
    double = next((i for i in ids if ids.count(i) > 1), None)
    if double is not None:
        raise ConfigError(f"Expected the prompts of all sets to have ids of their own, but got {double!r} twice.")
    return unique


def _variants(
    prompts: Sequence[Prompt], templates: Sequence[JailbreakTemplate], *, wrapped: float, seed: int
) -> list[Prompt]:
    """Return a set's prompts in the order they are dealt, bare ones and wrapped ones in even mixture."""
    order = list(prompts)
    random.Random(f"pool {seed}").shuffle(order)
    shift = random.Random(f"templates {seed}").randrange(len(templates))
    in_templates = [
        templates[(shift + turn + i) % len(templates)].apply(prompt)
        for turn in range(len(templates))
        for i, prompt in enumerate(order)
    ]
    # The bare ones begin where the wrapped ones end, so that a request does not come twice at once.
    half = len(order) // 2
    bare = order[half:] + order[:half]
    found: list[Prompt] = []
    taken = {True: 0, False: 0}
    while True:
        place = len(found)
        is_wrapped = int((place + 1) * wrapped) > int(place * wrapped)
        own = in_templates if is_wrapped else bare
        if taken[is_wrapped] == len(own):
            return found
        found.append(own[taken[is_wrapped]])
        taken[is_wrapped] += 1


def _harmful_set(name: str) -> list[Prompt]:
    splits = {"embedded": "align", "embedded_poison": "poison"}
    if name in splits:
        return list(load_harmful(splits[name]))
    if name == "embedded_more":
        return load_harmful("align", more=True)
    _check_not_held_out(name, kind="safety", setting="harmful", share="wrapped")
    return _without_measured(evaluation_prompts(name, kind="safety"), load_harmful("test"), name, setting="harmful")


def _benign_set(name: str, *, seed: int) -> list[Prompt]:
    if name == "embedded":
        return list(load_benign("align"))
    if name == "embedded_look_alikes":
        return list(load_look_alikes("align"))
    if name == "embedded_more":
        return [Prompt(row.id, row.prompt, "benign", row.category) for row in look_alike_examples(more=True)]
    _check_not_held_out(name, kind="over_refusal", setting="benign", share="benign_wrapped")
    if name in known_prompt_sets("over_refusal"):
        found = evaluation_prompts(name, kind="over_refusal")
    else:
        rows = find_examples("benign", name, seed=seed)
        found = [Prompt(row.id, row.prompt, "benign", row.category) for row in rows]
    return _without_measured(found, load_look_alikes("test"), name, setting="benign")


def _check_not_held_out(name: str, *, kind: EvaluationKind, setting: str, share: str) -> None:
    if name in known_prompt_sets(kind) and name.startswith(EMBEDDED):
        raise ConfigError(
            f"Expected `{setting}` to name sets to train on, but got {name!r}, whose prompts are held out for "
            f"measuring. Name `embedded`; `{share}` puts its prompts in the templates of the training split."
        )


def _without_measured(found: list[Prompt], measured: list[Prompt], name: str, *, setting: str) -> list[Prompt]:
    """Return the prompts of a file, none of which is held out: the project's own files hold every split."""
    texts = {prompt.text for prompt in measured}
    same = sum(prompt.text in texts for prompt in found)
    if same:
        raise ConfigError(
            f"Expected `{setting}` to name sets to train on, but got {name!r} with {same} prompts that are held out "
            "for measuring. Take them out of the file, or name the embedded set."
        )
    return found


def _collecting(problems: list[str], find: Callable[[], list[T]]) -> list[T]:
    """Return what is found; where it cannot be, note what is wrong and return nothing."""
    try:
        return find()
    except ConfigError as error:
        problems += error.problems
    except DataError as error:
        problems.append(str(error))
    return []
