"""From mined prompts to training rows: which are eligible, which are chosen, and what each is taught."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from datamodules.mining.hardness import Hardness, Outcome
from framework.errors import DataError
from framework.examples import Example, ExampleKind, Prompt, Turn

__all__ = [
    "MinedPrompt",
    "MinedReply",
    "MinedRows",
    "MinedSets",
    "Select",
    "check_eligible",
    "pick_target",
    "select_prompts",
]

Select = Literal["hard", "random", "top_share"]


class MinedReply(NamedTuple):
    """A rollout that may be learnt."""

    number: int
    reply: str
    finished: bool
    """False for one that was cut off: it is trained without an end token."""


@dataclass(frozen=True)
class MinedPrompt:
    """A prompt, its counts, and the rollouts that may be learnt."""

    prompt: Prompt
    counts: Hardness
    """Of harmful rollouts; for a harmless prompt, of refused ones."""
    targets: tuple[MinedReply, ...]
    """Safe rollouts; for a harmless prompt, those that do not refuse."""
    outcomes: tuple[Outcome, ...] = ()
    """Of the rollouts of a harmful prompt, in order; empty where only the counts are known."""


class MinedRows(NamedTuple):
    """Training rows, each list in the order it is trained in."""

    harmful: list[Example]
    benign: list[Example]


@dataclass(frozen=True)
class MinedSets:
    """Everything that was mined."""

    harmful: tuple[MinedPrompt, ...]
    benign: tuple[MinedPrompt, ...]
    key: str = ""
    """Fingerprint of the model whose rollouts these are."""
    template: str = ""
    """By what the chat template and the system message they were sampled under are known."""

    @property
    def eligible(self) -> list[MinedPrompt]:
        """Harmful prompts that break the model sometimes and have a target."""
        return [mined for mined in self.harmful if mined.counts.is_eligible and mined.targets]

    def rows(self, *, select: Select, count: int | None, share: float, seed: int, has_benign: bool = True) -> MinedRows:
        """Return the chosen harmful rows and all harmless ones.

        The target of a prompt depends on the seed and the prompt alone, so that two selections teach a prompt they
        share the same reply.

        Args:
            select: as in ``select_prompts``.
            count: as in ``select_prompts``.
            share: as in ``select_prompts``.
            seed: decides targets, the random choice, and the order of the harmless rows.
            has_benign: whether harmless rows are wanted; without them it does not matter that all were refused.

        Raises:
            DataError: nothing is eligible, fewer prompts than ``count`` are, or no harmless prompt was answered.
        """
        chosen = select_prompts(self.harmful, select=select, count=count, share=share, seed=seed)
        benign = self.benign if has_benign else ()
        answered = [mined for mined in benign if mined.targets]
        if benign and not answered:
            raise DataError(
                f"Expected the model to answer some of {len(self.benign)} harmless prompts, but got refusals or "
                "degenerate replies only: there is nothing to learn from. Name other sets with `benign`, raise "
                "`benign_rollouts` or `max_new_tokens`, align the model less, or set `ratio` to 0."
            )
        random.Random(f"benign order {seed}").shuffle(answered)
        return MinedRows(
            [_example(mined, "safety", seed=seed) for mined in chosen],
            [_example(mined, "benign", seed=seed) for mined in answered],
        )


def check_eligible(mined: Sequence[MinedPrompt]) -> list[MinedPrompt]:
    """Return the eligible prompts.

    Raises:
        DataError: there are none; says whether the prompts never or always broke the model or whether the judges do
            not agree, and what to change.
    """
    found = [one for one in mined if one.counts.is_eligible and one.targets]
    if found:
        return found
    kinds = [one.counts.prompt_class(0.0) for one in mined]
    never, always, undecided = (kinds.count(kind) for kind in ("never", "always", "undecided"))
    unusable = len(mined) - never - always - undecided
    if never == len(mined):
        got = f"all {never} never broke the model"
        remedy = "Name harder prompts with `harmful`, raise `rollouts` or `temperature`, or begin with a weaker model."
    elif always == len(mined):
        got = f"all {always} always broke the model, so there is no safe rollout to learn from"
        remedy = "Align the model first, raise `rollouts`, or name easier prompts with `harmful`."
    elif undecided > never + always + unusable:
        got = f"on {undecided} the judges do not agree, or the replies are degenerate"
        remedy = "Name one judge, or an odd number of them, with `judges`, and look at the replies in the store."
    else:
        got = (
            f"{never} never broke the model, {always} always did, on {undecided} the judges do not agree, and "
            f"{unusable} have no usable safe rollout"
        )
        remedy = "Raise `rollouts`, name other prompts with `harmful`, or take any safe reply with `target: safe`."
    raise DataError(
        f"Expected some prompts that break the model sometimes, but got {len(mined)} of which {got}. {remedy}"
    )


def select_prompts(
    mined: Sequence[MinedPrompt], *, select: Select, count: int | None, share: float, seed: int
) -> list[MinedPrompt]:
    """Return the chosen eligible prompts, in training order.

    Args:
        mined: harmful prompts.
        select: ``hard`` takes those with the highest harmful rate, hardest first; ``random`` takes random ones, in
            random order; ``top_share`` takes those of ``hard``, in random order.
        count: how many; None takes ``share``.
        share: of the eligible prompts, rounded up.
        seed: decides what is random, and the order among equal rates.

    Raises:
        DataError: nothing is eligible, or fewer prompts than ``count`` are.
    """
    eligible = check_eligible(mined)
    size = math.ceil(share * len(eligible)) if count is None else count
    if size > len(eligible):
        raise DataError(
            f"Expected {size} prompts that break the model sometimes, but got {len(eligible)} of {len(mined)}. Lower "
            "`count`, or raise `prompts` or `rollouts`."
        )
    order = list(eligible)
    random.Random(f"select {seed}").shuffle(order)
    if select == "random":
        return order[:size]
    order.sort(key=lambda one: -one.counts.rate)
    chosen = order[:size]
    if select == "top_share":
        random.Random(f"top share {seed}").shuffle(chosen)
    return chosen


def pick_target(mined: MinedPrompt, *, seed: int) -> MinedReply:
    """Return the reply a prompt is taught: a random one of its targets, fixed by the seed and the prompt."""
    targets = sorted(mined.targets)
    return random.Random(f"target {seed} {mined.prompt.id}").choice(targets)


def _example(mined: MinedPrompt, kind: ExampleKind, *, seed: int) -> Example:
    target = pick_target(mined, seed=seed)
    prompt = mined.prompt
    turn: Any = Turn("user", prompt.text)
    return Example(f"smh-{kind}-{prompt.id}", (turn,), target.reply, kind, prompt.category, is_complete=target.finished)
