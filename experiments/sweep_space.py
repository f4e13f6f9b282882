"""The parameters of a W&B sweep file as Optuna's search space: every distribution W&B has, with its meaning there.

Names follow W&B's documentation: ``log_uniform`` takes exponents of e, ``log_uniform_values`` the values themselves,
the ``q_`` variants round to multiples of ``q``, the ``inv_`` ones are uniform in log(1/x). Where Optuna has no such
distribution, a number between 0 and 1 is drawn and put through the inverse distribution function.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from scipy import stats

from framework.errors import ConfigError

__all__ = ["Parameter", "read_parameters"]

Suggest = Callable[[Any, str], Any]
"""(trial, key) -> value"""
EDGE = 1e-9
"""Keeps the inverse distribution function away from its infinite ends."""


class Parameter(NamedTuple):
    """One parameter of a sweep."""

    key: str
    """Dotted, as on the command line of ``seawall run``."""
    suggest: Suggest
    choices: tuple[Any, ...] | None = None
    """Every value it can take; None where there are infinitely many."""
    is_constant: bool = False
    spec: Mapping[str, Any] = {}
    """As the file has it."""


def read_parameters(raw: Mapping[str, Any]) -> list[Parameter]:
    """Return the parameters of a sweep file, nested ones with dotted keys.

    Args:
        raw: the ``parameters`` section, valid by W&B's schema.

    Raises:
        ConfigError: bounds that leave nothing, or parts that do not fit together; every problem is listed.
    """
    found: list[Parameter] = []
    problems: list[str] = []
    for key, spec in _flat(raw):
        try:
            found.append(_parameter(key, spec)._replace(spec=spec))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return found


def _flat(raw: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Mapping[str, Any]]]:
    found: list[tuple[str, Mapping[str, Any]]] = []
    for name, spec in raw.items():
        key = f"{prefix}{name}"
        found += _flat(spec["parameters"], f"{key}.") if "parameters" in spec else [(key, spec)]
    return found


def _parameter(key: str, spec: Mapping[str, Any]) -> Parameter:
    if "value" in spec:
        value = spec["value"]
        return Parameter(key, lambda trial, name: value, (value,), is_constant=True)
    if "values" in spec:
        return _categorical(key, spec)
    kind = spec.get("distribution") or _implied(spec)
    if kind in ("int_uniform", "uniform", "q_uniform") or "log_uniform" in kind:
        return _bounded(key, kind, spec)
    return _inverse(key, kind, spec)


def _categorical(key: str, spec: Mapping[str, Any]) -> Parameter:
    values = list(spec["values"])
    weights = spec.get("probabilities")
    if weights is None:
        scalars = all(value is None or isinstance(value, (bool, int, float, str)) for value in values)
        texts = values if scalars else [json.dumps(value) for value in values]
        return Parameter(
            key, lambda trial, name: values[texts.index(trial.suggest_categorical(name, texts))], tuple(values)
        )
    if len(weights) != len(values) or not math.isclose(sum(weights), 1.0, abs_tol=1e-6):
        raise ConfigError(f"Expected `{key}.probabilities` to be one per value with the sum 1, but got {weights!r}.")
    ends = [sum(weights[: number + 1]) for number in range(len(weights))]

    def pick(trial: Any, name: str) -> Any:
        drawn = trial.suggest_float(f"{name}~", 0.0, 1.0)
        return next((value for value, end in zip(values, ends, strict=True) if drawn <= end), values[-1])

    return Parameter(key, pick)


def _implied(spec: Mapping[str, Any]) -> str:
    """Return the distribution of bounds alone: whole numbers if both are, as W&B has it."""
    return "int_uniform" if all(isinstance(spec[end], int) for end in ("min", "max")) else "uniform"


def _bounded(key: str, kind: str, spec: Mapping[str, Any]) -> Parameter:
    low, high, step = spec["min"], spec["max"], spec.get("q", 1)
    if kind.startswith("inv_log") and not kind.endswith("values"):
        low, high = math.exp(-high), math.exp(-low)
    elif "log_uniform" in kind and not kind.endswith("values"):
        low, high = math.exp(low), math.exp(high)
    if not low <= high or ("log" in kind and low <= 0):
        rule = "`min` <= `max`" + (", both above 0" if "log" in kind else "")
        raise ConfigError(f"Expected `{key}` to have {rule}, but got {spec['min']!r} and {spec['max']!r}.")
    if kind == "int_uniform":
        return Parameter(key, lambda trial, name: trial.suggest_int(name, low, high), tuple(range(low, high + 1)))
    is_log, is_stepped = "log" in kind, kind.startswith("q_")

    def suggest(trial: Any, name: str) -> float:
        drawn = float(trial.suggest_float(name, low, high, log=is_log))
        return _rounded(drawn, step) if is_stepped else drawn

    count = round((high - low) / step) + 1 if kind == "q_uniform" else 0
    return Parameter(key, suggest, tuple(_rounded(low + i * step, step) for i in range(count)) or None)


def _inverse(key: str, kind: str, spec: Mapping[str, Any]) -> Parameter:
    plain = kind.removeprefix("q_")
    mean, spread = spec.get("mu", 0.0), spec.get("sigma", 1.0)
    if plain == "normal":
        frozen = stats.norm(mean, spread)
    elif plain == "log_normal":
        frozen = stats.lognorm(spread, scale=math.exp(mean))
    elif plain == "beta":
        frozen = stats.beta(spec["a"], spec["b"])
    else:
        raise ConfigError(f"Expected `{key}.distribution` to be one of W&B's, but got {kind!r}.")

    def suggest(trial: Any, name: str) -> float:
        drawn = float(frozen.ppf(trial.suggest_float(f"{name}~", EDGE, 1 - EDGE)))
        return _rounded(drawn, spec.get("q", 1)) if kind.startswith("q_") else drawn

    return Parameter(key, suggest)


def _rounded(value: float, step: float) -> float:
    return round(value / step) * step
