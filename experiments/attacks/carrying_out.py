"""One attack of a suite, from the store when it was finished before, and gone on with when it was interrupted."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments.attacks.attack_files import outcome_of
from experiments.attacks.attack_keys import code_hash, model_key, request_keys, settings_files
from experiments.attacks.attacked_models import MeasuredModel, ModelMeasure, utility_key, utility_metric
from experiments.attacks.estimate import STEP_TOKENS, measuring_tokens
from experiments.attacks.interface import (
    AttackedModel,
    AttackOutcome,
    AttackPoint,
    Attempt,
    ModelAttack,
    PromptAttack,
    Supplies,
)
from experiments.attacks.prompt_run import attack_points, reached, run_prompt_attack
from experiments.attacks.responder import ReplySettings
from experiments.attacks.suite import NamedAttack, SuiteConfig
from experiments.attacks.target import Target
from experiments.attacks.transcript import Transcript
from experiments.attacks.unfinished import UnfinishedSuite
from experiments.compliant_replies import Sampler, compliant_replies
from experiments.endpoint_artifacts import replace_artifact
from experiments.fingerprints import content_hashes, embedded_hash, versions
from framework.evaluation.judges import Judge
from framework.evaluation.verdict_cache import judge_identity, verdict_cache
from framework.examples import Prompt
from framework.files import ArtifactStore, read_json, to_plain, write_json
from framework.model_files import read_tokenizer
from framework.models import ModelSpec, model_fingerprint
from framework.moments import moment

__all__ = ["FinishedAttack", "Stage", "carry_out", "equip", "find_finished"]

FORMAT = 1
KIND = "attack"
TRANSCRIPT = "transcript.jsonl"


@dataclass(frozen=True)
class Stage:
    """What all attacks of a suite have in common."""

    suite: SuiteConfig
    target: Target
    requests: Sequence[Prompt]
    judges: Sequence[Judge]
    artifacts: ArtifactStore

    @property
    def unfinished(self) -> UnfinishedSuite:
        """What this suite finished on an endpoint before it was interrupted."""
        return UnfinishedSuite(
            self.artifacts, {"suite": to_plain(self.suite), "target": self.target.responder.identity()}
        )

    @property
    def measure(self) -> ModelMeasure:
        """How models are measured."""
        return ModelMeasure(self.suite, self.requests, self.judges, self.artifacts)


@dataclass(frozen=True)
class FinishedAttack:
    """An outcome and where its transcript lies."""

    outcome: AttackOutcome
    folder: Path
    is_reused: bool


def equip(attack: PromptAttack, stage: Stage) -> None:
    """Give an attack what the suite has for it; nothing is loaded or sampled yet.

    Raises:
        ConfigError: what it needs is not there.
    """
    model, spec = stage.target.model, stage.target.spec
    if model is None or spec is None:
        attack.equip(Supplies())
        return
    tokenizer = read_tokenizer(model.folder, trust_remote_code=spec.trust_remote_code) if attack.needs_prefill else None
    base = model.base

    def sample(requests: Sequence[Prompt], num_tokens: int) -> Sequence[str | None]:
        sampler = Sampler(
            ModelSpec(str(base), spec.dtype, None, spec.trust_remote_code), model_fingerprint(Path(str(base)))
        )
        return compliant_replies(
            requests,
            sampler=sampler,
            system=model.system,
            num_tokens=num_tokens,
            artifacts=stage.artifacts,
            accelerator=model.accelerator,
        )

    attack.equip(Supplies(tokenizer, None if base is None else sample))


def find_finished(named: NamedAttack, stage: Stage, *, plain: MeasuredModel | None = None) -> FinishedAttack | None:
    """Return an attack that was finished before, or None; of a search each trial is found when it is its turn.

    Args:
        named: the attack.
        stage: the rest of the suite.
        plain: what was measured of the unattacked model; without it the points of a prompt attack say no utility.
    """
    if named.search is not None:
        return None
    if not stage.target.keeps:
        kept = stage.unfinished.find(_own_key(named, stage))
        return None if kept is None else _kept(_read(named, kept.folder, plain, is_reused=True), kept.since)
    folder = stage.artifacts.find(KIND, _key(named, stage))
    return None if folder is None else _read(named, folder, plain, is_reused=True)


def carry_out(
    named: NamedAttack, stage: Stage, *, plain: MeasuredModel | None, progress: Callable[[int], None] | None = None
) -> FinishedAttack:
    """Return an attack's outcome, made now unless it is in the store.

    Args:
        named: the attack, equipped.
        stage: the rest of the suite.
        plain: what was measured of the unattacked model; None for an endpoint.
        progress: called with the generated tokens granted so far.

    Raises:
        SeawallError: the attack cannot go on.
    """
    if (found := find_finished(named, stage, plain=plain)) is not None:
        return found
    key = _key(named, stage)
    is_prompt = isinstance(named.attack, PromptAttack)

    def fill(folder: Path) -> None:
        if is_prompt:
            outcome = _prompt_outcome(named, stage, folder, key, progress)
        else:
            outcome = _model_outcome(named, stage, folder, key, plain, progress)
        write_json(folder / "outcome.json", outcome.to_dict())

    if stage.target.keeps:
        with stage.artifacts.writing(KIND, key, keep_partial=is_prompt) as folder:
            fill(folder)
        place = stage.artifacts.path(KIND, key)
    else:  # what an endpoint said yesterday is not found again
        place = replace_artifact(stage.artifacts, KIND, key, fill, keep_partial=is_prompt)
        stage.unfinished.note(_own_key(named, stage), place)
    return _read(named, place, plain, is_reused=False)


def _own_key(named: NamedAttack, stage: Stage) -> dict[str, Any]:
    """Return the key of an attack that is asked for itself, although another of the suite is the same."""
    return {"label": named.label, "key": _key(named, stage)}


def _key(named: NamedAttack, stage: Stage) -> dict[str, Any]:
    """Return everything that decides an outcome; what it is called in the suite does not."""
    suite, attack, model = stage.suite, named.attack, stage.target.model
    settings = to_plain(attack.config)
    key: dict[str, Any] = {
        "format": FORMAT,
        "attack": attack.name,
        "settings": settings,
        "files": settings_files(settings),
        "code": code_hash(),
        "target": stage.target.responder.identity(),
        "requests": request_keys(stage.requests),
        "judges": [judge_identity(judge) for judge in stage.judges],
        "max_new_tokens": suite.max_new_tokens,
        "seed": suite.seed,
        "embedded": embedded_hash(),
        "versions": versions(),
    }
    is_model = isinstance(attack, ModelAttack)
    if model is not None and (is_model or getattr(attack, "needs_prefill", False)):
        key["base"] = model_key(model.base)
    if model is not None and is_model:
        key["adapter"] = content_hashes([str(model.adapter)]) if model.adapter else None
        key["before_adapter"] = model_key(model.before_adapter)
        key["utility"] = utility_key(suite.utility)
    return key


def _read(named: NamedAttack, folder: Path, plain: MeasuredModel | None, *, is_reused: bool) -> FinishedAttack:
    outcome = replace(outcome_of(read_json(folder / "outcome.json")), name=named.label)
    if plain is not None and isinstance(named.attack, PromptAttack):
        # The model is the unattacked one and is as useful as before. Not stored: utility does not decide the attack.
        outcome = replace(outcome, points=[_with_utility(point, plain.utility, plain) for point in outcome.points])
    return FinishedAttack(outcome, folder, is_reused)


def _kept(found: FinishedAttack, since: str) -> FinishedAttack:
    """Return an attack on an endpoint with the time by which it was asked, which results must say."""
    outcome = found.outcome
    cost = {**outcome.cost, "resumed_queries": outcome.cost["queries"], "asked_until": since}
    return replace(found, outcome=replace(outcome, cost=cost))


def _prompt_outcome(
    named: NamedAttack,
    stage: Stage,
    folder: Path,
    key: Mapping[str, Any],
    progress: Callable[[int], None] | None,
) -> AttackOutcome:
    attack, suite = named.attack, stage.suite
    if not isinstance(attack, PromptAttack):
        raise TypeError(f"Expected a prompt attack, but got {attack!r}.")
    there = folder / TRANSCRIPT
    last = there.stat().st_mtime if there.is_file() else None
    run = run_prompt_attack(
        attack,
        stage.requests,
        stage.target.responder,
        settings=ReplySettings(
            suite.max_new_tokens,
            suite.batch_size,
            seed=suite.seed,
            max_unanswered=suite.endpoint.max_unanswered if stage.target.model is None else 0,
        ),
        judges=stage.judges,
        transcript=Transcript(folder / TRANSCRIPT, key),
        cache=verdict_cache(stage.artifacts),
        progress=None if progress is None else lambda done: progress(done * suite.max_new_tokens),
    )
    points = attack_points(run.attempts, budget=attack.budget, num_requests=len(stage.requests))
    cost: dict[str, Any] = {
        "seconds": run.seconds,
        "queries": len(run.attempts) + run.num_unanswered,
        "generated_tokens": sum(attempt.num_tokens for attempt in run.attempts),
        "resumed_queries": run.num_resumed,
    }
    if stage.target.model is None:
        cost["unanswered_queries"] = run.num_unanswered
        if run.num_resumed and last is not None:
            cost["asked_until"] = moment(last)
    return _outcome(named, points, cost)


def _model_outcome(
    named: NamedAttack,
    stage: Stage,
    folder: Path,
    key: Mapping[str, Any],
    plain: MeasuredModel | None,
    progress: Callable[[int], None] | None,
) -> AttackOutcome:
    attack, target = named.attack, stage.target.model
    if not isinstance(attack, ModelAttack) or target is None or plain is None:
        raise TypeError(f"Expected an attack on a model on this machine, but got {attack!r}.")
    started = time.perf_counter()
    work, transcript = folder / "work", Transcript(folder / TRANSCRIPT, key)
    points: list[AttackPoint] = []
    costs: list[Mapping[str, Any]] = []
    tokens = 0
    bar = _Bar(progress, measuring_tokens(stage.suite, len(stage.requests)))
    for number, made in enumerate(attack.make(replace(target, on_step=bar.step), work)):
        found = _measure(made, stage, bar)
        bar.next_model()
        attempts = [_of_model(attempt, made, number) for attempt in found.attempts]
        transcript.add(attempts)
        point = reached(attempts, spent=made.spent, num_requests=len(stage.requests))
        facts = {"facts": to_plain(made.facts)} if made.facts else {}
        points.append(replace(_with_utility(point, found.utility, plain), setting={**to_plain(made.setting), **facts}))
        costs.append(made.cost)
        tokens += sum(attempt.num_tokens for attempt in attempts)
    shutil.rmtree(work, ignore_errors=True)
    steps = sum(int(cost.get("optimizer_steps", 0)) for cost in costs)
    cost = {
        "seconds": time.perf_counter() - started,
        "attack_seconds": sum(float(cost.get("seconds", 0.0)) for cost in costs),
        "optimizer_steps": steps,
        "models": len(points),
        "queries": len(points) * len(stage.requests),
        "generated_tokens": tokens,
    }
    return _outcome(named, points, cost)


class _Bar:
    """Work of a model attack in generated tokens, as its plan counts it: optimizer steps and measured models."""

    def __init__(self, progress: Callable[[int], None] | None, per_model: int) -> None:
        self._progress, self._per_model = progress, per_model
        self._before = 0

    def step(self) -> None:
        """An optimizer step was made."""
        self._before += STEP_TOKENS
        self.replies(0)

    def replies(self, tokens: int) -> None:
        """So many tokens of the replies of the present model were granted."""
        if self._progress is not None:
            self._progress(self._before + min(tokens, self._per_model))

    def next_model(self) -> None:
        """The present model is measured."""
        self._before += self._per_model
        self.replies(0)


def _measure(made: AttackedModel, stage: Stage, bar: _Bar) -> MeasuredModel:
    return stage.measure.measure(
        made.folder,
        model_fingerprint(made.folder),
        system=made.system,
        template=made.template,
        progress=lambda done, _: bar.replies(done),
    )


def _of_model(attempt: Attempt, made: AttackedModel, number: int) -> Attempt:
    details = {**attempt.details, "setting": to_plain(made.setting), "spent": made.spent}
    return replace(attempt, query_id=f"{attempt.query_id}@{number + 1}", details=details, system=made.system)


def _with_utility(point: AttackPoint, utility: Mapping[str, Any], plain: MeasuredModel) -> AttackPoint:
    return replace(point, metrics={**point.metrics, **utility, **utility_metric(utility, plain.utility)})


def _outcome(named: NamedAttack, points: Sequence[AttackPoint], cost: Mapping[str, Any]) -> AttackOutcome:
    attack = named.attack
    return AttackOutcome(
        name=named.label,
        attack=attack.name,
        kind=attack.kind,
        unit=attack.unit,
        settings=json.loads(json.dumps(to_plain(attack.config))),
        points=[dataclasses.replace(point) for point in points],
        cost=cost,
        transcript=TRANSCRIPT,
    )
