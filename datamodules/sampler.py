"""Which rows make up each optimizer step, and how a step is cut into micro-batches and ranks.

A whole training run is one epoch. Its rows are a stream of passes over the data, each a seeded permutation; step ``s``
takes the next ``batch_size`` rows of the stream. What a step holds depends on the data, ``batch_size``,
``total_steps`` and the seed alone: micro-batches and processes only divide it, so runs on one device and on eight
train on the same steps.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from framework.errors import ConfigError, DataError

__all__ = ["BUCKET_STEPS", "MicroBatch", "StepBatchSampler", "compose_steps"]

BUCKET_STEPS = 16
"""Steps whose rows are sorted by length together; more would pad less but make the steps less alike in mixture."""


class MicroBatch(list[int]):
    """Row numbers of one micro-batch, with what its loss must know about the step it belongs to.

    A list, so that a data loader takes it for a batch of indices; it keeps its attributes on the way to a worker.
    """

    step: int
    """Optimizer step, from 0."""
    step_reply_tokens: int
    """Reply tokens of the whole step, over all micro-batches and ranks."""
    step_micro_batches: int
    """Micro-batches of this rank in the step."""

    def __init__(self, rows: Sequence[int], *, step: int, step_reply_tokens: int, step_micro_batches: int) -> None:
        """Hold ``rows`` of ``step``."""
        super().__init__(rows)
        self.step = step
        self.step_reply_tokens = step_reply_tokens
        self.step_micro_batches = step_micro_batches


def _pass_order(num_rows: int, number: int, *, seed: int, shuffle: bool) -> list[int]:
    """Return the row order of pass ``number``: a pure function of the seed and the number."""
    order = list(range(num_rows))
    if shuffle:
        random.Random(f"pass {seed} {number}").shuffle(order)
    return order


def _windows(num_rows: int, *, batch_size: int, total_steps: int) -> Iterator[range]:
    """Yield runs of at most ``BUCKET_STEPS`` steps that lie within one pass.

    A step that spans two passes stands alone: sorting rows of two passes together would put the two copies of a row
    side by side and so into the same step.
    """
    start = 0
    while start < total_steps:
        pass_end = (start * batch_size // num_rows + 1) * num_rows
        whole = pass_end // batch_size - start
        end = min(start + max(1, min(whole, BUCKET_STEPS)), total_steps)
        yield range(start, end)
        start = end


def compose_steps(
    lengths: Sequence[int], *, batch_size: int, total_steps: int, seed: int, bucket: bool = True, shuffle: bool = True
) -> npt.NDArray[np.int64]:
    """Return the rows of every optimizer step.

    Args:
        lengths: tokens of each row.
        batch_size: rows of a step, over all ranks.
        total_steps: optimizer steps of the run.
        seed: decides the order of each pass and of the steps in a window.
        bucket: put rows of like length into the same step, within windows of ``BUCKET_STEPS`` steps.
        shuffle: False keeps the given order exactly in every pass, and turns ``bucket`` off.

    Returns:
        Row numbers, int64 ``(steps, batch)``. Within a step rows are sorted by length, longest last, unless the given
        order is kept.

    Example:
        >>> compose_steps([5, 3, 9, 4], batch_size=2, total_steps=3, seed=0, shuffle=False).tolist()
        [[0, 1], [2, 3], [0, 1]]
    """
    num_rows = len(lengths)
    passes = -(-total_steps * batch_size // num_rows)
    stream = np.concatenate(
        [np.array(_pass_order(num_rows, number, seed=seed, shuffle=shuffle)) for number in range(passes)]
    )
    steps = stream[: total_steps * batch_size].reshape(total_steps, batch_size)
    if not shuffle:
        return steps
    length_of = np.asarray(lengths)
    if bucket:
        for window in _windows(num_rows, batch_size=batch_size, total_steps=total_steps):
            rows = steps[window.start : window.stop].ravel()
            by_length = rows[np.argsort(length_of[rows], kind="stable")].reshape(-1, batch_size)
            order = list(range(len(window)))
            random.Random(f"window {seed} {window.start}").shuffle(order)
            steps[window.start : window.stop] = by_length[order]
    # Also inside a step: the ranks and micro-batches cut from it then pad little.
    return np.take_along_axis(steps, np.argsort(length_of[steps], axis=1, kind="stable"), axis=1)


class StepBatchSampler(Sampler[list[int]]):
    """Yields the micro-batches of one rank, step by step; can start in the middle of a run."""

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        batch_size: int,
        micro_batch_size: int,
        total_steps: int,
        seed: int,
        reply_lengths: Sequence[int] | None = None,
        rank: int = 0,
        world_size: int = 1,
        bucket: bool = True,
        shuffle: bool = True,
        start_step: int = 0,
    ) -> None:
        """Compose all steps.

        Args:
            lengths: tokens of each row.
            batch_size: rows of an optimizer step, over all ranks.
            micro_batch_size: rows of one forward pass on one rank.
            total_steps: optimizer steps of the run.
            seed: decides the order of the rows.
            reply_lengths: reply tokens of each row; None when every token of a row carries loss.
            rank: this process, from 0.
            world_size: number of processes.
            bucket: put rows of like length into the same step.
            shuffle: False keeps the given order exactly.
            start_step: first step to yield, for a resumed run.

        Raises:
            DataError: there are no rows.
            ConfigError: sizes that do not divide, or a count or a rank out of range.
        """
        if not len(lengths):
            raise DataError("Expected at least one training row, but got none. Add a data source with rows.")
        _check_sizes(batch_size, micro_batch_size, world_size=world_size, rank=rank, num_rows=len(lengths))
        _check_steps(total_steps, start_step)
        self.micro_batch_size = micro_batch_size
        self.total_steps = total_steps
        self.start_step = start_step
        self.rank = rank
        self.world_size = world_size
        self.steps = compose_steps(
            lengths, batch_size=batch_size, total_steps=total_steps, seed=seed, bucket=bucket, shuffle=shuffle
        )
        """Row numbers, int64 ``(steps, batch)``."""
        self._replies = np.asarray(lengths if reply_lengths is None else reply_lengths)
        self._step_reply_tokens = self._replies[self.steps].sum(axis=1)

    @property
    def micro_batches_per_step(self) -> int:
        """Forward passes of this rank in one optimizer step."""
        return self.steps.shape[1] // self.world_size // self.micro_batch_size

    def step_reply_tokens(self, step: int) -> int:
        """Return the reply tokens of ``step``, over all micro-batches and ranks."""
        return int(self._step_reply_tokens[step])

    def plan(self, step: int) -> list[list[list[int]]]:
        """Return the row numbers of ``step`` as ``[rank][micro-batch][row]``."""
        size = self.micro_batch_size
        shares = [self.steps[step, rank :: self.world_size].tolist() for rank in range(self.world_size)]
        return [[share[i : i + size] for i in range(0, len(share), size)] for share in shares]

    def replace_steps(self, start_step: int, rows: npt.NDArray[np.int64]) -> None:
        """Let the steps from ``start_step`` on take other rows; steps already yielded stay what they were.

        Args:
            start_step: first step that changes.
            rows: row numbers for all steps from there on, int64 ``(steps x batch,)``, kept in this order.

        Raises:
            ConfigError: too few or too many rows, or a number that is no row's.
        """
        batch_size = self.steps.shape[1]
        wanted = (self.total_steps - start_step) * batch_size
        if not 0 <= start_step <= self.total_steps or len(rows) != wanted:
            raise ConfigError(
                f"Expected {max(0, wanted)} rows for the steps from {start_step} to {self.total_steps}, but got "
                f"{len(rows)}."
            )
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(self._replies):
            raise ConfigError(
                f"Expected row numbers from 0 to {len(self._replies) - 1}, but got {rows.min()} to {rows.max()}."
            )
        self.steps[start_step:] = rows.reshape(-1, batch_size)
        self._step_reply_tokens = self._replies[self.steps].sum(axis=1)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield this rank's micro-batches from ``start_step`` on, each a ``MicroBatch``."""
        for step in range(self.start_step, self.total_steps):
            for rows in self.plan(step)[self.rank]:
                yield MicroBatch(
                    rows,
                    step=step,
                    step_reply_tokens=self.step_reply_tokens(step),
                    step_micro_batches=self.micro_batches_per_step,
                )

    def __len__(self) -> int:
        """Return how many micro-batches this rank has in the whole run, ``start_step`` notwithstanding.

        A resumed trainer goes on counting batches where it stopped, and takes the run for finished when its count
        reaches this length; were it what is left, a run resumed late would end early.
        """
        return self.total_steps * self.micro_batches_per_step


def _check_sizes(batch_size: int, micro_batch_size: int, *, world_size: int, rank: int, num_rows: int) -> None:
    problems = [
        f"Expected `{name}` to be a whole number ≥ 1, but got {value!r}."
        for name, value in [
            ("batch_size", batch_size),
            ("micro_batch_size", micro_batch_size),
            ("world_size", world_size),
        ]
        if value < 1
    ]
    if problems:
        raise ConfigError(problems)
    if not 0 <= rank < world_size:
        problems.append(f"Expected `rank` to be from 0 to {world_size - 1}, but got {rank!r}.")
    if world_size > num_rows:
        problems.append(
            f"Expected at least as many rows as processes ({world_size}), but got {num_rows}. Use fewer devices."
        )
    if batch_size % world_size:
        problems.append(
            f"Expected `batch_size` to be a multiple of the number of processes ({world_size}), but got {batch_size}."
        )
    elif (batch_size // world_size) % micro_batch_size:
        problems.append(
            f"Expected `micro_batch_size` to divide the {batch_size // world_size} rows of a process in one step, "
            f"but got {micro_batch_size}."
        )
    if problems:
        raise ConfigError(problems)


def _check_steps(total_steps: int, start_step: int) -> None:
    if total_steps < 1:
        raise ConfigError(f"Expected `total_steps` to be a whole number ≥ 1, but got {total_steps!r}.")
    if not 0 <= start_step <= total_steps:
        raise ConfigError(f"Expected `start_step` to be from 0 to {total_steps}, but got {start_step!r}.")
