"""W&B sweep files, read as they are: checked against W&B's own schema, and what Seawall needs taken from them.

The recipe that is swept stands in the file's ``command``: ``[${env}, seawall, run, RECIPE, ${args}]``.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from experiments.sweep_space import Parameter, read_parameters
from framework.config import find_config
from framework.errors import ConfigError

__all__ = ["METHOD", "SweepFile", "SweepGoal", "agent_lines", "grid_points", "load_sweep", "schema_problems"]

SCHEMA_FILE = Path(__file__).parent / "wandb_sweep_schema.json"
METHOD = "method"
"""The parameter that names the method; each of its values gets a budget of its own."""
OTHERS = "methods."
RUN = "run"
Sampler = Literal["grid", "random", "tpe"]
SAMPLERS: dict[str, Sampler] = {"grid": "grid", "random": "random", "bayes": "tpe", "custom": "tpe"}


@dataclass(frozen=True)
class SweepGoal:
    """One number to make small or large."""

    name: str
    """Key of the run's summary, such as ``eval/attack_success``; the prefix ``eval/`` may be left out."""
    goal: Literal["minimize", "maximize"] = "minimize"
    """As W&B spells it."""


@dataclass(frozen=True)
class SweepFile:
    """A sweep."""

    name: str
    path: Path
    recipe: str
    sampler: Sampler
    goals: tuple[SweepGoal, ...]
    parameters: tuple[Parameter, ...]
    run_cap: int | None = None
    """Runs over all methods together."""
    early_terminate: Mapping[str, Any] = field(default_factory=dict)

    @property
    def methods(self) -> tuple[str, ...]:
        """Methods that are swept beside each other; empty when the recipe's own are."""
        found = next((item.choices for item in self.parameters if item.key == METHOD), None)
        return tuple(str(value) for value in found or ())

    def of_method(self, method: str | None) -> tuple[Parameter, ...]:
        """Return the parameters that matter for one method: its own and those that belong to none."""
        if method is None:
            return self.parameters
        return tuple(
            item
            for item in self.parameters
            if item.key != METHOD and (not item.key.startswith(OTHERS) or item.key.startswith(f"{OTHERS}{method}."))
        )


def load_sweep(name: str | Path, *, recipe: str | None = None, goals: Sequence[SweepGoal] = ()) -> SweepFile:
    """Return a sweep from a W&B sweep file.

    Args:
        name: a YAML file, or the name of one that comes with the project.
        recipe: what is run; None takes the file's ``command``.
        goals: replace the file's ``metric``.

    Raises:
        ConfigError: no such file, not valid by W&B's schema, or without recipe or metric; every problem is listed.
    """
    path = find_config(name, kind="sweep")
    raw = _read(path)
    problems = schema_problems(raw)
    if problems:
        raise ConfigError([f"{path.name}: {text}" for text in problems])
    found = recipe or _recipe(raw)
    metrics = raw.get("metrics") or ([raw["metric"]] if "metric" in raw else [])
    wanted = tuple(goals) or tuple(SweepGoal(item["name"], item.get("goal", "minimize")) for item in metrics)
    if found is None:
        problems.append(
            f"Expected `command` of {path.name} to hold `seawall run RECIPE`, but got {raw.get('command')!r}. Add it, "
            "or give --recipe."
        )
    if not wanted:
        problems.append(f"Expected {path.name} to name a `metric`, but it has none. Add one, or give --objective.")
    if not raw.get("parameters"):
        problems.append(f"Expected {path.name} to have `parameters`, but it has none.")
    if problems:
        raise ConfigError(problems)
    sweep = SweepFile(
        name=_folder_name(raw.get("name") or path.stem),
        path=path,
        recipe=str(found),
        sampler=SAMPLERS[raw["method"]],
        goals=wanted,
        parameters=tuple(read_parameters(raw["parameters"])),
        run_cap=raw.get("run_cap"),
        early_terminate=raw.get("early_terminate") or {},
    )
    if any(item.key == METHOD and item.choices is None for item in sweep.parameters):
        raise ConfigError(f"Expected `{METHOD}` to have `values` without probabilities, but got something else.")
    return sweep


def schema_problems(raw: Any) -> list[str]:
    """Return what is wrong with a sweep file by W&B's schema, one sentence each; empty when nothing is."""
    from jsonschema import Draft7Validator

    validator = Draft7Validator(json.loads(SCHEMA_FILE.read_text(encoding="utf-8")))
    found = []
    for error in sorted(validator.iter_errors(raw), key=lambda error: [str(part) for part in error.absolute_path]):
        where = ".".join(str(part) for part in error.absolute_path) or "the file"
        if error.validator == "anyOf":
            shown = json.dumps(error.instance, default=str)
            found.append(f"Expected `{where}` to be a parameter as W&B describes them, but got {shown}.")
        else:
            found.append(f"Expected `{where}` to follow W&B's schema, but got: {error.message}.")
    return found


def grid_points(parameters: Sequence[Parameter]) -> list[dict[str, Any]]:
    """Return every combination of the parameters' values.

    Raises:
        ConfigError: a parameter with infinitely many values; all such are listed.
    """
    endless = [item.key for item in parameters if item.choices is None]
    if endless:
        raise ConfigError(
            f"Expected every parameter of a grid to have finitely many values, but got {', '.join(endless)}. Use "
            "`values`, or another sampler."
        )
    keys = [item.key for item in parameters]
    return [
        dict(zip(keys, point, strict=True)) for point in itertools.product(*(item.choices or () for item in parameters))
    ]


def agent_lines(sweep: SweepFile) -> list[str]:
    """Return the commands that run the same file with W&B's own agents."""
    example = " ".join(f"--{item.key}={_example(item)}" for item in sweep.parameters)
    return [
        f"wandb sweep {sweep.path}",
        "wandb agent ENTITY/PROJECT/SWEEP_ID",
        f"# each run of the agent: seawall run {sweep.recipe} {example}",
    ]


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"Expected `{path}` to be YAML, but got: {str(error).splitlines()[0]}.") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"Expected `{path}` to hold a W&B sweep, but got {type(raw).__name__}.")
    return raw


def _recipe(raw: Mapping[str, Any]) -> str | None:
    command = [str(part) for part in raw.get("command", [])]
    if RUN not in command or command.index(RUN) + 1 >= len(command):
        return None
    found = command[command.index(RUN) + 1]
    return None if found.startswith(("$", "-")) else found


def _folder_name(text: str) -> str:
    kept = "".join(sign if sign.isalnum() or sign in "._-" else "-" for sign in text.strip()).strip("-.")
    return kept or "sweep"


def _example(item: Parameter) -> str:
    if item.choices is None:
        return "NUMBER"
    value = item.choices[0]
    return f"{value:g}" if isinstance(value, float) and math.isfinite(value) else str(value)
