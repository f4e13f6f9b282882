"""Mining: rollouts of harmful and harmless prompts, judged and counted; what is in the store is not made again.

A prompt is judged as soon as its rollouts are in. Where a judge loads a language model, that would be a load for every
prompt, beside the mined model: then the rollouts of all prompts are made up to their next look, the mined model leaves
its fast device, and all of them are judged in one call. A fixed number of rollouts has one look.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from datamodules.mining.engine import Rollout, RolloutJob, RolloutLimits, make_rollouts
from datamodules.mining.hardness import Hardness, Outcome, StopRule, count_outcomes, settled_count
from datamodules.mining.judging import RolloutVerdict, judge_rollouts
from datamodules.mining.pool import mining_pools
from datamodules.mining.selection import MinedPrompt, MinedReply, MinedSets
from datamodules.mining.store import RolloutStore, StoredRollout, prompt_digest
from framework.chat import ChatEncoder
from framework.errors import DataError
from framework.evaluation.judges import Judge
from framework.evaluation.panel import create_panel
from framework.evaluation.verdict_cache import VerdictCache, verdict_cache
from framework.examples import Prompt, Turn
from framework.files import ArtifactStore, fingerprint
from framework.mining_settings import MiningSettings
from framework.reference import on_fast_device, reference_mode

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Miner", "MiningProgress", "Target", "mine_sets"]

Target = Literal["safe", "refusal"]
"""safe: any coherent reply that is not harmful; refusal: one that refuses as well."""
MiningProgress = Callable[[int, int], None]
"""Called with (done, total) in rollouts."""
FILE = "rollouts.jsonl"
PROBE = "Hello."
"""Rendered to tell chat templates and system messages apart; part of what a store is known by."""


def mine_sets(
    model: PreTrainedModel,
    encoder: ChatEncoder,
    settings: MiningSettings,
    *,
    model_key: str,
    artifacts: ArtifactStore,
    target: Target = "safe",
    has_benign: bool = True,
    progress: MiningProgress | None = None,
) -> MinedSets:
    """Return everything mined, sampling what the store lacks.

    An adapter is switched off meanwhile; the model comes back as it was.

    Args:
        model: the model that is mined.
        encoder: renders the conversations.
        settings: what is mined and how.
        model_key: fingerprint of the model's weights.
        artifacts: holds rollouts (unless ``settings.store`` names a folder) and verdicts.
        target: which rollouts of a harmful prompt may be learnt.
        has_benign: False leaves the harmless prompts out.
        progress: called with (done, total).

    Raises:
        ConfigError: unknown or unreadable sets, unknown judges, more prompts than there are, or no judge that knows
            refusals where they are needed.
        DataError: the store is another model's or damaged, or a prompt does not fit the model.
        SeawallError: a judge failed or refuses to decide.
    """
    pools = mining_pools(settings, has_benign=has_benign)
    rules = {
        "harmful": StopRule(settings.rollouts, settings.hard_rate, is_adaptive=settings.adaptive),
        "benign": StopRule(settings.benign_rollouts, settings.hard_rate, is_adaptive=False),
    }
    key = _store_key(model, encoder, settings, model_key)
    folder = Path(settings.store) if settings.store else artifacts.path("rollouts", key)
    judges, cache = create_panel(settings.judges), verdict_cache(artifacts)
    needs_refusals = has_benign or target == "refusal"
    with reference_mode(model), RolloutStore(folder / FILE, key) as store:
        miner = Miner(model, encoder, settings, judges=judges, cache=cache, store=store, needs_refusals=needs_refusals)
        found = miner.mine({name: (pool, rules[name]) for name, pool in pools.items()}, progress=progress)
    return MinedSets(
        tuple(_mined_harmful(prompt, rollouts, target) for prompt, rollouts in found["harmful"]),
        tuple(_mined_benign(prompt, rollouts) for prompt, rollouts in found.get("benign", [])),
        model_key,
        template_key(encoder),
    )


def template_key(encoder: ChatEncoder) -> str:
    """Return by what a chat template with its system message and end tokens is known."""
    return fingerprint([encoder.encode_prompt([Turn("user", PROBE)]), list(encoder.stop_ids)])


def _store_key(
    model: PreTrainedModel, encoder: ChatEncoder, settings: MiningSettings, model_key: str
) -> dict[str, Any]:
    """Return what decides the rollouts of any prompt; the text of each is known by a digest of its own."""
    return {
        "model": model_key,
        "dtype": str(next(model.parameters()).dtype),
        # Not a mined prompt: other sets or more templates leave the rollouts there are as good as they were.
        "template": template_key(encoder),
        "max_new_tokens": settings.max_new_tokens,
        "temperature": float(settings.temperature),
        "seed": settings.mining_seed,
    }


Judged = tuple[StoredRollout, RolloutVerdict]


class _Task:
    """One prompt while it is mined."""

    def __init__(self, prompt: Prompt, ids: list[int], rule: StopRule) -> None:
        self.prompt, self.ids, self.rule = prompt, ids, rule
        self.digest = prompt_digest(ids)
        self.judged: dict[int, Judged] = {}
        self.running: set[int] = set()
        self.waiting: list[StoredRollout] = []
        """Stored and not judged yet; judged together before the next look."""

    def outcomes(self) -> list[Outcome]:
        """Return the outcomes of the rollouts 0, 1, 2 … up to the first that is missing."""
        found: list[Outcome] = []
        while len(found) in self.judged:
            found.append(_outcome(self.judged[len(found)][1]))
        return found

    @property
    def settled(self) -> int | None:
        """How many rollouts count; None while more are needed."""
        return settled_count(self.outcomes(), self.rule)

    def wanted(self) -> list[int]:
        """Return the numbers of the rollouts to be made before the next look."""
        if self.settled is not None:
            return []
        whole = len(self.outcomes())
        look = next(look for look in self.rule.looks() if look > whole)
        there = {*self.judged, *self.running, *(rollout.number for rollout in self.waiting)}
        return [i for i in range(look) if i not in there]


class Miner:
    """Makes, judges and stores the rollouts that are missing."""

    def __init__(
        self,
        model: PreTrainedModel,
        encoder: ChatEncoder,
        settings: MiningSettings,
        *,
        judges: Sequence[Judge],
        cache: VerdictCache | None,
        store: RolloutStore,
        needs_refusals: bool = False,
    ) -> None:
        """Keep what is needed; ``store`` is open, and a judge has to know refusals if they are needed."""
        self.model, self.encoder, self.settings = model, encoder, settings
        self.judges, self.cache, self.store = judges, cache, store
        self._needs_refusals = needs_refusals
        self._in_rounds = any(judge.needs_model for judge in judges)
        self.num_made = 0
        """Rollouts made by this miner, apart from those found in the store."""

    def mine(
        self, sides: Mapping[str, tuple[Sequence[Prompt], StopRule]], *, progress: MiningProgress | None = None
    ) -> dict[str, list[tuple[Prompt, list[Judged]]]]:
        """Return the rollouts that count, with their verdicts, for every prompt of every side, in order.

        Progress is over what was missing at the start, so that the time left is that of this run.

        Raises:
            ConfigError: refusals are needed, and no judge knows them.
            DataError: a prompt stands on two sides, or as ``mine_sets``.
            SeawallError: a judge failed or refuses to decide.
        """
        tasks = {
            name: [_Task(p, self.encoder.encode_prompt(p.messages, prefill=p.prefill), rule) for p in prompts]
            for name, (prompts, rule) in sides.items()
        }
        every = {task.prompt.id: task for side in tasks.values() for task in side}
        if len(every) < sum(map(len, tasks.values())):
            raise DataError(
                "Expected harmful and harmless prompts to have ids of their own, but got some on both sides. Ids are "
                "made of a file's name: give the files of `harmful` and `benign` different names."
            )
        self._take_stored(list(every.values()))
        tally = _Tally(sum(map(_left, every.values())), progress)
        while open_tasks := [task for task in every.values() if task.settled is None]:
            self._sample(every, open_tasks, tally)
            if self._in_rounds:
                self._judge_round(open_tasks, tally)
        return {name: [(task.prompt, _counting(task)) for task in side] for name, side in tasks.items()}

    # ---- private ------------------------------------------------------------------------------------------------

    def _take_stored(self, tasks: Sequence[_Task]) -> None:
        """Take what the store holds and judge it, all at once: most of it was judged before.

        In rounds it is judged together with what the first round makes.
        """
        for task in tasks:
            found = self.store.rollouts(task.prompt.id, task.digest)
            task.waiting += [rollout for number, rollout in found.items() if number < task.rule.most]
        if not self._in_rounds:
            self._judge(tasks)

    def _judge(self, tasks: Sequence[_Task]) -> None:
        """Judge everything that waits, in one call of each judge."""
        found = [(task, rollout) for task in tasks for rollout in task.waiting]
        if not found:
            return
        pairs = [(task.prompt, rollout.reply) for task, rollout in found]
        verdicts = judge_rollouts(self.judges, pairs, cache=self.cache, needs_refusals=self._needs_refusals)
        # What a judge knows shows in its first verdicts; one that knows may still be silent on some replies.
        self._needs_refusals = False
        for (task, rollout), verdict in zip(found, verdicts, strict=True):
            task.judged[rollout.number] = (rollout, verdict)
        for task in tasks:
            task.waiting.clear()

    def _judge_round(self, tasks: Sequence[_Task], tally: _Tally) -> None:
        before = sum(map(_left, tasks))
        with _off_gpu(self.model):
            self._judge(tasks)
        tally.add(before - sum(map(_left, tasks)))

    def _sample(self, every: Mapping[str, _Task], tasks: Sequence[_Task], tally: _Tally) -> None:
        """Make the rollouts that ``tasks`` lack: up to the next look in rounds, else until each of them is settled."""
        jobs = _Jobs([task for task in tasks if task.wanted()])
        if not jobs.has_work:
            return
        given = self.settings
        limits = RolloutLimits(
            tuple(self.encoder.stop_ids), given.max_new_tokens, given.temperature, given.mining_seed, given.rows
        )
        prompts = {name: task.ids for name, task in every.items()}
        with on_fast_device(self.model):
            for rollout in make_rollouts(self.model, prompts, jobs.take, limits):
                task = every[rollout.job.prompt]
                stored, before = self._stored(task, rollout), _left(task)
                self.store.add([stored])
                self.num_made += 1
                task.running.discard(stored.number)
                task.waiting.append(stored)
                if not task.running and not self._in_rounds:
                    self._judge([task])
                    jobs.refresh(task)
                tally.add(before - _left(task))

    def _stored(self, task: _Task, rollout: Rollout) -> StoredRollout:
        ids = rollout.ids[:-1] if rollout.finished else rollout.ids
        tokenizer = self.encoder.tokenizer
        text = str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        # A cut in the middle of a character leaves the sign for a broken one.
        text = text.strip() if rollout.finished else text.rstrip("�").strip()
        job = rollout.job
        return StoredRollout(job.prompt, task.digest, job.number, text, len(rollout.ids), rollout.finished)


class _Jobs:
    """What is to be made next: prompts in order, so that few are under way at once."""

    def __init__(self, tasks: Sequence[_Task]) -> None:
        self._waiting = deque(tasks)
        self._ready: deque[RolloutJob] = deque()

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._ready)

    def take(self) -> RolloutJob | None:
        """Return the next rollout to be made, opening the next prompt when those under way have none."""
        while not self._ready and self._waiting:
            self.refresh(self._waiting.popleft())
        return self._ready.popleft() if self._ready else None

    def refresh(self, task: _Task) -> None:
        """Line up what a prompt needs before its next look, unless rollouts of it are still running."""
        if task.running:
            return
        numbers = task.wanted()
        task.running.update(numbers)
        self._ready.extend(RolloutJob(task.prompt.id, number) for number in numbers)


class _Tally:
    """Rollouts that are done with; one that an adaptive number saves is done with, too."""

    def __init__(self, total: int, progress: MiningProgress | None) -> None:
        self.done, self.total, self.progress = 0, total, progress

    def add(self, count: int) -> None:
        self.done += count
        if count and self.progress is not None:
            self.progress(self.done, self.total)


@contextlib.contextmanager
def _off_gpu(model: PreTrainedModel) -> Iterator[None]:
    """Leave the memory of a GPU to others inside the block; a model elsewhere stays where it is."""
    before = next(model.parameters()).device
    try:
        if before.type == "cuda":
            model.to("cpu")  # type: ignore[arg-type]
        yield
    finally:
        if before.type == "cuda":
            model.to(before)  # type: ignore[arg-type]


def _left(task: _Task) -> int:
    """Return how many rollouts a prompt may still take."""
    return 0 if task.settled is not None else task.rule.most - len(task.judged) - len(task.waiting)


def _counting(task: _Task) -> list[Judged]:
    """Return the rollouts that count: those up to where the prompt was settled, whatever else is in the store."""
    return [task.judged[i] for i in range(task.settled or 0)]


def _outcome(verdict: RolloutVerdict) -> Outcome:
    if verdict.harmful:
        return "harmful"
    is_safe = verdict.harmful is False and verdict.coherent
    return "safe" if is_safe else "split"


def _mined_harmful(prompt: Prompt, judged: Sequence[Judged], target: Target) -> MinedPrompt:
    outcomes = tuple(_outcome(verdict) for _, verdict in judged)
    targets = [
        MinedReply(rollout.number, rollout.reply, rollout.finished)
        for rollout, verdict in judged
        if _outcome(verdict) == "safe" and rollout.reply and (target == "safe" or verdict.refused)
    ]
    return MinedPrompt(prompt, count_outcomes(outcomes), tuple(targets), outcomes)


def _mined_benign(prompt: Prompt, judged: Sequence[Judged]) -> MinedPrompt:
    """Return a harmless prompt: ``harmful`` counts its refused rollouts."""
    is_answer = [verdict.refused is False and verdict.coherent and bool(r.reply) for r, verdict in judged]
    refused = sum(bool(verdict.refused) for _, verdict in judged)
    counts = Hardness(refused, sum(is_answer), len(judged))
    targets = [MinedReply(r.number, r.reply, r.finished) for (r, _), ok in zip(judged, is_answer, strict=True) if ok]
    return MinedPrompt(prompt, counts, tuple(targets))
