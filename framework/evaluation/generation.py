"""Batched replies of a causal language model, with its own decode loop.

What it does beyond ``model.generate``, at the same tokens: the ids that all prompts share at their start (usually the
template's system turn) are computed once; the cache is allocated once instead of growing by a copy at every step; rows
that have ended leave the batch; the vocabulary is only computed where a token is chosen.

Sampling draws one uniform number per row and step from a generator seeded by (seed, prompt number), and inverts the
distribution with it: a sampled reply does not depend on which other prompts shared its batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from framework.chat import ChatEncoder
from framework.errors import ConfigError, DataError, SeawallError, WiringError
from framework.evaluation.decoding import DecodeState, check_prompts, evaluating, prefill, shared_prefix
from framework.evaluation.image_generation import generate_image_ids
from framework.examples import Prompt
from framework.processes import gather

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Reply", "Share", "generate_ids", "generate_replies", "generate_sharded", "sample_ids"]

Progress = Callable[[int, int], None]
"""Called with (done, total), both in new tokens granted to all prompts together."""


class Reply(NamedTuple):
    """What the model said to one prompt."""

    text: str
    """The reply without its end token; opens with the prompt's ``prefill``."""
    num_tokens: int
    """Tokens generated, the end token included, the prefill not."""
    finished: bool
    """True if an end token came before the limit."""


class _Budget(NamedTuple):
    max_new_tokens: int
    temperature: float
    seed: int


class Share(NamedTuple):
    """Which batches a process generates: ``rank``, ``rank + world_size`` and so on.

    Whole batches are dealt, not single prompts: each has the same rows on any number of processes, so not even rounding
    tells a shared evaluation from one on a single process.
    """

    rank: int = 0
    world_size: int = 1

    def batches(self, order: Sequence[int], batch_size: int) -> list[Sequence[int]]:
        """Return this process's batches of the rows ``order``; empty when there are fewer batches than processes.

        Example:
            >>> Share(1, 2).batches(range(7), 2)
            [range(2, 4), range(6, 7)]
        """
        starts = range(0, len(order), batch_size)[self.rank :: self.world_size]
        return [order[start : start + batch_size] for start in starts]


def generate_ids(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: Sequence[int],
    max_new_tokens: int = 256,
    batch_size: int = 32,
    temperature: float = 0.0,
    seed: int = 0,
    numbers: Sequence[int] | None = None,
    progress: Progress | None = None,
    share: Share = Share(),  # noqa: B008 - immutable
) -> list[list[int]]:
    """Return the ids generated for each prompt, in the order of ``prompts``.

    Args:
        model: any HF causal language model with a dynamic cache, bare or wrapped by peft.
        prompts: token ids, none empty.
        stop_ids: ids that end a row; the one that came is the row's last id.
        max_new_tokens: limit per row, in tokens.
        batch_size: rows decoded together.
        temperature: 0 is greedy; above it, the divisor of the logits before sampling.
        seed: of sampling; ignored when greedy.
        numbers: number of each prompt, which with ``seed`` decides its sample; default 0, 1, 2 …
        progress: called after every step.
        share: which batches are generated; the prompts of the others get no ids.

    Returns:
        One list of 1 to ``max_new_tokens`` ids per prompt.

    Raises:
        ConfigError: a setting is out of its range.
        DataError: no prompts, an empty one, or one that does not fit the model's context with its reply.
        WiringError: the model is under prompt learning, which has no place in a step-by-step decode.
    """
    if not temperature >= 0:
        raise ConfigError(f"Expected `temperature` to be a number ≥ 0, but got {temperature!r}. 0 is greedy.")
    check_prompts(model, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)
    budget = _Budget(max_new_tokens, temperature, seed)
    numbers = range(len(prompts)) if numbers is None else numbers
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    batches = share.batches(order, batch_size)
    replies: list[list[int]] = [[] for _ in prompts]
    total, done = sum(map(len, batches)) * max_new_tokens, 0
    if not batches:
        return replies
    with evaluating(model):
        prefix = shared_prefix(model, prompts)
        for rows in batches:
            state = prefill(model, [prompts[i] for i in rows], prefix=prefix, max_new_tokens=max_new_tokens)
            batch_numbers = [numbers[i] for i in rows]
            for outputs in _decode(state, budget, stop_ids=stop_ids, numbers=batch_numbers):
                if progress is not None:
                    progress(done + outputs, total)
            done += len(rows) * max_new_tokens
            for i, ids in zip(rows, state.outputs, strict=True):
                replies[i] = ids
    return replies


def _decode(state: DecodeState, budget: _Budget, *, stop_ids: Sequence[int], numbers: Sequence[int]) -> Iterator[int]:
    """Run ``state`` until every row has ended; yield how many of the batch's granted tokens are settled."""
    stops = torch.tensor(list(stop_ids), dtype=torch.long, device=state.logits.device)
    num_rows = len(numbers)
    uniforms = _uniforms(budget, numbers).to(state.logits.device) if budget.temperature > 0 else None
    for step in range(budget.max_new_tokens):
        if uniforms is None:
            tokens = state.logits.argmax(dim=-1)
        else:
            tokens = sample_ids(state.logits, uniforms[state.rows, step], temperature=budget.temperature)
        state.append(tokens)
        is_last = step + 1 == budget.max_new_tokens
        state.drop(torch.isin(tokens, stops))
        ended = num_rows - len(state.rows)
        running = len(state.rows) * (step + 1)
        yield ended * budget.max_new_tokens + running
        if is_last or not len(state.rows):
            return
        state.advance()


def _uniforms(budget: _Budget, numbers: Sequence[int]) -> torch.Tensor:
    """Return uniform numbers in [0, 1), float64 ``(batch, max_new_tokens)``, each row from its own generator."""
    rows = []
    for number in numbers:
        digest = hashlib.blake2b(f"{budget.seed}:{number}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
        rows.append(torch.rand(budget.max_new_tokens, generator=generator, dtype=torch.float64))
    return torch.stack(rows)


def sample_ids(logits: torch.Tensor, uniforms: torch.Tensor, *, temperature: float) -> torch.Tensor:
    """Return one id per row, int64 ``(batch,)``: where ``uniforms`` fall in the cumulative distribution of each row."""
    cumulative = torch.softmax(logits.double() / temperature, dim=-1).cumsum(dim=-1)
    targets = (uniforms * cumulative[:, -1]).unsqueeze(-1)
    return torch.searchsorted(cumulative, targets, right=True).squeeze(-1).clamp_max(logits.shape[-1] - 1)


def generate_replies(
    model: PreTrainedModel,
    encoder: ChatEncoder,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 256,
    batch_size: int = 32,
    temperature: float = 0.0,
    seed: int = 0,
    numbers: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> list[Reply]:
    """Return the model's reply to every prompt, in order.

    Args:
        model: any HF causal language model, bare or wrapped by peft.
        encoder: renders the conversations and knows the end tokens.
        prompts: at least one.
        max_new_tokens: limit per reply, in tokens.
        batch_size: prompts decoded together.
        temperature: 0 is greedy.
        seed: of sampling; the sample of prompt number ``i`` depends on (seed, i) only.
        numbers: number of each prompt; default 0, 1, 2 …
        progress: called with (done, total) in granted tokens: prompts x ``max_new_tokens``.

    Returns:
        One reply per prompt.

    Raises:
        ConfigError: a setting is out of its range.
        DataError: no prompts, or prompts that do not fit the model's context with their reply.
        WiringError: the model is under prompt learning.
    """
    budget = _Budget(max_new_tokens, temperature, seed)
    options: dict[str, Any] = {"budget": budget, "batch_size": batch_size, "progress": progress}
    found = _replies(model, encoder, prompts, share=Share(), numbers=numbers, **options)
    return [found[number] for number in range(len(prompts))]


def _replies(
    model: PreTrainedModel,
    encoder: ChatEncoder,
    prompts: Sequence[Prompt],
    *,
    budget: _Budget,
    batch_size: int,
    progress: Progress | None,
    share: Share,
    numbers: Sequence[int] | None = None,
) -> dict[int, Reply]:
    """Return the replies of one process's share by the prompt's place."""
    if any(prompt.image is not None for prompt in prompts):
        options: dict[str, Any] = {"budget": budget, "batch_size": batch_size, "share": share}
        return _replies_with_images(model, encoder, prompts, progress=progress, numbers=numbers, **options)
    encoded = [encoder.encode_prompt(prompt.messages, prefill=prompt.prefill) for prompt in prompts]
    stop_ids = encoder.stop_ids
    generated = generate_ids(
        model,
        encoded,
        stop_ids=stop_ids,
        max_new_tokens=budget.max_new_tokens,
        batch_size=batch_size,
        temperature=budget.temperature,
        seed=budget.seed,
        numbers=numbers,
        progress=progress,
        share=share,
    )
    replies = {}
    for number, ids in enumerate(generated):
        if not ids:
            continue  # another process's
        finished = ids[-1] in stop_ids
        text = _decode_text(encoder, encoded[number], ids[:-1] if finished else ids, prefill=prompts[number].prefill)
        replies[number] = Reply(text, len(ids), finished)
    return replies


def _replies_with_images(
    model: PreTrainedModel,
    encoder: ChatEncoder,
    prompts: Sequence[Prompt],
    *,
    budget: _Budget,
    batch_size: int,
    progress: Progress | None,
    share: Share,
    numbers: Sequence[int] | None,
) -> dict[int, Reply]:
    """Return the replies of one process's share, those to prompts with an image first, the others as ever."""
    drawn = range(len(prompts)) if numbers is None else numbers
    pictured = [row for row, prompt in enumerate(prompts) if prompt.image is not None]
    plain = [row for row, prompt in enumerate(prompts) if prompt.image is None]
    batches = share.batches(pictured, batch_size)
    before = sum(map(len, batches)) * budget.max_new_tokens
    total = before + sum(map(len, share.batches(plain, batch_size))) * budget.max_new_tokens
    made = generate_image_ids(
        model,
        encoder,
        [[(drawn[row], prompts[row]) for row in batch] for batch in batches],
        **budget._asdict(),
        progress=None if progress is None else lambda done: progress(done * budget.max_new_tokens, total),
    )
    replies = {}
    for row in (row for batch in batches for row in batch):
        prompt_ids, ids = made[drawn[row]]
        finished = ids[-1] in encoder.stop_ids
        text = _decode_text(encoder, prompt_ids, ids[:-1] if finished else ids, prefill=prompts[row].prefill)
        replies[row] = Reply(text, len(ids), finished)
    if plain:
        found = _replies(
            model,
            encoder,
            [prompts[row] for row in plain],
            budget=budget,
            batch_size=batch_size,
            progress=None if progress is None else lambda done, _: progress(before + done, total),
            share=share,
            numbers=[drawn[row] for row in plain],
        )
        replies |= {plain[place]: reply for place, reply in found.items()}
    return replies


def _decode_text(encoder: ChatEncoder, prompt_ids: Sequence[int], ids: Sequence[int], *, prefill: str) -> str:
    """Return ``prefill`` and the text of ``ids``; decoded as a continuation, so that a space at the seam is kept."""
    tokenizer = encoder.tokenizer

    def text(tokens: Sequence[int]) -> str:
        decoded = tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(decoded)

    if not prefill:
        return text(ids)
    before, whole = text(prompt_ids), text([*prompt_ids, *ids])
    return prefill + (whole[len(before) :] if whole.startswith(before) else text(ids))


def generate_sharded(
    model: PreTrainedModel,
    encoder: ChatEncoder,
    prompts: Sequence[Prompt],
    *,
    rank: int,
    world_size: int,
    max_new_tokens: int = 256,
    batch_size: int = 32,
    temperature: float = 0.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Reply]:
    """Return all replies on every process, each prompt generated by exactly one of them.

    Batches are those of ``generate_replies`` on one process, and so are the replies, sampled ones too. Process ``rank``
    takes the batches ``rank``, ``rank + world_size`` …; with fewer batches than processes some have none.

    Args:
        model: this process's copy.
        encoder: renders the conversations.
        prompts: the same list on every process.
        rank: number of this process, from 0.
        world_size: number of processes.
        max_new_tokens: limit per reply, in tokens.
        batch_size: prompts decoded together.
        temperature: 0 is greedy.
        seed: of sampling.
        progress: called with this process's (done, total).

    Returns:
        One reply per prompt, in order.

    Raises:
        DataError: no prompts.
        WiringError: more than one process, but no process group.
        SeawallError: a process failed (raised on all of them), or a reply is missing or was made twice.
    """
    if not prompts:
        raise DataError("Expected `prompts` to be one or more prompts, but got none.")
    if world_size > 1 and not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise WiringError(
            f"Expected an initialised process group for `world_size` {world_size}, but got none. "
            "Call `torch.distributed.init_process_group`, or generate on one process."
        )
    budget, share = _Budget(max_new_tokens, temperature, seed), Share(rank, world_size)
    shard: dict[int, Reply] | str
    try:
        shard = _replies(model, encoder, prompts, budget=budget, batch_size=batch_size, progress=progress, share=share)
    except Exception as error:
        if world_size == 1:
            raise
        # The others wait in the collective below: they are told instead of left hanging.
        shard = f"process {rank}: {type(error).__name__}: {error}"
    return merge_shards([shard] if world_size == 1 else gather(shard), len(prompts))


def merge_shards(shards: Sequence[dict[int, Reply] | str], num_prompts: int) -> list[Reply]:
    """Return the replies of all processes in prompt order.

    Args:
        shards: per process, replies by prompt number, or the text of the error it met.
        num_prompts: how many prompts there were.

    Returns:
        One reply per prompt.

    Raises:
        SeawallError: a process failed, or a reply is missing or was made twice.
    """
    failed = [shard for shard in shards if not isinstance(shard, dict)]
    if failed:
        raise SeawallError(f"Expected every process to generate its share, but got {failed[0]}.")
    numbers = [number for shard in shards if isinstance(shard, dict) for number in shard]
    if sorted(numbers) != list(range(num_prompts)):
        raise SeawallError(
            f"Expected one reply for each of {num_prompts} prompts, but got {len(numbers)} replies for "
            f"{len(set(numbers))} prompts."
        )
    merged = {number: reply for shard in shards if isinstance(shard, dict) for number, reply in shard.items()}
    return [merged[number] for number in range(num_prompts)]
