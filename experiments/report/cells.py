"""Numbers as a table shows them: value, interval, count, difference, and what to sort by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.console import format_count, format_seconds

__all__ = ["COLUMNS", "Column", "Line", "Value", "columns_of", "format_p", "percent", "points"]

DASH = "\u2013"
MINUS = "\u2212"
Metric = Mapping[str, Any]


@dataclass(frozen=True)
class Line:
    """A small line below a value."""

    text: str
    tone: str = ""
    """good, bad or nothing."""


@dataclass(frozen=True)
class Value:
    """One cell; without ``main`` it was not measured."""

    main: str = ""
    sort: str = ""
    lines: tuple[Line, ...] = ()
    range: tuple[float, float, float] | None = None
    """Lower bound, value and upper bound in per cent, for the bar."""


@dataclass(frozen=True)
class Column:
    """One quantity."""

    key: str
    title: str
    hint: str
    show: Callable[[Metric], Value]
    higher_is_better: bool | None = None
    is_cost: bool = False
    is_optional: bool = False
    """Left out where nothing has it."""

    @property
    def arrow(self) -> str:
        """Which way is better."""
        return "" if self.higher_is_better is None else ("\u2191" if self.higher_is_better else "\u2193")

    @property
    def arrow_text(self) -> str:
        """The same in words."""
        return "" if self.higher_is_better is None else f"{'higher' if self.higher_is_better else 'lower'} is better"


def columns_of(rows: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> list[Column]:
    """Return the columns that (metrics, cost) pairs have something in; required ones stay."""
    return [
        column
        for column in COLUMNS
        if not column.is_optional or any(column.key in (cost if column.is_cost else metrics) for metrics, cost in rows)
    ]


def percent(share: float) -> str:
    """Return a share in per cent.

    Example:
        >>> percent(0.125)
        '12.5 %'
    """
    return f"{100 * share:.1f} %"


def points(difference: float) -> str:
    """Return a difference of shares in points, with its sign.

    Example:
        >>> points(0.034)
        '+3.4'
    """
    text = f"{100 * difference:+.1f}"
    return text.replace("-", MINUS)


def format_p(p_value: float) -> str:
    """Return a p-value as it is usually given.

    Example:
        >>> [format_p(p) for p in (0.0421, 0.00001, 1.0)]
        ['p 0.042', 'p < 0.001', 'p 1']
    """
    return "p < 0.001" if p_value < 0.001 else f"p {p_value:.2g}"


def _rate(metric: Metric) -> Value:
    value, low, high = metric["value"], metric.get("low"), metric.get("high")
    lines, bounds = [], None
    if low is not None and high is not None:
        lines.append(Line(f"{metric['numerator']:g}/{metric['denominator']:g}; {100 * low:.1f}{DASH}{100 * high:.1f}"))
        bounds = (100 * low, 100 * value, 100 * high)
    if metric.get("seed_low") is not None:
        low, high = max(0.0, metric["seed_low"]), min(1.0, metric["seed_high"])
        lines.append(Line(f"seeds {100 * low:.1f}{DASH}{100 * high:.1f}"))
        bounds = (100 * low, 100 * value, 100 * high)
    if metric.get("difference"):
        lines += _difference(metric["difference"])
    return Value(percent(value), f"{value:.6g}", tuple(lines), bounds)


def _difference(found: Mapping[str, Any]) -> list[Line]:
    """Return the paired difference to the reference; coloured only where it is outside the noise."""
    verdict = found.get("verdict")
    tone = {"better": "good", "worse": "bad"}.get(verdict or "", "")
    p_value = found.get("adjusted_p")
    text = format_p(p_value) if p_value is not None else f"prompts {format_p(found['adjusted_mcnemar_p'])}"
    bounds = f"{points(found['low'])} to {points(found['high'])}"
    return [
        Line(f"{points(found['difference'])} pts ({bounds})", tone),
        Line(f"{text}{f': {verdict}' if verdict else ''}", tone),
    ]


def _mean(metric: Metric) -> Value:
    lines = []
    if metric.get("low") is not None:
        lines.append(Line(f"{metric['low']:.2f}{DASH}{metric['high']:.2f}"))
    if metric.get("seed_low") is not None:
        lines.append(Line(f"seeds {metric['seed_low']:.2f}{DASH}{metric['seed_high']:.2f}".replace("-", MINUS)))
    return Value(f"{metric['value']:.2f}".replace("-", MINUS), f"{metric['value']:.6g}", tuple(lines))


def _seconds(value: Any) -> Value:
    return Value(format_seconds(value), f"{value:.6g}")


def _memory(value: Any) -> Value:
    return Value(f"{value / 1024:.2f} GiB", f"{value:.6g}")


def _count(value: Any) -> Value:
    return Value(format_count(value), f"{value:.6g}")


COLUMNS = (
    Column("attack_success", "attack success", "harmful prompts answered", _rate, False),
    Column("harmful_rate", "harmful rate", "replies a harm judge calls harmful", _rate, False, is_optional=True),
    Column("over_refusal", "over-refusal", "harmless prompts refused", _rate, False),
    Column("task_accuracy", "task accuracy", "right answers on the task", _rate, True, is_optional=True),
    Column("refusal_margin", "refusal margin", "nats; above 0 leans to refusing", _mean, True, is_optional=True),
    Column("benign_nll", "benign NLL", "nats per token of harmless replies", _mean, False, is_optional=True),
    Column(
        "prepare_seconds",
        "preparing",
        "wall time of the last stage before its first step: mining, probing, caches",
        _seconds,
        False,
        is_cost=True,
        is_optional=True,
    ),
    Column("train_seconds", "training", "wall time of the last stage", _seconds, False, is_cost=True, is_optional=True),
    Column(
        "peak_memory_mib", "memory", "peak of training and measuring", _memory, False, is_cost=True, is_optional=True
    ),
    Column(
        "trainable_parameters", "trainable", "parameters that trained", _count, None, is_cost=True, is_optional=True
    ),
)
