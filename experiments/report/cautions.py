"""What a reader of a report should know before believing it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from experiments.alarms import DEGENERATE, study_alarms
from experiments.report.collecting import CollectedRun, Collection
from experiments.report.entries import Entry, Variant, reference_variant
from experiments.report.replies import Reply
from experiments.report.tables import number_of

__all__ = ["Caution", "find_cautions", "idle_methods"]

FEW_PROMPTS = 50
"""Prompts below which the 95 % interval of a rate near one half is wider than 27 points."""
FEW_SEEDS = 3
RATES = ("attack_success", "harmful_rate", "over_refusal", "task_accuracy")
DEGENERATE_RATES = ("degenerate_rate", "benign_degenerate_rate")
_NOT_COUNTERS = ("reports", "largest_term")


class Caution(NamedTuple):
    """One sentence with what it is about."""

    level: Literal["alert", "note"]
    """An alert puts a conclusion in doubt; a note limits it."""
    topic: str
    text: str
    about: tuple[str, ...] = ()
    """Titles of models or names of runs."""


def find_cautions(
    collection: Collection,
    entries: Sequence[Entry],
    variants: Sequence[Variant],
    replies: Mapping[str, Sequence[Reply]],
) -> list[Caution]:
    """Return what limits the report, alerts first.

    Args:
        collection: all runs.
        entries: measured models.
        variants: the models that are compared.
        replies: by entry's id.
    """
    found = [
        *_failed(collection.failed),
        *_judges(collection.runs),
        *_idle(variants),
        *_same_replies(variants, replies),
        *_degenerate(entries),
        *_few_prompts(entries),
        *_cut_data(collection.runs),
        *_few_seeds(variants),
        *_machines(collection.runs),
        *_no_replies(collection.runs),
    ]
    return sorted(found, key=lambda caution: caution.level != "alert")


def idle_methods(run: CollectedRun) -> list[tuple[str, str]]:
    """Return (stage, method) of the methods that counted no effect at all, or whose loss term was always zero."""
    found = []
    for stage in run.results["stages"]:
        effects = stage.get("effects") or {}
        for name in stage.get("methods") or {}:
            if name not in effects or not _acted(effects[name]):
                found.append((str(stage["stage"]), name))
    return found


def _acted(effects: Mapping[str, Any]) -> bool:
    counters = {key: value for key, value in effects.items() if key not in _NOT_COUNTERS}
    if counters.get("loss_calls") and not effects.get("largest_term"):
        return any(value for key, value in counters.items() if key in ("weights_edited", "gradients_edited"))
    return any(counters.values()) or bool(effects.get("largest_term"))


def _failed(runs: Sequence[CollectedRun]) -> Iterator[Caution]:
    for run in runs:
        yield Caution("alert", "Failed run", f"{run.name} has no results: {run.error}", (run.name,))


def _judges(runs: Sequence[CollectedRun]) -> Iterator[Caution]:
    records = [
        {"results": run.results, "model": run.model, "task": run.task, "share": run.share, "seed": run.seed}
        for run in runs
    ]
    for text in study_alarms(records):
        yield Caution("note" if text.endswith("intervals.") else "alert", "Judges disagree", text)


def _idle(variants: Sequence[Variant]) -> Iterator[Caution]:
    for variant in variants:
        idle = {pair for entry in variant.entries for pair in idle_methods(entry.run)}
        for stage, method in sorted(idle):
            text = f"{variant.title}: method `{method}` counted no effect in stage {stage}. It measures something else."
            yield Caution("alert", "No effect", text, (variant.title,))


def _same_replies(variants: Sequence[Variant], replies: Mapping[str, Sequence[Reply]]) -> Iterator[Caution]:
    """Yield variants that reply exactly as the reference does, seed by seed: whatever they did, nothing came of it."""
    for variant in variants:
        reference = reference_variant(variants, variant.cell)
        if reference is None or reference is variant:
            continue
        by_seed = {entry.run.seed: replies.get(entry.id) for entry in reference.entries}
        pairs = [(replies.get(entry.id), by_seed.get(entry.run.seed)) for entry in variant.entries]
        known = [(ours, theirs) for ours, theirs in pairs if ours and theirs]
        if known and all(_texts(ours) == _texts(theirs) for ours, theirs in known):
            text = f"{variant.title} gives exactly the replies of {reference.title} to every prompt."
            yield Caution("alert", "No effect", text, (variant.title,))


def _texts(replies: Sequence[Reply]) -> dict[tuple[str, str], str]:
    return {reply.key: reply.text for reply in replies}


def _degenerate(entries: Sequence[Entry]) -> Iterator[Caution]:
    for key, asked in zip(DEGENERATE_RATES, ("harmful", "harmless"), strict=True):
        rates = {entry.title: entry.metrics.get(key) for entry in entries}
        high = {title: rate for title, rate in rates.items() if rate and rate["value"] >= DEGENERATE}
        if high:
            worst = max(high, key=lambda title: float(high[title]["value"]))
            text = (
                f"{number_of(len(high), 'model')} with {100 * DEGENERATE:.0f} % or more empty, repeated, echoed or "
                f"very short replies to {asked} prompts, {worst} with {100 * high[worst]['value']:.1f} %. Such replies "
                "are neither safe nor useful."
            )
            yield Caution("alert", "Degenerate replies", text, tuple(high))


def _few_prompts(entries: Sequence[Entry]) -> Iterator[Caution]:
    few: dict[str, int] = {}
    for entry in entries:
        for key in RATES:
            count = (entry.metrics.get(key) or {}).get("denominator")
            if count is not None and count < FEW_PROMPTS:
                few[key] = min(int(count), few.get(key, FEW_PROMPTS))
    if few:
        listed = ", ".join(f"{key.replace('_', ' ')} ({count})" for key, count in few.items())
        text = f"Fewer than {FEW_PROMPTS} prompts: {listed}. Only large differences can show; read the intervals."
        yield Caution("alert", "Too few prompts", text)


def _cut_data(runs: Sequence[CollectedRun]) -> Iterator[Caution]:
    cut = {
        run.name: stage["overflow"]["too_long"]
        for run in runs
        for stage in run.results["stages"]
        if (stage.get("overflow") or {}).get("too_long")
    }
    if cut:
        text = f"Training rows longer than the limit in {number_of(len(cut), 'run')}, up to {max(cut.values())} a run."
        yield Caution("note", "Long rows", text, tuple(cut))


def _few_seeds(variants: Sequence[Variant]) -> Iterator[Caution]:
    few = [variant.title for variant in variants if len({entry.run.seed for entry in variant.entries}) < FEW_SEEDS]
    if few and len(variants) > 1:
        text = (
            f"{number_of(len(few), 'variant')} with fewer than {FEW_SEEDS} seeds: no interval over seeds and no winner "
            "for them. A prompt-level test says nothing about another training run."
        )
        yield Caution("note", "Few seeds", text, tuple(few))


def _machines(runs: Sequence[CollectedRun]) -> Iterator[Caution]:
    found = {
        (str(environment.get("cpu")), tuple(environment.get("devices") or ()), environment.get("threads"))
        for environment in (run.results.get("environment") or {} for run in runs)
    }
    if len(found) > 1:
        listed = "; ".join(sorted(" ".join([f"{cpu}, {threads} threads", *devices]) for cpu, devices, threads in found))
        yield Caution("note", "Different machines", f"Seconds and memory do not compare: {listed}.")


def _no_replies(runs: Sequence[CollectedRun]) -> Iterator[Caution]:
    without = tuple(run.name for run in runs if run.samples is None)
    if without:
        text = (
            f"{number_of(len(without), 'run')} without its file of replies: no categories and no transcripts for them."
        )
        yield Caution("note", "No replies", text, without)
