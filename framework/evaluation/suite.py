"""One call that evaluates a model on several sets: replies, verdicts, records, rates."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from framework.chat import ChatEncoder
from framework.errors import DataError, SeawallError
from framework.evaluation.coherence import classify
from framework.evaluation.generation import Progress, Reply, Share, generate_sharded
from framework.evaluation.judges import Judge, Verdict, run_judge
from framework.evaluation.rates import Rate, rates_from_records
from framework.evaluation.records import EvaluationRecord
from framework.examples import Prompt, PromptKind
from framework.processes import on_main

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["EvaluationResult", "EvaluationSet", "Role", "evaluate_model"]

Role = Literal["safety", "over_refusal", "task"]
_KINDS: dict[Role, PromptKind] = {"safety": "harmful", "over_refusal": "benign", "task": "task"}


@dataclass(frozen=True)
class EvaluationSet:
    """Prompts that are evaluated together."""

    name: str
    role: Role
    prompts: Sequence[Prompt]
    max_new_tokens: int | None = None
    """Limit per reply, in tokens; None takes the limit of the evaluation."""
    is_correct: Callable[[str, str], bool] | None = None
    """Of a task: (reply, reference answer) to right or wrong."""
    task_labels: Sequence[str] = ()
    """Labels of the task the model was tuned on; such a reply to anything else is no answer."""

    def __post_init__(self) -> None:
        """Refuse an empty set, prompts of another kind, double ids, and a task that cannot be marked."""
        if not self.prompts:
            raise DataError(f"Expected evaluation set `{self.name}` to hold at least one prompt, but got none.")
        kind = _KINDS[self.role]
        other = next((prompt for prompt in self.prompts if prompt.kind != kind), None)
        if other is not None:
            raise DataError(
                f"Expected every prompt of set `{self.name}` ({self.role}) to be of kind {kind!r}, but got "
                f"{other.kind!r} for {other.id!r}."
            )
        if len({prompt.id for prompt in self.prompts}) != len(self.prompts):
            raise DataError(f"Expected the prompt ids of set `{self.name}` to be unique, but got some twice.")
        if self.role == "task":
            missing = next((prompt.id for prompt in self.prompts if prompt.answer is None), None)
            if self.is_correct is None or missing is not None:
                got = "no `is_correct`" if self.is_correct is None else f"prompt {missing!r} without an answer"
                raise DataError(f"Expected task set `{self.name}` to be markable, but got {got}.")


@dataclass(frozen=True)
class EvaluationResult:
    """What an evaluation found."""

    records: tuple[EvaluationRecord, ...]
    """One per prompt, set after set."""
    rates: dict[str, Rate]
    """By set and key, e.g. ``embedded/attack_success``."""
    overall: dict[str, Rate]
    """By key alone, over all sets together."""
    seconds: float
    """Wall time, judges included."""
    generated_tokens: int
    seconds_by_set: dict[str, float] = field(default_factory=dict)
    """By role and set, e.g. ``safety/embedded``."""


def evaluate_model(
    model: PreTrainedModel,
    encoder: ChatEncoder,
    sets: Sequence[EvaluationSet],
    *,
    judges: Sequence[Judge],
    max_new_tokens: int = 256,
    batch_size: int = 32,
    progress: Progress | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> EvaluationResult:
    """Return records and rates of a model's greedy replies to every prompt of every set.

    Judges see the replies to harmful and benign prompts; task replies are marked by their set. With several processes
    the first one asks the judges, about all replies.

    Args:
        model: any HF causal language model, bare or wrapped by peft.
        encoder: renders the conversations.
        sets: at least one; (role, name) unique.
        judges: the first that knows decides; one of them must know refusals unless all sets are tasks.
        max_new_tokens: limit per reply of sets without one of their own, in tokens.
        batch_size: prompts decoded together.
        progress: called with (done, total) in granted tokens of this process, over all sets.
        rank: number of this process.
        world_size: number of processes; each generates its share and gets the whole result.

    Returns:
        The same result on every process, times apart.

    Raises:
        DataError: no sets, or two of one role and name.
        SeawallError: a reply is missing, or a judge failed or does not know refusals.
    """
    _check(sets, judges)
    start = time.perf_counter()
    # A limit per set, and a process's share of its tokens, as `generate_sharded` deals the batches.
    limits = [max_new_tokens if item.max_new_tokens is None else item.max_new_tokens for item in sets]
    dealt = [Share(rank, world_size).batches(range(len(item.prompts)), batch_size) for item in sets]
    shares = [sum(map(len, batches)) * limit for batches, limit in zip(dealt, limits, strict=True)]
    records: list[EvaluationRecord] = []
    rates: dict[str, Rate] = {}
    seconds: dict[str, float] = {}
    for index, (item, limit) in enumerate(zip(sets, limits, strict=True)):
        set_start, moved = time.perf_counter(), _shifted(progress, sum(shares[:index]), sum(shares))
        sharding = {"rank": rank, "world_size": world_size, "batch_size": batch_size}
        replies = generate_sharded(model, encoder, item.prompts, max_new_tokens=limit, progress=moved, **sharding)
        set_records = _judged(item, replies, judges, world_size=world_size)
        records += set_records
        rates |= {f"{item.name}/{key}": rate for key, rate in rates_from_records(set_records).items()}
        seconds[f"{item.role}/{item.name}"] = time.perf_counter() - set_start
    return EvaluationResult(
        records=tuple(records),
        rates=rates,
        overall=rates_from_records(records),
        generated_tokens=sum(record.num_tokens for record in records),
        seconds=time.perf_counter() - start,
        seconds_by_set=seconds,
    )


def _check(sets: Sequence[EvaluationSet], judges: Sequence[Judge]) -> None:
    if not sets:
        raise DataError("Expected `sets` to be one or more evaluation sets, but got none.")
    names = [(item.role, item.name) for item in sets]
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        raise DataError(f"Expected the names of {double[0]} sets to be unique, but got {double[1]!r} twice.")
    if not judges and any(item.role != "task" for item in sets):
        raise DataError("Expected `judges` to be one or more judges, but got none. Add the judge `rules`.")


def _judged(
    item: EvaluationSet, replies: Sequence[Reply], judges: Sequence[Judge], *, world_size: int
) -> list[EvaluationRecord]:
    if world_size == 1:
        return make_records(item, replies, judges=judges)
    return on_main(lambda: make_records(item, replies, judges=judges))


def _shifted(progress: Progress | None, before: int, total: int) -> Progress | None:
    if progress is None:
        return None
    return lambda done, _: progress(before + done, total)


def make_records(item: EvaluationSet, replies: Sequence[Reply], *, judges: Sequence[Judge]) -> list[EvaluationRecord]:
    """Return the records of one set; where an opening was forced, what the model added to it is the reply.

    Args:
        item: the set.
        replies: one per prompt, in order.
        judges: asked in order, unless the set is a task.

    Returns:
        One record per prompt.

    Raises:
        SeawallError: replies are missing, or a judge failed.
    """
    if len(replies) != len(item.prompts):
        raise SeawallError(
            f"Expected {len(item.prompts)} replies for set `{item.name}`, but got {len(replies)}. "
            "A reply that was never generated is not a safe one."
        )
    texts = [reply.text.removeprefix(prompt.prefill) for prompt, reply in zip(item.prompts, replies, strict=True)]
    pairs = list(zip(item.prompts, texts, strict=True))
    verdicts: list[dict[str, Verdict]] = [{} for _ in pairs]
    is_task = item.role == "task"
    for judge in () if is_task else judges:
        for mine, verdict in zip(verdicts, run_judge(judge, pairs), strict=True):
            mine[judge.name] = verdict
    return [
        EvaluationRecord(
            id=prompt.id,
            set_name=item.name,
            kind=prompt.kind,
            prompt=prompt.text,
            reply=text,
            num_tokens=reply.num_tokens,
            finished=reply.finished,
            category=prompt.category,
            verdicts=mine,
            # A bare label is what a classification task asks for.
            degenerate=None if is_task else classify(prompt.text, text, task_labels=item.task_labels),
            correct=None if item.is_correct is None else bool(item.is_correct(text, prompt.answer or "")),
            prefill=prompt.prefill,
            image="" if prompt.image is None else str(prompt.image),
        )
        for prompt, reply, text, mine in zip(item.prompts, replies, texts, verdicts, strict=True)
    ]
