"""The suite file: which attacks, on which requests, judged by whom, at which length of replies."""

# ruff: noqa: RUF009 - `setting` is dataclasses.field with a rule, which ruff does not know.

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from experiments.attacks.attacker_search import SearchConfig, space_problems
from experiments.attacks.interface import Attack
from experiments.attacks.registry import create_attack, known_attacks, validate_attack
from framework.config import override_raw, parse_overrides, read_config
from framework.endpoint_settings import EndpointSettings
from framework.errors import ConfigError, describe_unknown
from framework.evaluation.guards import check_guard_name, is_guard_name
from framework.evaluation.judges import known_judges
from framework.fields import (
    COUNT,
    COUNT_OR_ZERO,
    NOT_EMPTY,
    SHARE,
    build_instance,
    check_instance,
    check_mapping,
    setting,
)
from framework.schema import FOLDER_NAME

__all__ = ["NamedAttack", "SuiteConfig", "TargetConfig", "UtilityConfig", "load_suite"]

KIND = "attack"
_LABEL = re.compile(r"[A-Za-z0-9][\w-]*")


class _Checked:
    """Checks its fields when it is built."""

    def __post_init__(self) -> None:
        """Raise ConfigError listing every field that has the wrong type or breaks its rule."""
        check_instance(self)


@dataclass(frozen=True)
class UtilityConfig(_Checked):
    """What is measured of every attacked model besides its replies to harmful requests."""

    benign_nll: bool = True
    """Mean negative log-likelihood of benign replies, nats per token."""
    task: str | None = None
    """Registered task whose test prompts are answered."""
    task_path: str | None = None
    """Local file or folder of the task's rows."""
    task_count: int | None = setting(None, rule=COUNT)
    """Prompts of the task; null takes all."""
    multiple_choice: list[str] = setting(factory=list)
    """Multiple-choice files or folders (MMLU and BBH layouts)."""


@dataclass(frozen=True)
class TargetConfig(_Checked):
    """What the attacker knows of the model, and how it is run."""

    base: str | None = None
    """The unaligned model of the same shapes, for attacks that need one."""
    adapter: str | None = None
    """The adapter that made the model, if it is apart."""
    before_adapter: str | None = None
    """The model the adapter was trained on."""
    system: str | None = None
    """System message; null leaves the chat template's own."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"] = "auto"
    threads: int | None = setting(None, rule=COUNT)
    """CPU threads; null takes every core."""
    trust_remote_code: bool = False


@dataclass(frozen=True)
class SuiteConfig(_Checked):
    """Attacks that are run one after another on one model."""

    name: str = setting(rule=FOLDER_NAME)
    attacks: dict[str, dict[str, Any]] = setting(rule=NOT_EMPTY)
    """Label to ``attack: NAME`` and the attack's settings; a label that is an attack's name may leave it out. With
    ``search: {trials, space}`` the settings are searched for on a part of the requests."""
    requests: list[str] = setting(factory=lambda: ["embedded"], rule=NOT_EMPTY)
    """Harmful prompt sets: ``embedded``, registered names or files."""
    limit: int | None = setting(None, rule=COUNT)
    """Most requests of any one set; null takes all."""
    training: list[str] = setting(factory=list)
    """Folders of runs and files of training data with which the requests are compared."""
    exclude_overlap: Literal["report", "exclude", "exclude_near"] = "report"
    """What happens to requests that stood in the training data: reported; left out where the words are the same; left
    out also where most of the words are."""
    judges: list[str] = setting(factory=lambda: ["rules"], rule=NOT_EMPTY)
    """Judges of the replies, by registered name; the first that knows decides."""
    max_new_tokens: int = setting(256, rule=COUNT)
    """Longest reply, in tokens."""
    batch_size: int = setting(32, rule=COUNT)
    """Queries answered at once."""
    seed: int = setting(0, rule=COUNT_OR_ZERO)
    utility: UtilityConfig = setting(factory=UtilityConfig)
    utility_floor: float = setting(0.9, rule=SHARE)
    """Attacked models that keep less than this share of the unattacked model's utility do not count as broken open."""
    target: TargetConfig = setting(factory=TargetConfig)
    endpoint: EndpointSettings = setting(factory=EndpointSettings)
    """How the model is asked where its name is the address of an endpoint."""
    output: str = setting("attacks", rule=NOT_EMPTY)
    """Folder that gets a folder named after the suite, with one for each model."""


@dataclass(frozen=True)
class NamedAttack:
    """An attack of a suite."""

    label: str
    attack: Attack
    settings: Mapping[str, Any]
    """As the suite gives them."""
    search: SearchConfig | None = None
    """How better settings are searched for; None takes these."""


def load_suite(name: str | Path, overrides: Sequence[str] = ()) -> tuple[SuiteConfig, list[NamedAttack]]:
    """Return a suite and its attacks, ready to run.

    Args:
        name: a YAML file, or the name of a suite that comes with the project.
        overrides: ``key=value`` texts; ``attacks.LABEL=null`` leaves an attack out.

    Raises:
        ConfigError: the file is missing or no YAML, or settings are wrong; every problem is listed, those of all
            attacks included.
    """
    values = override_raw(read_config(name, kind=KIND), parse_overrides(overrides))
    if isinstance(values.get("attacks"), dict):
        values["attacks"] = {label: given for label, given in values["attacks"].items() if given is not None}
    problems = [problem.text for problem in check_mapping(SuiteConfig, values)]
    given = values.get("attacks")
    attacks = {k: v for k, v in given.items() if isinstance(v, dict)} if isinstance(given, dict) else {}
    for label, entry in attacks.items():
        problems += _attack_problems(label, entry)
    judges = values.get("judges")
    problems += _judge_problems([name for name in judges if isinstance(name, str)] if isinstance(judges, list) else [])
    if problems:
        raise ConfigError(problems)
    suite = build_instance(SuiteConfig, values)
    return suite, [_create(label, entry) for label, entry in suite.attacks.items()]


def _attack_problems(label: str, entry: Mapping[str, Any]) -> list[str]:
    path = f"attacks.{label}"
    if _LABEL.fullmatch(label) is None:
        return [f"Expected every label of `attacks` to be letters, digits, `-` and `_`, but got {label!r}."]
    name, settings = _split(label, entry)
    if not isinstance(name, str):
        return [f"Expected `{path}.attack` to be the name of an attack, but got {name!r}."]
    return [*validate_attack(name, settings, path=path), *_search_problems(name, entry.get("search"), f"{path}.search")]


def _create(label: str, entry: Mapping[str, Any]) -> NamedAttack:
    name, settings = _split(label, entry)
    search = None if entry.get("search") is None else build_instance(SearchConfig, entry["search"])
    return NamedAttack(label, create_attack(str(name), settings, path=f"attacks.{label}"), settings, search)


def _split(label: str, entry: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    settings = {key: value for key, value in entry.items() if key not in ("attack", "search")}
    return entry.get("attack", label), settings


def _search_problems(name: str, search: Any, path: str) -> list[str]:
    if search is None:
        return []
    problems = [problem.text for problem in check_mapping(SearchConfig, search, path=path)]
    entry = known_attacks().get(name)
    if problems or entry is None:
        return problems
    fields = [field.name for field in dataclasses.fields(entry.config_class)]
    unknown = [key for key in search["space"] if key.split(".")[0] not in fields]
    problems += [describe_unknown(f"{path}.space.<setting>", key, fields) for key in unknown]
    return problems + [f"{path}: {problem}" for problem in space_problems(search["space"])]


def _judge_problems(names: Sequence[str]) -> list[str]:
    problems = []
    for name in names:
        if is_guard_name(name):
            problems += check_guard_name(name)
        elif name not in known_judges():
            problems.append(describe_unknown("judges", name, known_judges()) + " guard:FORMAT:MODEL works too.")
    return problems
