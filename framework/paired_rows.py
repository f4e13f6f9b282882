"""Rows of a source of their own beside a stage's rows: one is drawn for each row of a micro-batch.

Which one is decided by the seed, the optimizer step and the number of the stage's row, and by nothing else: cutting a
step into micro-batches or processes, and resuming a run, change nothing, and there is no state to keep.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch

from framework.batch import Batch, collate
from framework.chat import EncodedExample
from framework.errors import DataError, WiringError
from framework.examples import Example

__all__ = ["PairedRows", "encode_within", "read_paired_rows", "row_means"]


class PairedRows:
    """Encoded rows, and which of them stand beside the rows of a step."""

    def __init__(self, encoded: Sequence[EncodedExample], *, name: str, pad_id: int, seed: int) -> None:
        """Keep the rows.

        Args:
            encoded: the rows; in batches they go by their positions here.
            name: of the source, for messages and for its draws.
            pad_id: fills short rows.
            seed: decides what is drawn.

        Raises:
            DataError: there are no rows.
        """
        if not encoded:
            raise DataError(f"Expected source `{name}` to have rows, but got none.")
        self.encoded = list(encoded)
        self.name = name
        self.pad_id = pad_id
        self.seed = seed
        self._order: tuple[int, list[int]] = (-1, [])

    def draw(self, step: int, example_ids: Sequence[int]) -> list[int]:
        """Return the row that stands beside each row of the stage.

        Rows are shuffled anew in every step, so that within one no row comes twice before the stage's rows outnumber
        them.

        Args:
            step: optimizer steps done.
            example_ids: numbers of the stage's rows.
        """
        if self._order[0] != step:
            order = list(range(len(self.encoded)))
            random.Random(f"pair {self.seed} {self.name} {step}").shuffle(order)
            self._order = (step, order)
        return [self._order[1][example % len(self.encoded)] for example in example_ids]

    def batch(self, step: int, beside: Batch) -> Batch:
        """Return the rows that stand beside the rows of a micro-batch, as a micro-batch on its device.

        ``step_reply_tokens`` is that of these rows alone.
        """
        chosen = self.draw(step, beside.example_ids.tolist())
        rows = [self.encoded[i] for i in chosen]
        tokens = sum(row.num_reply_tokens for row in rows)
        made = collate(rows, example_ids=chosen, pad_id=self.pad_id, step_reply_tokens=tokens)
        return made.to(beside.input_ids.device)


def read_paired_rows(datamodule: Any, kind: str, source: str, *, count: int | None, method: str) -> PairedRows:
    """Return the rows of a source, encoded as the stage encodes its own.

    Args:
        datamodule: the stage's; it finds the source, and its ``max_length`` and ``overflow`` hold here too.
        kind: what the rows are: safety, benign or harmful.
        source: a name of the catalogue, or a file.
        count: rows taken, drawn by the stage's seed from those that are short enough; None takes all of these.
        method: who asks, for messages.

    Raises:
        WiringError: there is no data module.
        DataError: fewer rows than ``count`` that are short enough, or a row that is too long.
    """
    if datamodule is None:
        raise WiringError(f"Method `{method}` needs the stage's data module to read `{source}`, but got none.")
    examples = list(datamodule.find_examples(kind, source))
    if count is not None and count > len(examples):
        raise DataError(
            f"Expected `{source}` to have at least {count} {kind} rows for `{method}`, but got {len(examples)}. Lower "
            "`count`, or name a larger set."
        )
    random.Random(f"rows {datamodule.seed} {source}").shuffle(examples)
    encoded = encode_within(datamodule, examples, source=source, count=count)
    if count is not None and len(encoded) < count:
        raise DataError(
            f"Expected `{source}` to have at least {count} {kind} rows of at most {datamodule.max_length} tokens for "
            f"`{method}`, but got {len(encoded)} of {len(examples)}. Lower `count`, raise `max_length`, or set "
            "`overflow` to truncate_left."
        )
    pad_id = datamodule.encoder.tokenizer.pad_token_id
    return PairedRows(encoded, name=f"{kind} {source}", pad_id=pad_id, seed=datamodule.seed)


def encode_within(
    datamodule: Any, examples: Sequence[Example], *, source: str, count: int | None = None
) -> list[EncodedExample]:
    """Return rows encoded as the stage encodes its own: within its ``max_length``, by its ``overflow``.

    Args:
        datamodule: the stage's.
        examples: the rows.
        source: where they come from, for messages.
        count: rows returned at most, the first that fit; None: all of these.

    Raises:
        DataError: a row is too long, or none is short enough.
    """
    longest, cut = datamodule.max_length, datamodule.overflow
    encoded: list[EncodedExample] = []
    for example in examples:
        if len(encoded) == count:
            break
        row = datamodule.encoder.encode_example(example, max_length=longest if cut == "truncate_left" else None)
        if len(row.input_ids) <= longest:
            encoded.append(row)
        elif cut != "drop":
            raise DataError(
                f"Expected every row of `{source}` to have at most {longest} tokens, but got {len(row.input_ids)} in "
                f"row {example.id!r}. Raise `max_length`, or set `overflow` to truncate_left or drop."
            )
    if not encoded:
        raise DataError(f"Expected `{source}` to have rows of at most {longest} tokens, but got none. Raise it.")
    return encoded


def row_means(values: torch.Tensor, rows: torch.Tensor, *, num_rows: int) -> torch.Tensor:
    """Return the mean of per-token values within each row.

    A mean of these over a micro-batch averages to the mean over the step's rows, however the step is cut, because
    micro-batches have equally many rows.

    Args:
        values: ``(tokens,)``.
        rows: int64 ``(tokens,)``, row of each token; every row has one.
        num_rows: rows of the micro-batch.

    Returns:
        ``(rows,)``

    Example:
        >>> row_means(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 1]), num_rows=2).tolist()
        [2.0, 5.0]
    """
    sums = values.new_zeros(num_rows).index_add(0, rows, values)
    return sums / torch.bincount(rows, minlength=num_rows).to(values.dtype)
