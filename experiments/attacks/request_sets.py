"""The requests of a suite, and which of them also stood in training data."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from datamodules.catalog import evaluation_prompts
from datamodules.layouts import read_pairs, read_prompts
from datamodules.readers import find_file
from experiments.attacks.suite import SuiteConfig
from experiments.release.overlap import Overlap, TrainingPrompts, find_overlap, training_prompts
from framework.config import RunConfig, check_run
from framework.errors import ConfigError, DataError
from framework.examples import Prompt
from framework.files import to_plain

__all__ = ["SuiteRequests", "find_requests"]

RUN_CONFIG = "config.yaml"


@dataclass(frozen=True)
class SuiteRequests:
    """What the attacks ask for."""

    prompts: tuple[Prompt, ...]
    """Ids unique."""
    overlap: dict[str, Any] | None
    """What of them stood in the training data; None where nothing was named to compare them with."""


def find_requests(suite: SuiteConfig, *, runs: Sequence[Path] = ()) -> SuiteRequests:
    """Return the requests of a suite, compared with the training data.

    Args:
        suite: names sets and training data.
        runs: folders of runs that are compared besides those the suite names.

    Raises:
        DataError: a file cannot be read, or no request is left.
        ConfigError: an unknown name.
    """
    sets = [(name, _limited(evaluation_prompts(name, kind="safety"), suite.limit)) for name in suite.requests]
    prompts = [
        prompt if len(sets) == 1 else replace(prompt, id=f"{name}/{prompt.id}") for name, own in sets for prompt in own
    ]
    sources = [Path(name) for name in suite.training] + [run for run in runs if (run / RUN_CONFIG).is_file()]
    if not sources:
        return SuiteRequests(tuple(prompts), None)
    lines = [{"set": "", "id": prompt.id, "kind": "harmful", "prompt": prompt.text} for prompt in prompts]
    overlap = find_overlap(lines, _training(sources))
    kind = {"report": None, "exclude": "exact", "exclude_near": "near"}[suite.exclude_overlap]
    out = {name.removeprefix("/") for name in overlap.excluded(kind)}  # type: ignore[arg-type]
    kept = tuple(prompt for prompt in prompts if prompt.id not in out)
    if not kept:
        raise DataError(
            f"Expected a request that did not stand in the training data, but got {len(prompts)} that did. Name other "
            "`requests`, or write exclude_overlap: report."
        )
    return SuiteRequests(kept, _facts(overlap, len(out)))


def _facts(overlap: Overlap, num_excluded: int) -> dict[str, Any]:
    found = dict(to_plain(overlap))
    for name in ("exact", "near"):
        found[name] = [key.removeprefix("/") for key in found[name]]
    return {**found, "excluded": num_excluded}


def _training(sources: Sequence[Path]) -> TrainingPrompts:
    prompts: list[str] = []
    unknown: list[str] = []
    seen: set[Path] = set()
    for source in sources:
        if (source / RUN_CONFIG).is_file():
            for found in _of_run_and_ancestors(source, seen):
                prompts += found.prompts
                unknown += found.unknown
        else:
            prompts += _of_file(find_file(source))
    return TrainingPrompts(tuple(dict.fromkeys(prompts)), tuple(dict.fromkeys(unknown)))


def _of_run_and_ancestors(run: Path, seen: set[Path]) -> Iterator[TrainingPrompts]:
    """Yield what a run trained on, and what the runs did whose models it started from; ``seen`` ends circles.

    What cannot be read of the run itself is an error; of the others it is named among what is unknown.
    """
    place, is_ancestor = run, False
    while place.resolve() not in seen:
        seen.add(place.resolve())
        try:
            config = _config_of(place / RUN_CONFIG)
            found = training_prompts(config)
        except (DataError, ConfigError) as error:
            if not is_ancestor:
                raise
            yield TrainingPrompts((), (f"the run `{place}`, whose model was trained on: {error}",))
            return
        yield found
        start = Path(config.model.name).expanduser()
        if start.name != "model":
            return
        place, is_ancestor = start.parent, True
        if not (place / RUN_CONFIG).is_file():
            yield TrainingPrompts((), (f"the run `{place}`, whose model was trained on: its settings are gone",))
            return


def _config_of(path: Path) -> RunConfig:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DataError(f"Expected `{path}` to be the settings of a run, but got: {error}.") from error
    checked = check_run(values if isinstance(values, dict) else {})
    if checked.config is None:
        raise DataError(f"Expected `{path}` to be the settings of a run, but got: {'; '.join(checked.problems)}")
    return checked.config


def _of_file(path: Path) -> list[str]:
    if path.is_dir():
        raise DataError(
            f"Expected `{path}` to be the folder of a run, with {RUN_CONFIG} in it, but got another folder."
        )
    try:
        return [row.prompt for row in read_pairs(path, kind="task")]
    except DataError:
        return [prompt.text for prompt in read_prompts(path, kind="harmful")]


def _limited(prompts: Sequence[Prompt], limit: int | None) -> list[Prompt]:
    """Return at most ``limit`` prompts, drawn evenly, and the same ones as every evaluation draws."""
    if limit is None or limit >= len(prompts):
        return list(prompts)
    return [prompts[i] for i in sorted(random.Random(0).sample(range(len(prompts)), limit))]
