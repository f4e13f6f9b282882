"""Measuring a model: replies, verdicts, rates, cost; found again when nothing that decides them has changed."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datamodules.catalog import evaluation_prompts
from datamodules.embedded_sets import benign_examples
from datamodules.layouts import read_pairs
from datamodules.readers import find_file
from datamodules.tasks import create_task
from experiments.fingerprints import LATER_SETTINGS, content_hashes, embedded_hash, tokenizer_hashes, versions
from framework.chat import ChatEncoder
from framework.config import EvaluateConfig
from framework.cost import CostLedger
from framework.errors import ConfigError, DataError
from framework.evaluation.likelihood import ChoiceItem, mean_nll, read_bbh, read_mmlu, score_choices
from framework.evaluation.margin import refusal_margin
from framework.evaluation.metrics import Rate, rates_from_records
from framework.evaluation.panel import add_verdicts, create_panel, panel_metrics
from framework.evaluation.records import EvaluationRecord, write_samples
from framework.evaluation.suite import EvaluationResult, EvaluationSet, evaluate_model
from framework.evaluation.verdict_cache import VerdictCache, judge_identity, verdict_cache
from framework.examples import Prompt
from framework.files import ArtifactStore, hash_file, read_json, to_plain, write_json
from framework.models import LoadedModel, ModelSpec, choose_device, load_model, resolved_dtype
from framework.processes import is_main, main_first, on_main, rank, world_size, writing_together

__all__ = [
    "Bars",
    "Measurement",
    "Subject",
    "TaskChoice",
    "all_rates",
    "check_evaluation",
    "choice_items",
    "deciding_settings",
    "evaluation_sets",
    "image_hash",
    "judge_identities",
    "judge_replies",
    "limited_encoder",
    "measure_model",
    "stored_measurement",
]

FORMAT = 1
MARGIN_PROMPTS = 20
LIKELIHOOD_BATCH = 16

Bars = Callable[[str], Callable[[int, int], None]]
"""Opens a progress bar by name; what it returns is called with (done, total)."""


@dataclass(frozen=True)
class TaskChoice:
    """The downstream task a model is measured on."""

    name: str
    path: str | None = None


@dataclass(frozen=True)
class Subject:
    """The model that is measured, and how it is run."""

    spec: ModelSpec
    fingerprint: str
    """Of its weights."""
    system: str | None
    """System message."""
    accelerator: str = "auto"
    """As Lightning spells it; decides the device that generates."""


@dataclass(frozen=True)
class Measurement:
    """What was measured of one model."""

    metrics: dict[str, Any]
    """Key to value, with numerator, denominator and interval for rates."""
    cost: dict[str, Any]
    samples: Path
    """JSONL, one line per prompt."""
    is_reused: bool = False


def evaluation_sets(config: EvaluateConfig, task: TaskChoice | None) -> list[EvaluationSet]:
    """Return the prompt sets of a config.

    Args:
        config: the ``evaluate`` section.
        task: the run's downstream task; None measures none.

    Raises:
        ConfigError: nothing is left to measure.
    """
    sets = [
        EvaluationSet(name, "safety", _limited(evaluation_prompts(name, kind="safety"), config.limit))
        for name in config.safety
    ]
    sets += [
        EvaluationSet(name, "over_refusal", _limited(evaluation_prompts(name, kind="over_refusal"), config.limit))
        for name in config.over_refusal
    ]
    if config.task and task is not None:
        chosen = create_task(task.name, Path(task.path) if task.path else None)
        prompts = chosen.test_prompts(count=config.task_count or config.limit)
        sets.append(
            EvaluationSet(
                chosen.name,
                "task",
                prompts,
                max_new_tokens=min(chosen.max_new_tokens, config.max_new_tokens),
                is_correct=chosen.is_correct,
            )
        )
    if not sets:
        raise ConfigError("Expected `evaluate` to name at least one set, but got none. Add one to `evaluate.safety`.")
    return sets


def check_evaluation(config: EvaluateConfig, task: TaskChoice | None) -> None:
    """Open everything an evaluation will read, so that a wrong path shows before hours of training.

    Raises:
        ConfigError: nothing to measure, or an unknown name.
        DataError: a file that is missing, empty or malformed.
        ModelError: a guard model that is not there.
    """
    judge_identities(config)
    evaluation_sets(config, task)
    for name in config.nll:
        read_pairs(find_file(name), kind="benign")
    for name in config.multiple_choice:
        choice_items(name)


def measure_model(
    spec: ModelSpec,
    model_fingerprint: str,
    config: EvaluateConfig,
    *,
    task: TaskChoice | None,
    system: str | None,
    artifacts: ArtifactStore,
    accelerator: str = "auto",
    bars: Bars | None = None,
) -> Measurement:
    """Return a model's metrics, from the store when they were measured before; attacks are measured apart.

    With several processes each of them calls this: all of them generate, the first one judges, computes likelihoods and
    margins, and writes. The numbers are those of one process.

    Args:
        spec: the model.
        model_fingerprint: of its weights.
        config: what is measured.
        task: downstream task.
        system: system message.
        artifacts: where measurements are kept.
        accelerator: as Lightning spells it; decides the device that generates.
        bars: shows how far replies and scores are.
    """
    sets = main_first(lambda: evaluation_sets(config, task))
    key = {
        "format": FORMAT,
        "model": model_fingerprint,
        "tokenizer": on_main(lambda: tokenizer_hashes(Path(spec.name))),
        "dtype": resolved_dtype(spec.dtype),
        "system": system,
        "config": deciding_settings(config),
        "embedded": embedded_hash(),
        "files": content_hashes([str(find_file(name)) for name in (*config.nll, *config.multiple_choice)]),
        "versions": versions(),
        "sets": [[s.name, s.role, [(p.id, p.text, p.answer, *image_hash(p)) for p in s.prompts]] for s in sets],
        # By what they are, not by name: a changed rule or another classifier never meets old verdicts.
        "judges": main_first(lambda: judge_identities(config)),
    }
    subject = Subject(spec, model_fingerprint, system, accelerator)

    def measure(folder: Path) -> None:
        _measure(subject, config, sets, folder, bars, verdict_cache(artifacts))

    return stored_measurement(artifacts, "measurement", key, measure)


def image_hash(prompt: Prompt) -> tuple[str, ...]:
    """Return the hash of a prompt's image, or nothing, which leaves the key of a text alone as it always was."""
    return () if prompt.image is None else (hash_file(prompt.image),)


def deciding_settings(config: EvaluateConfig) -> dict[str, Any]:
    """Return the settings that decide the numbers of ``measure_model``; an attack is measured apart."""
    left_out = ("after", "batch_size", *LATER_SETTINGS)
    return {name: value for name, value in to_plain(config).items() if name not in left_out}


def stored_measurement(artifacts: ArtifactStore, kind: str, key: Any, measure: Callable[[Path], None]) -> Measurement:
    """Return what the store holds under ``key``, after ``measure`` wrote it there when it was missing.

    Args:
        artifacts: the store.
        kind: of the artefact.
        key: everything that decides the numbers.
        measure: writes ``metrics.json`` and ``samples.jsonl`` into a folder; called on every process.
    """
    folder = on_main(lambda: artifacts.find(kind, key))
    reused = folder is not None
    if folder is None:
        with writing_together(artifacts, kind, key) as partial:
            measure(partial)
        gc.collect()  # before the next model is loaded
        folder = artifacts.path(kind, key)
    stored = read_json(folder / "metrics.json")
    return Measurement(stored["metrics"], stored["cost"], folder / "samples.jsonl", reused)


def _measure(
    subject: Subject,
    config: EvaluateConfig,
    sets: Sequence[EvaluationSet],
    folder: Path,
    bars: Bars | None,
    cache: VerdictCache,
) -> None:
    ledger = CostLedger("evaluate")
    judges = create_panel(config.judges)
    loaded = load_model(subject.spec)
    loaded.model.to(choose_device(subject.accelerator))  # type: ignore[arg-type]
    prompts = [prompt for item in sets for prompt in item.prompts]
    encoder, num_truncated = limited_encoder(loaded, config, prompts, subject.system)
    with ledger.measure("evaluate"):
        result = judge_replies(loaded, encoder, config, sets, bars("") if bars else None)
        metrics = {key: to_plain(rate) for key, rate in {**result.overall, **result.rates}.items()}
        metrics |= on_main(lambda: _likelihoods(loaded.model, encoder, config, bars))
    if not is_main():
        return
    _count_tokens(ledger, loaded, encoder, prompts, result)
    cost = ledger.to_dict() | {"seconds_by_set": result.seconds_by_set, "truncated_prompts": num_truncated}
    records: Sequence[EvaluationRecord] = result.records
    if len(judges) > 1:
        del loaded  # a guard model takes its place in memory
        gc.collect()
        late = [judge for judge in judges if judge.needs_model]
        records = add_verdicts(records, late, order=[judge.name for judge in judges], cache=cache)
        metrics |= {key: to_plain(rate) for key, rate in all_rates(records).items()} | panel_metrics(records)
    write_samples(folder / "samples.jsonl", records)
    write_json(folder / "metrics.json", {"metrics": metrics, "cost": cost})


def judge_replies(
    loaded: LoadedModel,
    encoder: ChatEncoder,
    config: EvaluateConfig,
    sets: Sequence[EvaluationSet],
    progress: Callable[[int, int], None] | None,
) -> EvaluationResult:
    """Return a model's replies to every prompt, judged by those judges that need no model; on every process.

    Args:
        loaded: the model, on its device.
        encoder: renders the conversations.
        config: judges, batch size and length of replies.
        sets: prompts.
        progress: called with (done, total) in granted tokens.
    """
    return evaluate_model(
        loaded.model,
        encoder,
        sets,
        judges=[judge for judge in create_panel(config.judges) if not judge.needs_model],
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
        progress=progress,
        rank=rank(),
        world_size=world_size(),
    )


def all_rates(records: Sequence[EvaluationRecord]) -> dict[str, Rate]:
    """Return the rates over all records, and those of each set behind its name."""
    rates = rates_from_records(records)
    for name in dict.fromkeys(record.set_name for record in records):
        own = rates_from_records([record for record in records if record.set_name == name])
        rates |= {f"{name}/{key}": rate for key, rate in own.items()}
    return rates


def judge_identities(config: EvaluateConfig) -> list[dict[str, Any]]:
    """Return what the judges are, the weights of guard models included; one that is not there is refused."""
    return [judge_identity(judge) for judge in create_panel(config.judges)]


def limited_encoder(
    loaded: LoadedModel, config: EvaluateConfig, prompts: Sequence[Prompt], system: str | None
) -> tuple[ChatEncoder, int]:
    """Return the encoder and how many prompts it cuts from the left; none unless the config asks for it.

    Args:
        loaded: model and tokenizer.
        config: what happens to long prompts, and how long replies are.
        prompts: all that will be encoded.
        system: system message.

    Raises:
        ConfigError: replies of that length leave no room for a prompt.
    """
    whole = ChatEncoder(loaded.tokenizer, system=system, processor=loaded.processor)
    context = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    if config.overflow == "error" or context is None:
        return whole, 0
    limit = context - config.max_new_tokens
    if limit < 1:
        raise ConfigError(
            f"Expected `evaluate.max_new_tokens` to leave room in the model's context of {context} tokens, but got "
            f"{config.max_new_tokens}."
        )
    lengths = [len(whole.encode_prompt(prompt.messages, prefill=prompt.prefill)) for prompt in prompts]
    encoder = ChatEncoder(loaded.tokenizer, system=system, max_prompt_tokens=limit, processor=loaded.processor)
    return encoder, sum(length > limit for length in lengths)


def _count_tokens(
    ledger: CostLedger,
    loaded: LoadedModel,
    encoder: ChatEncoder,
    prompts: Sequence[Prompt],
    result: EvaluationResult,
) -> None:
    prompt_tokens = sum(len(encoder.encode_prompt(prompt.messages, prefill=prompt.prefill)) for prompt in prompts)
    ledger.add_evaluation(loaded.model, prompt_tokens=prompt_tokens, reply_tokens=result.generated_tokens)


def _likelihoods(model: Any, encoder: ChatEncoder, config: EvaluateConfig, bars: Bars | None) -> dict[str, Any]:
    metrics: dict[str, Any] = {}
    # Scored replies need logits over the vocabulary at every token, generated ones only at the last.
    batch = min(config.batch_size, LIKELIHOOD_BATCH)

    def bar(name: str) -> Callable[[int, int], None] | None:
        return bars(name) if bars else None

    if config.safety:
        prompts = evaluation_prompts("embedded", kind="safety", split="validation")[:MARGIN_PROMPTS]
        margin = refusal_margin(model, encoder, prompts, batch_size=batch, progress=bar("refusal margin"))
        metrics["refusal_margin"] = {"value": margin.mean, "denominator": margin.num_prompts, "unit": "nats"}
    if config.benign_nll:
        nll = mean_nll(model, encoder, benign_examples("validation"), batch_size=batch, progress=bar("benign NLL"))
        metrics["benign_nll"] = to_plain(nll)
    for name in config.nll:
        pairs = read_pairs(find_file(name), kind="benign")
        found = mean_nll(model, encoder, pairs, batch_size=batch, progress=bar(f"NLL of {Path(name).name}"))
        metrics[f"nll/{name}"] = to_plain(found)
    for name in config.multiple_choice:
        shown = bar(f"choices of {Path(name).name}")
        scored = score_choices(model, encoder, choice_items(name), batch_size=batch, progress=shown)
        metrics[f"choice_accuracy/{name}"] = to_plain(scored.accuracy)
    return metrics


def choice_items(name: str) -> list[ChoiceItem]:
    """Return the multiple-choice items of a file or folder: CSV in the layout of MMLU, JSON in that of BBH.

    Raises:
        DataError: nothing of the kind is there.
    """
    path = find_file(name)
    files = sorted(p for p in path.rglob("*") if p.suffix in (".csv", ".json")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"Expected `{path}` to hold .csv or .json files of multiple-choice items, but got none.")
    return [item for file in files for item in (read_mmlu(file) if file.suffix == ".csv" else read_bbh(file))]


def _limited(prompts: Sequence[Prompt], limit: int | None) -> list[Prompt]:
    """Return at most ``limit`` prompts, drawn evenly: sets are sorted by topic, so the first ones are not a sample."""
    if limit is None or limit >= len(prompts):
        return list(prompts)
    return [prompts[i] for i in sorted(random.Random(0).sample(range(len(prompts)), limit))]
