"""What a bundle claims of its model, held against its own verdicts and against itself; no model is loaded for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from experiments.measured_runs import ATTACKED, RATES
from experiments.release.attacks import BY_HAND, OWN, prefill_key
from experiments.release.facts import metrics_without
from experiments.release.rates import mean_problem, rate_problem
from framework.errors import DataError, SeawallError

__all__ = ["Claims", "check_claims"]

_NO_MEAN = "agreement/"
"""Their intervals come from a bootstrap, which need not hold the value."""


class Claims(NamedTuple):
    """What was found."""

    wrong: tuple[str, ...]
    """Claims that contradict themselves or the verdicts of the bundle, one sentence each."""
    unchecked: tuple[str, ...]
    """Names of the numbers that nothing in the bundle decides: they are the signer's word."""


def check_claims(facts: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> Claims:
    """Return which claims of a bundle are wrong, and which cannot be checked.

    Rates are counted again from the recorded verdicts, but for those that need the words of replies that are kept as
    hashes, and attacks whose openings are not in the bundle. Value and bounds of every rate must be those of its
    counts: they are what the model card shows.

    Args:
        facts: content of ``release.json``.
        samples: of the bundle.

    Raises:
        DataError: there is nothing to count, or verdicts that are none.
    """
    claimed = facts.get("metrics")
    if not isinstance(claimed, Mapping):
        raise DataError(f"Expected the bundle to claim rates, but got {type(claimed).__name__}.")
    attacks = facts.get("attacks", [])
    if not isinstance(attacks, list) or not all(_is_attack(attack) for attack in attacks):
        raise DataError("Expected the bundle to list attacks with name, budget and rates, but got something else.")
    counted = _count(claimed, samples)
    wrong = []
    for key, metric in claimed.items():
        if key in counted and _counts(metric) != _counts(counted[key]):
            wrong.append(f"The bundle claims {key} {_counts(metric)}, but its verdicts give {_counts(counted[key])}.")
        else:
            wrong.append(_metric_problem(key, metric))
    wrong += [problem for attack in attacks for problem in _attack_problems(attack, claimed)]
    unchecked = [key for key in claimed if key not in counted]
    unchecked += dict.fromkeys(f"attack {attack['name']}" for attack in attacks if attack.get("origin") != OWN)
    return Claims(tuple(filter(None, wrong)), tuple(unchecked))


def _count(claimed: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return those of the claimed rates that the verdicts decide, as they decide them; None for one they do not give.

    Raises:
        DataError: there is nothing to count, or verdicts that are none.
    """
    try:
        opened = {sample["set"] for sample in samples if sample.get("prefill")}
        kept = [sample for sample in samples if sample["set"] in opened or not ATTACKED.fullmatch(sample["set"])]
        counted = metrics_without(claimed, [{"reply": "", **sample} for sample in kept])
    except DataError:
        raise
    except (SeawallError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"Expected the bundle's verdicts to decide its rates, but got: {error!r}.") from error
    skipped = {"keyword_attack_success"} if any("reply" not in sample for sample in kept) else set()
    places = {"", *(sample["set"] for sample in kept)}
    found = {}
    for key in claimed:
        place, _, name = key.rpartition("/")
        if name in RATES and name not in skipped and place in places:
            found[key] = counted.get(key)
    return found


def _counts(rate: Any) -> str:
    return f"{rate.get('numerator')}/{rate.get('denominator')}" if isinstance(rate, Mapping) else "nothing"


def _metric_problem(key: str, metric: Any) -> str:
    """Return a sentence about a metric that contradicts itself; empty if it does not."""
    if not isinstance(metric, Mapping) or key.startswith(_NO_MEAN):
        return ""
    is_rate = "numerator" in metric or key.rpartition("/")[2] in RATES
    problem = rate_problem(metric, is_ours=True) if is_rate else mean_problem(metric)
    return f"The claimed {key} {problem}." if problem else ""


def _is_attack(attack: Any) -> bool:
    return (
        isinstance(attack, Mapping)
        and isinstance(attack.get("name"), str)
        and isinstance(attack.get("budget"), Mapping)
        and isinstance(attack.get("metrics"), Mapping)
        and all(isinstance(rate, Mapping) for rate in attack["metrics"].values())
    )


def _attack_problems(attack: Mapping[str, Any], claimed: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with the rates of an attack, one sentence each."""
    name, origin = attack["name"], attack.get("origin")
    found = []
    for key, rate in attack["metrics"].items():
        # Bundles of earlier versions do not say where their attacks come from.
        problem = rate_problem(rate, is_ours=origin not in (None, BY_HAND))
        if problem:
            found.append(f"The claimed {key} of attack {name} {problem}.")
        own = claimed.get(prefill_key(attack, key))
        if origin == OWN and own != rate:
            found.append(f"The claimed {key} of attack {name} is not the run's own, {_counts(own)}.")
    return found
