"""Measuring a model behind an endpoint: the replies and verdicts of any evaluation, without what needs its weights.

A finished measurement is not taken for a later one, unless that is asked for: nothing tells whether the server still
has the same model behind the name. One that was interrupted goes on where it stopped. A prompt without a reply is no
safe reply: it ends the measurement, or, as many as `endpoint.max_unanswered` allows, it is left out of every rate and
counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock

from experiments.endpoint import ReplyJournal, ask_all, question_of, to_reply
from experiments.endpoint_artifacts import replace_artifact
from experiments.endpoint_client import EndpointClient, Question
from experiments.measure import (
    Bars,
    Measurement,
    Subject,
    TaskChoice,
    all_rates,
    deciding_settings,
    evaluation_sets,
    image_hash,
    judge_identities,
)
from experiments.prefill import Measured, attacked_prompts, find_replies, prefill_sets, rates_by_set
from framework.config import EvaluateCommandConfig, EvaluateConfig, KnownNames, load_evaluate_config, parse_overrides
from framework.cost import CostLedger
from framework.endpoint_settings import parse_endpoint
from framework.errors import ConfigError, SeawallError
from framework.evaluation.panel import add_verdicts, create_panel, panel_metrics
from framework.evaluation.rates import Rate
from framework.evaluation.records import EvaluationRecord, write_samples
from framework.evaluation.suite import EvaluationSet, make_records
from framework.evaluation.verdict_cache import verdict_cache
from framework.files import ArtifactStore, fingerprint, read_json, to_plain, write_json
from framework.model_files import read_tokenizer
from framework.models import ModelSpec, find_model

__all__ = ["EndpointFacts", "endpoint_problems", "load_endpoint_config", "measure_endpoint"]

FORMAT = 1
LEFT_OUT = "refusal margin and benign NLL are left out: they need the model's weights"


@dataclass(frozen=True)
class EndpointFacts:
    """What the results say of a measurement through an endpoint."""

    url: str
    model: str
    left_out: str
    """What an evaluation measures by default and this one does not, and why."""
    first_reply: str
    """ISO 8601, UTC; a server may change its model at any time."""
    last_reply: str
    is_reused: bool


def load_endpoint_config(
    model: str, overrides: Sequence[str] = (), *, known: KnownNames | None = None
) -> EvaluateCommandConfig:
    """Return the settings of ``seawall evaluate http://host:port/v1#model [key=value …]``.

    Raises:
        ConfigError: the settings are wrong or ask for what needs weights; every problem is listed.
    """
    problems: list[str] = []
    given = {override.key: override.value for override in parse_overrides(overrides)}
    section = given.get("evaluate")
    nested = section if isinstance(section, dict) else {}
    if given.get("evaluate.benign_nll", nested.get("benign_nll")):
        problems.append(_needs_weights("evaluate.benign_nll", True))
    config = None
    try:
        config = load_evaluate_config(model, overrides, known=known)
    except ConfigError as error:
        problems += error.problems
    if config is not None:
        problems += endpoint_problems(config)
    if problems or config is None:
        raise ConfigError(problems)
    return config


def endpoint_problems(config: EvaluateCommandConfig) -> list[str]:
    """Return everything in a config that an endpoint cannot do, one sentence each."""
    evaluate, model, trainer = config.evaluate, config.model, config.trainer
    problems = list(config.endpoint.problems())
    try:
        parse_endpoint(model.name)
    except ConfigError as error:
        problems += error.problems
    unset = {
        "evaluate.nll": evaluate.nll,
        "evaluate.multiple_choice": evaluate.multiple_choice,
        "model.revision": model.revision,
        "model.trust_remote_code": model.trust_remote_code,
        "model.dtype": None if model.dtype == "auto" else model.dtype,
    }
    problems += [_needs_weights(name, value) for name, value in unset.items() if value]
    if evaluate.overflow != "error":
        problems.append(_needs_weights("evaluate.overflow", evaluate.overflow, "the model's tokenizer"))
    if trainer.devices * trainer.num_nodes > 1:
        problems.append(
            f"Expected one process for an endpoint, but got {trainer.devices * trainer.num_nodes}. "
            "Set trainer.devices=1; endpoint.concurrency says how many requests are under way at once."
        )
    if evaluate.prefill and config.endpoint.prefill_style == "none":
        problems.append(
            "Expected `endpoint.prefill_style` to say how the endpoint takes the opening of a reply, but got 'none' "
            f"with `evaluate.prefill` {evaluate.prefill}. If it goes on with a last message of the assistant, write "
            "endpoint.prefill_style=assistant_last_message."
        )
    if evaluate.prefill and evaluate.prefill_model is None:
        problems.append(
            "Expected `evaluate.prefill_model` to name a model whose tokenizer counts the tokens of an opening, but "
            "got None: an endpoint shows none. Name one with weights here."
        )
    return problems


def _needs_weights(name: str, value: Any, what: str = "the model's weights") -> str:
    return f"Expected `{name}` to be unset for an endpoint, but got {value!r}: it needs {what}. Leave it out."


class _Work(NamedTuple):
    """What all parts of a measurement share."""

    config: EvaluateCommandConfig
    client: EndpointClient
    artifacts: ArtifactStore
    bars: Bars | None
    say: Callable[[str], None]
    journals: list[Path]
    """Removed when all parts are done: an interrupted measurement finds those of its finished parts too."""


class _Part(NamedTuple):
    """The plain measurement, or the one under the prefilling attack."""

    kind: str
    title: str
    sets: Sequence[EvaluationSet]
    rates: Callable[[Sequence[EvaluationRecord]], dict[str, Rate]]


class _Asked(NamedTuple):
    """What came of all prompts, set by set."""

    records: list[EvaluationRecord]
    unanswered: list[str]
    usage: dict[str, int]
    first: str
    last: str


def measure_endpoint(
    config: EvaluateCommandConfig,
    *,
    task: TaskChoice | None,
    artifacts: ArtifactStore,
    bars: Bars | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[Measured, EndpointFacts]:
    """Return the metrics of the model behind ``config.model.name``, and what is to be known of the measurement.

    Args:
        config: what is measured, and how the endpoint is asked.
        task: downstream task.
        artifacts: where finished measurements and the replies of unfinished ones are kept.
        bars: shows how far replies are.
        say: tells the user what is left out and what goes on.

    Raises:
        ConfigError: the config asks for what needs weights; all problems are listed.
        ModelError: nothing answers, or the endpoint refuses.
        SeawallError: more prompts stay unanswered than are allowed; the replies so far are kept.
    """
    problems = endpoint_problems(config)
    if problems:
        raise ConfigError(problems)
    evaluate, address = config.evaluate, parse_endpoint(config.model.name)
    client = EndpointClient(address, config.endpoint)
    work = _Work(config, client, artifacts, bars, say, [])
    say(LEFT_OUT)
    try:
        plain = _stored(work, _Part("endpoint", "", evaluation_sets(evaluate, task), all_rates))
        prefill = None
        if evaluate.prefill:
            sets, num_asked = _prefill(work)
            prefill = _stored(work, _Part("endpoint-prefill", "prefill attack", sets, rates_by_set))
            found = Rate.of("prefill_prompts", len(sets[0].prompts), num_asked)
            prefill = replace(prefill, metrics=prefill.metrics | {"prefill_prompts": to_plain(found)})
    finally:
        client.close()
    for journal in work.journals:
        journal.unlink(missing_ok=True)
    measured = Measured(plain, prefill)
    times = [part.cost["replies"][end] for part in measured.parts for end in ("first", "last")]
    reused = any(part.is_reused for part in measured.parts)
    return measured, EndpointFacts(address.url, address.model, LEFT_OUT, min(times), max(times), reused)


def _prefill(work: _Work) -> tuple[list[EvaluationSet], int]:
    """Return the attacked sets, openings in tokens of the model that samples them, and how many prompts there were."""
    evaluate = work.config.evaluate
    prompts = attacked_prompts(evaluate)
    folder = find_model(ModelSpec(str(evaluate.prefill_model))).folder
    subject = Subject(ModelSpec(str(folder)), "", work.config.model.system, work.config.trainer.accelerator)
    replies = find_replies(prompts, subject, evaluate, None, work.artifacts, work.bars)
    return prefill_sets(prompts, replies, evaluate.prefill, read_tokenizer(folder)), len(prompts)


def _stored(work: _Work, part: _Part) -> Measurement:
    """Return a finished measurement if one may be taken, else make one and keep it in place of the earlier one."""
    replies_key = _replies_key(work, part)
    evaluate = work.config.evaluate
    key = {**replies_key, "config": deciding_settings(evaluate), "judges": judge_identities(evaluate)}
    folder = work.artifacts.find(part.kind, key)
    reused = folder is not None and work.config.endpoint.reuse
    if folder is None or not reused:
        journal = work.artifacts.root / f"{part.kind}-replies" / f"{fingerprint(replies_key)}.jsonl"
        journal.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{journal}.lock"):
            folder = _measure(work, part, key, journal)
        work.journals.append(journal)
    stored = read_json(folder / "metrics.json")
    return Measurement(stored["metrics"], stored["cost"], folder / "samples.jsonl", reused)


def _replies_key(work: _Work, part: _Part) -> dict[str, Any]:
    config = work.config
    address = parse_endpoint(config.model.name)
    return {
        "format": FORMAT,
        "endpoint": [address.url, address.model],
        "settings": config.endpoint.deciding(),
        "system": config.model.system,
        "seed": config.seed,
        "sets": [
            [
                s.name,
                s.role,
                _limit(config.evaluate, s),
                [[to_plain(prompt), *image_hash(prompt)] for prompt in s.prompts],
            ]
            for s in part.sets
        ],
    }


def _limit(config: EvaluateConfig, item: EvaluationSet) -> int:
    return config.max_new_tokens if item.max_new_tokens is None else item.max_new_tokens


def _measure(work: _Work, part: _Part, key: dict[str, Any], journal: Path) -> Path:
    """Make a measurement and keep it in place of an earlier one; returns the copy that belongs to this one alone."""
    evaluate = work.config.evaluate
    ledger = CostLedger(part.kind)
    with ledger.measure("evaluate"):
        asked = _ask_sets(work, part, journal)
    judges = create_panel(evaluate.judges)
    late = [judge for judge in judges if judge.needs_model]
    order = [judge.name for judge in judges]
    records = add_verdicts(asked.records, late, order=order, cache=verdict_cache(work.artifacts))
    metrics: dict[str, Any] = {name: to_plain(rate) for name, rate in part.rates(records).items()}
    if len(judges) > 1 and part.kind == "endpoint":
        metrics |= panel_metrics(records)
    total = len(records) + len(asked.unanswered)
    if asked.unanswered:
        work.say(f"{len(asked.unanswered)} of {total} prompts have no reply and are in no rate")
    prefix = "" if part.kind == "endpoint" else "prefill_"
    metrics[f"{prefix}num_unanswered"] = {"value": len(asked.unanswered), "denominator": total}
    cost = ledger.to_dict()
    cost["tokens"] = asked.usage
    # Of this process, which only waited; what the server needed is not known here.
    cost["peak_memory_mib"] = {"host": {}, "host_lifetime": None, "device": {}}
    cost["replies"] = {"first": asked.first, "last": asked.last, "unanswered": asked.unanswered}

    def fill(folder: Path) -> None:
        write_samples(folder / "samples.jsonl", records)
        write_json(folder / "metrics.json", {"metrics": metrics, "cost": cost})

    return replace_artifact(work.artifacts, part.kind, key, fill)


def _ask_sets(work: _Work, part: _Part, journal: Path) -> _Asked:
    """Ask what the journal does not hold yet; returns records by the judges that need no model.

    Raises:
        SeawallError: too many prompts stay unanswered, or all of a set.
    """
    questions = {_name(item, prompt.id): _question(work, item, prompt) for item in part.sets for prompt in item.prompts}
    with ReplyJournal(journal) as replies:
        missing = [name for name in questions if name not in replies.kept]
        if len(missing) < len(questions):
            since = min(kept.time for kept in replies.kept.values())
            work.say(f"{len(questions) - len(missing)} replies of an interrupted measurement are kept (since {since})")
        if missing:
            work.client.check()
        unanswered = _ask(work, part, replies, {name: questions[name] for name in missing}, len(questions))
    kept = replies.kept
    records: list[EvaluationRecord] = []
    judges = [judge for judge in create_panel(work.config.evaluate.judges) if not judge.needs_model]
    for item in part.sets:
        prompts = [prompt for prompt in item.prompts if _name(item, prompt.id) in kept]
        if not prompts:
            raise SeawallError(
                f"Expected set `{item.name}` to have at least one reply, but got none. Lower "
                "endpoint.max_unanswered to see why."
            )
        answers = [to_reply(kept[_name(item, prompt.id)].answer, prompt.prefill) for prompt in prompts]
        records += make_records(replace(item, prompts=prompts), answers, judges=judges)
    times = sorted(kept[name].time for name in questions if name in kept)
    return _Asked(records, unanswered, _usage([kept[n].answer for n in questions if n in kept]), times[0], times[-1])


def _ask(work: _Work, part: _Part, replies: ReplyJournal, questions: dict[str, Question], total: int) -> list[str]:
    """Write down a reply to every question; returns the names of those that have none."""
    names, unanswered = list(questions), []
    done, bar = total - len(questions), work.bars(part.title) if work.bars else None
    allowed = work.config.endpoint.max_unanswered
    for number, outcome in ask_all(work.client, list(questions.values())):
        done += 1
        if isinstance(outcome, SeawallError):
            unanswered.append(names[number])
            if len(unanswered) > allowed:
                raise SeawallError(
                    f"{outcome} {len(unanswered)} of {total} prompts have no reply, and `endpoint.max_unanswered` "
                    f"allows {allowed}. The {len(replies.kept)} replies so far are kept: the same command goes on with "
                    "them."
                )
        else:
            replies.append(names[number], outcome)
        if bar is not None:
            bar(done, total)
    return unanswered


def _question(work: _Work, item: EvaluationSet, prompt: Any) -> Question:
    return question_of(
        prompt,
        work.config.endpoint,
        system=work.config.model.system,
        max_new_tokens=_limit(work.config.evaluate, item),
        temperature=work.config.endpoint.temperature,
        seed=work.config.seed,
    )


def _name(item: EvaluationSet, prompt_id: str) -> str:
    return f"{item.role}/{item.name}/{prompt_id}"


def _usage(answers: Sequence[Any]) -> dict[str, int]:
    """Return tokens as the server counted them, and how many replies it did not count."""
    prompt = sum(answer.prompt_tokens or 0 for answer in answers)
    reply = sum(answer.num_tokens or 0 for answer in answers)
    uncounted = sum(answer.num_tokens is None or answer.prompt_tokens is None for answer in answers)
    return {"evaluate": prompt + reply, "evaluate_reply": reply, "replies_without_usage": uncounted}
