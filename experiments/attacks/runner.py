"""``seawall attack``: the attacks of a suite on one model, one after another, and what they leave behind."""

from __future__ import annotations

import gc
import shutil
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments.attacks.attack_files import RESULTS_FILE
from experiments.attacks.attack_keys import request_keys
from experiments.attacks.attacked_models import MeasuredModel, check_utility
from experiments.attacks.carrying_out import FinishedAttack, Stage, carry_out, equip, find_finished
from experiments.attacks.estimate import Plan, find_speed, keep_speed, plan_attacks
from experiments.attacks.interface import PromptAttack
from experiments.attacks.request_sets import SuiteRequests, find_requests
from experiments.attacks.searched import carry_out_searched
from experiments.attacks.suite import NamedAttack, load_suite
from experiments.attacks.target import Target, find_target, target_problems
from experiments.attacks.view import format_point, kept_replies, suite_markdown, unknown_sources
from experiments.attacks.worst_case import worst_case
from experiments.console import format_seconds
from experiments.progress import Steps
from experiments.run import artifact_store, environment, set_threads
from framework.errors import ConfigError, SeawallError, StorageError
from framework.evaluation.panel import create_panel
from framework.evaluation.verdict_cache import judge_identity
from framework.files import ArtifactStore, fingerprint, to_plain, write_atomic, write_json

__all__ = ["RESULTS_FILE", "PreparedSuite", "attack_model", "plan_suite", "prepare_suite"]

FORMAT = 2
MARKDOWN_FILE = "attack.md"


@dataclass(frozen=True)
class PreparedSuite:
    """A suite that was checked against its target; no model is loaded yet."""

    stage: Stage
    attacks: tuple[NamedAttack, ...]
    requests: SuiteRequests

    @property
    def folder(self) -> Path:
        """Where the results go."""
        return Path(self.stage.suite.output) / self.stage.suite.name / self.stage.target.label

    @property
    def model_key(self) -> str:
        """By what the target's speed is remembered."""
        model = self.stage.target.model
        return self.stage.target.name if model is None else model.fingerprint


def prepare_suite(
    model: str, suite: str | Path, overrides: Sequence[str] = (), *, artifacts: ArtifactStore | None = None
) -> PreparedSuite:
    """Return a suite, checked as a whole; nothing is loaded, sampled or asked.

    Args:
        model: a folder, a GGUF file, a hub id, a known name, or the address of an endpoint.
        suite: a YAML file, or the name of a suite that comes with the project.
        overrides: ``key=value`` texts.
        artifacts: where finished attacks are kept; None takes the cache.

    Raises:
        ConfigError: settings are wrong, or attacks cannot be made on this model; every problem is listed.
        DataError: requests cannot be read.
        ModelError: a model is not there.
    """
    config, attacks = load_suite(suite, overrides)
    target = find_target(model, config)
    problems = target_problems(target, attacks)
    requests = find_requests(config, runs=_own_run(target))
    if target.model is not None:
        target = replace(target, model=replace(target.model, requests=requests.prompts))
    if target.model is not None:
        check_utility(config.utility)
    stage = Stage(config, target, requests.prompts, create_panel(config.judges), artifacts or artifact_store())
    for named in attacks:
        if isinstance(named.attack, PromptAttack):
            try:
                equip(named.attack, stage)
            except ConfigError as error:
                problems += [f"attacks.{named.label}: {problem}" for problem in error.problems]
    if problems:
        raise ConfigError(problems)
    return PreparedSuite(stage, tuple(attacks), requests)


def plan_suite(prepared: PreparedSuite) -> dict[str, Any]:
    """Return what a suite would do and how long it would take, as plain values; what is finished takes no time."""
    stage = prepared.stage
    set_threads(stage.suite.target.threads)
    plans = plan_attacks(stage.suite, prepared.attacks, len(stage.requests))
    folder = None if stage.target.model is None else stage.target.model.folder
    speed = find_speed(stage.artifacts, prepared.model_key, folder)
    rows = []
    for named, plan in zip(prepared.attacks, plans, strict=True):
        is_finished = find_finished(named, stage) is not None
        seconds = 0.0 if is_finished else None if speed is None else plan.tokens / speed.value
        rows.append({**plan._asdict(), "is_finished": is_finished, "seconds": seconds})
    return {
        "suite": stage.suite.name,
        "model": stage.target.facts(),
        "requests": len(stage.requests),
        "overlap": prepared.requests.overlap,
        "speed": None if speed is None else speed._asdict(),
        "seconds": None if speed is None else sum(row["seconds"] for row in rows),
        "attacks": rows,
    }


def attack_model(prepared: PreparedSuite, *, console: Console | None = None, verbose: bool = False) -> dict[str, Any]:
    """Run a suite and return the content of its ``attack.json``.

    An attack that fails, whatever the exception, is named in the results and the others go on; only a disk that is full
    ends the suite, since nothing that follows could be written.

    Args:
        prepared: the suite on its target.
        console: where progress is drawn; None draws nothing.
        verbose: say the traceback of an attack that fails.

    Raises:
        StorageError: the folder cannot be written.
    """
    started = time.time()
    stage = prepared.stage
    set_threads(stage.suite.target.threads)
    with Steps(console) as steps:
        _say_overlap(prepared.requests, steps)
        plain = _measure_plain(stage, steps)
        finished, failed = _run_all(prepared, plain, steps, verbose=verbose)
    stage.target.responder.close()
    results = _results(prepared, plain, finished, failed, time.time() - started)
    _leave_behind(prepared, finished, results)
    if not failed:  # what failed is repaired and started again, and does not pay twice for the rest
        stage.unfinished.forget()
    return results


def _own_run(target: Target) -> list[Path]:
    """Return the run whose model is attacked, if it is one of ours."""
    folder = None if target.model is None else target.model.folder
    return [] if folder is None else [folder.parent] if folder.name == "model" else []


def _say_overlap(requests: SuiteRequests, steps: Steps) -> None:
    found = requests.overlap
    if found is None:
        return
    steps.say(
        f"{len(found['exact'])} of {found['num_prompts']} requests stood in the training data word for word and "
        f"{len(found['near'])} nearly; {found['excluded']} are left out{unknown_sources(found)}"
    )


def _measure_plain(stage: Stage, steps: Steps) -> MeasuredModel | None:
    model = stage.target.model
    if model is None:
        return None
    bar = steps.task("measure the unattacked model", None)
    return stage.measure.measure(model.folder, model.fingerprint, progress=bar)


def _run_all(
    prepared: PreparedSuite, plain: MeasuredModel | None, steps: Steps, *, verbose: bool
) -> tuple[list[FinishedAttack], list[dict[str, str]]]:
    stage = prepared.stage
    plans = {plan.label: plan for plan in plan_attacks(stage.suite, prepared.attacks, len(stage.requests))}
    known = {named.label: find_finished(named, stage, plain=plain) for named in prepared.attacks}
    waiting = [named for named in prepared.attacks if known[named.label] is None]
    total = sum(plans[named.label].tokens for named in waiting)
    bar = steps.task(f"attack {stage.target.label}", total)
    before = 0
    finished: list[FinishedAttack] = []
    failed: list[dict[str, str]] = []
    for number, named in enumerate(prepared.attacks, start=1):
        found, plan = known[named.label], plans[named.label]
        if found is None:

            def move(done: int, start: int = before, plan: Plan = plan) -> None:
                bar(start + min(done, plan.tokens), total, note=plan.label)

            try:
                found = _carry_out(named, stage, plain, move)
            except StorageError:
                raise
            except Exception as error:  # of an attack of the user's own it may be any; Ctrl-C is none of them
                failed.append(_failure(named, error))
                if verbose:
                    steps.say("".join(traceback.format_exception(error)).rstrip())
            gc.collect()  # a failed attack leaves its model in the circles of its traceback
            before += plan.tokens
            bar(before, total, note=plan.label)
        if found is not None:
            finished.append(found)
            _say(f"{number}/{len(prepared.attacks)}", found, steps)
    _remember_speed(prepared, finished)
    return finished, failed


def _carry_out(named: NamedAttack, stage: Stage, plain: MeasuredModel | None, move: Any) -> FinishedAttack:
    if not isinstance(named.attack, PromptAttack):
        stage.target.responder.close()  # the attacked model takes its place in memory
    if named.search is not None:
        return carry_out_searched(named, named.search, stage, plain=plain, progress=move)
    return carry_out(named, stage, plain=plain, progress=move)


def _failure(named: NamedAttack, error: Exception) -> dict[str, str]:
    """Return what results say of an attack that failed; an error not raised on purpose is named with its type."""
    kind = type(error).__name__
    text = str(error) if isinstance(error, SeawallError) else " ".join(f"{kind}: {error}".split())
    return {"name": named.label, "attack": named.attack.name, "type": kind, "error": text}


def _say(number: str, found: FinishedAttack, steps: Steps) -> None:
    took = "reused" if found.is_reused else format_seconds(found.outcome.cost["seconds"])
    if "asked_until" in found.outcome.cost:
        took += f", {kept_replies(found.outcome.cost)}"
    steps.say(f"{number} {found.outcome.name}: {format_point(found.outcome)}, {took}")


def _remember_speed(prepared: PreparedSuite, finished: Sequence[FinishedAttack]) -> None:
    fresh = [f.outcome for f in finished if not f.is_reused and f.outcome.kind == "prompt"]
    tokens = sum((o.cost["queries"] - o.cost["resumed_queries"]) for o in fresh) * prepared.stage.suite.max_new_tokens
    seconds = sum(outcome.cost["seconds"] for outcome in fresh)
    keep_speed(prepared.stage.artifacts, prepared.model_key, tokens=tokens, seconds=seconds)


def _results(
    prepared: PreparedSuite,
    plain: MeasuredModel | None,
    finished: Sequence[FinishedAttack],
    failed: Sequence[dict[str, str]],
    seconds: float,
) -> dict[str, Any]:
    stage = prepared.stage
    outcomes = [replace(f.outcome, transcript=f"transcript-{f.outcome.name}.jsonl").to_dict() for f in finished]
    return {
        "format": FORMAT,
        "model": stage.target.facts(),
        "suite": to_plain(stage.suite),
        "requests": {"count": len(stage.requests), "overlap": prepared.requests.overlap},
        "measured_with": measured_with(stage),
        "outcomes": to_plain(outcomes),
        "worst_case": _worst(finished, stage, len(failed)) if finished else None,
        "failed": list(failed),
        "utility": {} if plain is None else dict(plain.utility),
        "seconds": seconds,
        "environment": environment(),
        "folder": str(prepared.folder),
    }


def measured_with(stage: Stage) -> dict[str, Any]:
    """Return what must be the same where two models are compared; of the requests ids, texts and pictures as one."""
    return {
        "requests": fingerprint(sorted(request_keys(stage.requests))),
        "judges": to_plain([judge_identity(judge) for judge in stage.judges]),
        "max_new_tokens": stage.suite.max_new_tokens,
        "system": stage.suite.target.system,
    }


def _worst(finished: Sequence[FinishedAttack], stage: Stage, num_failed: int) -> dict[str, Any]:
    """Return the worst case as plain values."""
    suite = stage.suite
    outcomes = [one.outcome for one in finished]
    found = worst_case(outcomes, floor=suite.utility_floor, seed=suite.seed, num_failed=num_failed)
    plain: dict[str, Any] = {
        "text": str(found),
        "low": found.low,
        "high": found.high,
        "excess": found.excess,
        "floor": found.floor,
        "num_points": found.num_points,
        "below_floor": [str(point) for point in found.below_floor],
        "unmeasured": [str(point) for point in found.unmeasured],
        "num_failed": num_failed,
    }
    if found.leading is not None:
        leading = found.leading
        plain |= {"attack": leading.name, "unit": leading.unit, "spent": leading.spent}
        plain |= {"setting": dict(leading.setting), "attack_success": asdict(leading.rate)}
    if found.union is not None:
        plain["broken_by_any"] = asdict(found.union)
    return plain


def _leave_behind(prepared: PreparedSuite, finished: Sequence[FinishedAttack], results: dict[str, Any]) -> None:
    folder = prepared.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / ".gitignore", "*\n")  # transcripts hold what was asked and what the model said to it
        for found in finished:
            shutil.copyfile(found.folder / "transcript.jsonl", folder / f"transcript-{found.outcome.name}.jsonl")
    except OSError as error:
        raise StorageError(f"Expected `{folder}` to be writable, but got {error.strerror or error}.") from error
    write_json(folder / RESULTS_FILE, results)
    write_atomic(folder / MARKDOWN_FILE, suite_markdown(results))
