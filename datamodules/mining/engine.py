"""Rollouts of many prompts at once: each prompt is read once, and a row that ends makes room for the next rollout.

What it does beyond ``generate`` with several sequences per prompt: a prompt's keys and values are computed once and
copied into the rows that continue it; what all prompts share at their start is computed once for all; rows stand at
different places of different prompts, so that a finished row is replaced at once and the batch stays full.

The randomness of a rollout comes from (seed, prompt, number) alone. Sums in a matrix product may be rounded differently
in a batch of another size, so a rollout made in other company is the same only up to rounding: nearly always the same
text, and another one where a random number falls between two neighbouring tokens. What is stored is therefore what
counts, and a stored rollout is never made again.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers.cache_utils import Cache, DynamicLayer

from framework.errors import ConfigError
from framework.evaluation.decoding import (
    DecodeState,
    SharedPrefix,
    check_prompts,
    empty_cache,
    evaluating,
    has_position_argument,
    is_plain,
    prefill,
    shared_prefix,
)
from framework.evaluation.generation import sample_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Rollout", "RolloutJob", "RolloutLimits", "make_rollouts", "rollout_uniforms"]


class RolloutJob(NamedTuple):
    """One rollout to be made."""

    prompt: str
    """Id of the prompt."""
    number: int
    """Number of the rollout among those of the prompt, from 0."""


class Rollout(NamedTuple):
    """What the model said this time."""

    job: RolloutJob
    ids: list[int]
    """Token ids, the end token included."""
    finished: bool
    """Whether the model ended it; False for one that was cut off."""


class RolloutLimits(NamedTuple):
    """How rollouts are made."""

    stop_ids: tuple[int, ...]
    max_new_tokens: int
    temperature: float
    """0 is greedy."""
    seed: int
    num_rows: int
    """Rows decoded together."""


NextJob = Callable[[], "RolloutJob | None"]
"""Gives the next rollout; None while there is none, and for good once nothing is running any more."""


def rollout_uniforms(seed: int, job: RolloutJob, count: int) -> torch.Tensor:
    """Return the random numbers of a rollout, float64 ``(count,)`` in [0, 1): a function of seed, prompt and number."""
    key = f"{seed}:{job.number}:{job.prompt}"
    digest = hashlib.blake2b(key.encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
    return torch.rand(count, generator=generator, dtype=torch.float64)


def make_rollouts(
    model: PreTrainedModel, prompts: Mapping[str, Sequence[int]], next_job: NextJob, limits: RolloutLimits
) -> Iterator[Rollout]:
    """Yield rollouts as they end.

    Args:
        model: any HF causal language model, bare or wrapped by peft.
        prompts: token ids by prompt id.
        next_job: asked whenever a row is free, so a caller may decide between two rollouts whether to go on.
        limits: length, sampling, and rows decoded together.

    Raises:
        ConfigError: a limit is out of its range.
        DataError: no prompts, an empty one, or one that does not fit the model's context with its reply.
        WiringError: the model is under prompt learning.
    """
    if not limits.temperature >= 0:
        raise ConfigError(f"Expected `temperature` to be a number ≥ 0, but got {limits.temperature!r}. 0 is greedy.")
    encoded = list(prompts.values())
    check_prompts(model, encoded, max_new_tokens=limits.max_new_tokens, batch_size=limits.num_rows)
    can_place = is_plain(empty_cache(model)) and has_position_argument(model)
    rollouts = (_refilled if can_place else _in_turns)(model, prompts, next_job, limits)
    while True:
        # The caller does something else between two rollouts; inference mode must not leak to it.
        with evaluating(model):
            rollout = next(rollouts, None)
        if rollout is None:
            return
        yield rollout


class _Row:
    """One rollout under way."""

    def __init__(self, job: RolloutJob, uniforms: torch.Tensor | None) -> None:
        self.job, self.uniforms, self.ids = job, uniforms, list[int]()


class _Started(NamedTuple):
    """A prompt that was read."""

    layers: list[tuple[torch.Tensor, torch.Tensor]]
    """Keys and values, ``(1, heads, seq, head_size)`` each."""
    logits: torch.Tensor
    """Of the first new token, ``(1, vocab)``."""
    length: int


class _Places:
    """Where each row of a batch stands; shared by the layers of its cache."""

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self.lengths = torch.zeros(num_rows, dtype=torch.long, device=device)
        """Tokens that are in the cache, by row."""
        self.rows = torch.arange(num_rows, device=device)
        self.count = 0
        """Rows in use: 0 to count - 1."""
        self.width = 1
        """Columns the longest row takes with the token being computed."""


class _PlacedLayer(DynamicLayer):
    """Keys and values of one layer, each row with a length of its own; a new token is written behind its own row."""

    def __init__(self, places: _Places, capacity: int) -> None:
        super().__init__()
        self.places, self.capacity = places, capacity

    def put(self, row: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Begin a row with the keys and values of a prompt, ``(1, heads, seq, head_size)``."""
        if not self.is_initialized:
            self.dtype, self.device = keys.dtype, keys.device
            shape = (len(self.places.rows), keys.shape[1], self.capacity, keys.shape[3])
            # Zeros: what a mask leaves out is multiplied by 0, and leftover memory may hold NaN.
            self.buffers = (keys.new_zeros(shape), values.new_zeros(shape))
            self.is_initialized = True
        for buffer, part in zip(self.buffers, (keys, values), strict=True):
            buffer[row, :, : part.shape[2]] = part[0]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy a row."""
        for buffer in self.buffers:
            buffer[target, :, :length] = buffer[source, :, :length]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one new token a row, ``(batch, heads, 1, head_size)``, and return what the rows have so far."""
        count, width = self.places.count, self.places.width
        rows, lengths = self.places.rows[:count], self.places.lengths[:count]
        for buffer, part in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[rows, :, lengths] = part[:, :, 0]
        self.keys, self.values = (buffer[:count, :, :width] for buffer in self.buffers)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Return the columns before the new token, for the longest row."""
        return self.places.width - 1


def _refilled(
    model: PreTrainedModel, prompts: Mapping[str, Sequence[int]], next_job: NextJob, limits: RolloutLimits
) -> Iterator[Rollout]:
    batch = _RefilledBatch(model, prompts, limits)
    while True:
        while len(batch.rows) < limits.num_rows and (job := next_job()) is not None:
            if (ended := batch.begin(job)) is not None:
                yield ended
        if not batch.rows:
            return
        yield from batch.step()


class _RefilledBatch:
    """Rows under way, their cache, and the prompts that were read lately."""

    def __init__(self, model: PreTrainedModel, prompts: Mapping[str, Sequence[int]], limits: RolloutLimits) -> None:
        self.model, self.prompts, self.limits = model, prompts, limits
        self.device = next(model.parameters()).device
        self.rows: list[_Row] = []
        self.places = _Places(limits.num_rows, self.device)
        capacity = max(map(len, prompts.values())) + limits.max_new_tokens
        config: Any = model.config.get_text_config(decoder=True)
        self.layers = [_PlacedLayer(self.places, capacity) for _ in range(config.num_hidden_layers)]
        self.cache = Cache(layers=list(self.layers))
        self._stops = frozenset(limits.stop_ids)
        self._common: SharedPrefix | None = shared_prefix(model, list(prompts.values()))
        self._started: OrderedDict[str, _Started] = OrderedDict()

    def begin(self, job: RolloutJob) -> Rollout | None:
        """Give a free row to ``job``; returns the rollout if its first token ended it."""
        started = self._start(job.prompt)
        row = _new_row(job, self.limits)
        token = _choose(started.logits, [row], self.limits, self.device)[0]
        row.ids.append(token)
        if self._has_ended(row):
            return self._ended(row)
        index = len(self.rows)
        for layer, (keys, values) in zip(self.layers, started.layers, strict=True):
            layer.put(index, keys, values)
        self.places.lengths[index] = started.length
        self.rows.append(row)
        return None

    def step(self) -> Iterator[Rollout]:
        """Compute one more token of every row; yields the rollouts that end with it."""
        places, count = self.places, len(self.rows)
        lengths = places.lengths[:count]
        places.count, places.width = count, int(lengths.max()) + 1
        tokens = torch.tensor([[row.ids[-1]] for row in self.rows], dtype=torch.long, device=self.device)
        columns = torch.arange(places.width, device=self.device)
        outputs: Any = self.model(
            input_ids=tokens,
            attention_mask=(columns <= lengths.unsqueeze(-1)).long(),
            position_ids=lengths.unsqueeze(-1),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        places.lengths[:count] += 1
        for row, token in zip(
            self.rows, _choose(outputs.logits[:, -1], self.rows, self.limits, self.device), strict=True
        ):
            row.ids.append(token)
        ended = [index for index, row in enumerate(self.rows) if self._has_ended(row)]
        for index in reversed(ended):
            yield self._ended(self._take_out(index))

    def _take_out(self, index: int) -> _Row:
        """Remove a row; the last one takes its place."""
        row, last = self.rows[index], len(self.rows) - 1
        if index != last:
            length = int(self.places.lengths[last])
            for layer in self.layers:
                layer.move(last, index, length)
            self.places.lengths[index] = length
            self.rows[index] = self.rows[last]
        self.rows.pop()
        return row

    def _start(self, prompt: str) -> _Started:
        """Return the keys and values of a prompt; the prompts used last are kept."""
        if prompt not in self._started:
            state = prefill(self.model, [self.prompts[prompt]], prefix=self._common, max_new_tokens=1)
            length = len(self.prompts[prompt])
            layers: list[Any] = state.cache.layers
            parts = [(layer.keys.clone(), layer.values.clone()) for layer in layers]
            self._started[prompt] = _Started(parts, state.logits, length)
            while len(self._started) > max(self.limits.num_rows, 8):
                self._started.popitem(last=False)
        self._started.move_to_end(prompt)
        return self._started[prompt]

    def _has_ended(self, row: _Row) -> bool:
        return row.ids[-1] in self._stops or len(row.ids) >= self.limits.max_new_tokens

    def _ended(self, row: _Row) -> Rollout:
        return Rollout(row.job, row.ids, row.ids[-1] in self._stops)


def _in_turns(
    model: PreTrainedModel, prompts: Mapping[str, Sequence[int]], next_job: NextJob, limits: RolloutLimits
) -> Iterator[Rollout]:
    """Yield rollouts batch after batch, for caches in which rows cannot stand at places of their own."""
    stops = torch.tensor(limits.stop_ids, dtype=torch.long)
    while True:
        jobs: list[RolloutJob] = []
        while len(jobs) < limits.num_rows and (job := next_job()) is not None:
            jobs.append(job)
        if not jobs:
            return
        rows = [_new_row(job, limits) for job in jobs]
        state: DecodeState = prefill(
            model, [prompts[job.prompt] for job in jobs], prefix=None, max_new_tokens=limits.max_new_tokens
        )
        for step in range(limits.max_new_tokens):
            running = [rows[i] for i in state.rows.tolist()]
            found = torch.tensor(
                _choose(state.logits, running, limits, state.logits.device), device=state.logits.device
            )
            for row, token in zip(running, found.tolist(), strict=True):
                row.ids.append(token)
            state.append(found)
            state.drop(torch.isin(found, stops.to(found.device)))
            if not len(state.rows) or step + 1 == limits.max_new_tokens:
                break
            state.advance()
        yield from (Rollout(row.job, row.ids, row.ids[-1] in limits.stop_ids) for row in rows)


def _new_row(job: RolloutJob, limits: RolloutLimits) -> _Row:
    is_greedy = limits.temperature == 0
    return _Row(job, None if is_greedy else rollout_uniforms(limits.seed, job, limits.max_new_tokens))


def _choose(logits: torch.Tensor, rows: Sequence[_Row], limits: RolloutLimits, device: torch.device) -> list[int]:
    """Return the next token of every row, from ``(batch, vocab)`` logits."""
    if limits.temperature == 0:
        return [int(token) for token in logits.argmax(dim=-1).tolist()]
    uniforms = torch.stack([row.uniforms[len(row.ids)] for row in rows if row.uniforms is not None]).to(device)
    return [int(token) for token in sample_ids(logits.float(), uniforms, temperature=limits.temperature).tolist()]
