"""What an attacked model says to the requests, and what it is still good for."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datamodules.embedded_sets import benign_examples
from datamodules.readers import find_file
from datamodules.tasks import create_task
from experiments.attacks.attack_keys import code_hash, request_keys
from experiments.attacks.interface import Attempt, Query
from experiments.attacks.prompt_run import judge_queries
from experiments.attacks.responder import LocalResponder, ReplySettings
from experiments.attacks.suite import SuiteConfig, UtilityConfig
from experiments.fingerprints import content_hashes, data_hashes, embedded_hash, tokenizer_hashes, versions
from experiments.measure import choice_items
from framework.chat import ChatEncoder
from framework.evaluation.judges import Judge
from framework.evaluation.likelihood import mean_nll, score_choices
from framework.evaluation.suite import EvaluationSet, evaluate_model
from framework.evaluation.verdict_cache import judge_identity, verdict_cache
from framework.examples import Prompt
from framework.files import ArtifactStore, fingerprint, read_json, to_plain, write_atomic, write_json
from framework.models import ModelSpec, resolved_dtype

__all__ = ["MeasuredModel", "ModelMeasure", "check_utility", "utility_key", "utility_metric", "utility_share"]

FORMAT = 1
SCORED = 16
"""Replies scored at once: these need logits over the vocabulary at every token."""
LOWER_IS_BETTER = ("benign_nll",)
SLOT = "{request}"


@dataclass(frozen=True)
class MeasuredModel:
    """What was measured of one model."""

    attempts: tuple[Attempt, ...]
    """One per request."""
    utility: Mapping[str, Any]
    """Key to value, with counts and interval where there are some."""
    is_reused: bool
    """Found in the store."""


@dataclass(frozen=True)
class ModelMeasure:
    """How every model of a suite is measured, the unattacked one too."""

    suite: SuiteConfig
    requests: Sequence[Prompt]
    judges: Sequence[Judge]
    artifacts: ArtifactStore

    def measure(
        self,
        folder: Path,
        weights: str,
        *,
        system: str | None = None,
        template: str = SLOT,
        progress: Callable[[int, int], None] | None = None,
    ) -> MeasuredModel:
        """Return a model's replies and its utility, from the store when they were measured before.

        Args:
            folder: of the model.
            weights: their fingerprint.
            system: message the attacker sends; None keeps the suite's.
            template: what the attacker makes of a request.
            progress: called with (done, total) in granted tokens of the replies.

        Raises:
            DataError: a request or a file of the utility cannot be used.
        """
        target, utility = self.suite.target, self.suite.utility
        key = {
            "format": FORMAT,
            "model": weights,
            "tokenizer": tokenizer_hashes(folder),
            "dtype": resolved_dtype(target.dtype),
            "code": code_hash(),
            "system": target.system if system is None else system,
            "template": template,
            "requests": request_keys(self.requests),
            "judges": [judge_identity(judge) for judge in self.judges],
            "max_new_tokens": self.suite.max_new_tokens,
            "utility": utility_key(utility),
            "utility_system": target.system,  # whatever the attacker sends, the utility is what others get
            "embedded": embedded_hash(),
            "versions": versions(),
        }
        found = self.artifacts.find("attacked", key)
        is_reused = found is not None
        if found is None:
            with self.artifacts.writing("attacked", key) as partial:
                spec = ModelSpec(str(folder), target.dtype, None, target.trust_remote_code)
                responder = LocalResponder(
                    spec,
                    weights,
                    system=target.system if system is None else system,
                    accelerator=target.accelerator,
                )
                attempts = self._replies(responder, template, progress)
                write_json(partial / "utility.json", _utility(responder, utility, self.suite))
                responder.close()
                lines = [json.dumps(to_plain(dataclasses.asdict(one)), ensure_ascii=False) for one in attempts]
                write_atomic(partial / "attempts.jsonl", "\n".join(lines) + "\n")
            found = self.artifacts.path("attacked", key)
        text = (found / "attempts.jsonl").read_text(encoding="utf-8")
        attempts = [Attempt(**json.loads(line)) for line in text.rstrip("\n").split("\n")]
        return MeasuredModel(tuple(attempts), read_json(found / "utility.json"), is_reused)

    def _replies(
        self, responder: LocalResponder, template: str, progress: Callable[[int, int], None] | None
    ) -> list[Attempt]:
        queries = [Query(one, replace(one, text=template.replace(SLOT, one.text))) for one in self.requests]
        settings = ReplySettings(self.suite.max_new_tokens, self.suite.batch_size)
        replies = responder.reply(queries, settings, numbers=range(len(queries)), progress=progress)
        cache = verdict_cache(self.artifacts)
        return judge_queries(queries, replies, self.judges, numbers=[1] * len(queries), cache=cache)


def check_utility(utility: UtilityConfig) -> None:
    """Open everything the utility will read, so that a wrong path shows before hours of attacks.

    Raises:
        ConfigError: an unknown task.
        DataError: a file that is missing, empty or malformed.
    """
    for name in utility.multiple_choice:
        choice_items(name)
    if utility.task is not None:
        _task_set(utility)


def utility_key(utility: UtilityConfig) -> dict[str, Any]:
    """Return everything that decides what the utility of a model is: settings, the task's prompts, files.

    Raises:
        DataError: a file that is missing, empty or malformed.
    """
    prompts = () if utility.task is None else _task_set(utility).prompts
    files = content_hashes([str(find_file(name)) for name in utility.multiple_choice])
    named = [utility.task, utility.task_path]
    return {
        "settings": to_plain(utility),
        "files": files | content_hashes(named) | data_hashes(named),
        "task": fingerprint([(one.id, one.text, one.answer) for one in prompts]),
    }


def _task_set(utility: UtilityConfig) -> EvaluationSet:
    task = create_task(str(utility.task), Path(utility.task_path) if utility.task_path else None)
    prompts = task.test_prompts(count=utility.task_count)
    return EvaluationSet(task.name, "task", prompts, task.max_new_tokens, is_correct=task.is_correct)


def _utility(responder: LocalResponder, utility: UtilityConfig, suite: SuiteConfig) -> dict[str, Any]:
    loaded = responder.loaded
    encoder = ChatEncoder(loaded.tokenizer, system=suite.target.system)
    batch = min(suite.batch_size, SCORED)
    found: dict[str, Any] = {}
    if utility.benign_nll:
        found["benign_nll"] = to_plain(mean_nll(loaded.model, encoder, benign_examples("validation"), batch_size=batch))
    if utility.task is not None:
        result = evaluate_model(loaded.model, encoder, [_task_set(utility)], judges=[], batch_size=suite.batch_size)
        found["task_accuracy"] = to_plain(result.overall["task_accuracy"])
    for name in utility.multiple_choice:
        scored = score_choices(loaded.model, encoder, choice_items(name), batch_size=batch)
        found[f"choice_accuracy/{name}"] = to_plain(scored.accuracy)
    return {name: _storable(metric) for name, metric in found.items()}


def _storable(metric: Mapping[str, Any]) -> dict[str, Any]:
    """Return a metric without numbers that are none: an attack may break a model so that its logits overflow."""
    lost = {name for name, value in metric.items() if isinstance(value, float) and not math.isfinite(value)}
    found = {name: None if name in lost else value for name, value in metric.items()}
    return {**found, "note": "not a finite number"} if "value" in lost else found


def utility_metric(attacked: Mapping[str, Any], plain: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``utility_share`` as a metric under its name, with a note where it is 0 for want of a finite number.

    Args:
        attacked: key to value of the attacked model.
        plain: of the unattacked one.
    """
    share = utility_share(attacked, plain)
    if share is None:
        return {}
    lost = [key for key in plain if _is_known(plain[key]) and not _is_known(attacked[key])]
    note = {"note": f"of the attacked model no finite number: {', '.join(lost)}"} if lost else {}
    return {"utility_share": {"value": share, "unit": "share", **note}}


def _is_known(metric: Mapping[str, Any]) -> bool:
    return metric["value"] is not None and math.isfinite(metric["value"])


def utility_share(attacked: Mapping[str, Any], plain: Mapping[str, Any]) -> float | None:
    """Return the smallest share of the unattacked model's utility that is left; None where nothing was measured.

    Of a quantity of which less is better (``benign_nll``) the share is the unattacked value over the attacked one. An
    attacked model without a finite number keeps 0; where the unattacked one has none, nothing is compared.

    Args:
        attacked: key to value of the attacked model.
        plain: of the unattacked one.

    Example:
        >>> utility_share({"task_accuracy": {"value": 0.4}}, {"task_accuracy": {"value": 0.5}})
        0.8
    """
    shares = []
    for key, before in plain.items():
        if not _is_known(before):
            continue
        if not _is_known(attacked[key]):
            return 0.0
        now, then = attacked[key]["value"], before["value"]
        good, reference = (then, now) if key in LOWER_IS_BETTER else (now, then)
        shares.append(good / reference if reference else 1.0)
    return min(shares) if shares else None
