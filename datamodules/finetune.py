"""The training data of one stage: named sources, mixed, encoded, and served step by step."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset

from datamodules.catalog import CatalogKind, find_examples
from datamodules.mining.source import MiningSource
from datamodules.sampler import MicroBatch, StepBatchSampler
from datamodules.sources import DataSource, mix
from framework.batch import Batch, collate
from framework.chat import ChatEncoder, EncodedExample
from framework.errors import ConfigError, DataError, WiringError
from framework.examples import Example

__all__ = ["FineTuneDataModule", "Overflow", "OverflowReport", "TokenCounts"]

Overflow = Literal["error", "truncate_left", "drop"]
"""What happens to rows longer than ``max_length``."""


class OverflowReport(NamedTuple):
    """How the rows compare with ``max_length``."""

    total: int
    """Rows before any was dropped."""
    too_long: int
    """Rows longer than ``max_length``."""
    longest: int
    """Tokens of the longest row."""


class TokenCounts(NamedTuple):
    """Tokens of the mixed rows, each row counted once."""

    prompt: int
    reply: int


class _Built(NamedTuple):
    rows: list[Example]
    encoded: list[EncodedExample]
    report: OverflowReport


class _RowDataset(Dataset[Batch]):
    """Encoded rows, handed out as whole batches: only here are the rows and the step they serve both known."""

    def __init__(self, encoded: Sequence[EncodedExample], *, pad_id: int) -> None:
        self.encoded = encoded
        self.pad_id = pad_id

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitems__(self, micro_batch: MicroBatch) -> Batch:
        return collate(
            [self.encoded[row] for row in micro_batch],
            example_ids=micro_batch,
            pad_id=self.pad_id,
            step_reply_tokens=micro_batch.step_reply_tokens,
            step_micro_batches=micro_batch.step_micro_batches,
        )


class _StepLoader(DataLoader[Batch]):
    """A loader that Lightning takes for resumable, as it is: it is built at the step at which the trainer resumes.

    It therefore has no state of its own; the data module checks that the rows are the same.
    """

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        return


def _keep(batch: Any) -> Any:
    """Return the batch as it is; a module-level function, because workers must be able to import it."""
    return batch


class FineTuneDataModule(MiningSource, pl.LightningDataModule):
    """Mixes named sources and serves them so that the whole run is one epoch of exactly composed steps."""

    def __init__(
        self,
        encoder: ChatEncoder,
        *,
        batch_size: int,
        total_steps: int,
        max_length: int,
        micro_batch_size: int | None = None,
        overflow: Overflow = "error",
        seed: int = 0,
        validation: Sequence[Example] = (),
        bucket: bool = True,
        num_workers: int = 0,
    ) -> None:
        """Prepare an empty data module.

        Args:
            encoder: turns rows into token ids.
            batch_size: rows of an optimizer step, over all processes.
            total_steps: optimizer steps of the run.
            max_length: longest row, in tokens.
            micro_batch_size: rows of one forward pass; None takes all rows a process has in a step.
            overflow: what happens to longer rows: stop with an error, cut them from the left, or leave them out.
            seed: decides the mixture and the order.
            validation: rows whose loss is watched, never trained on.
            bucket: put rows of like length into the same step.
            num_workers: processes that collate; 0 does it in the main one.

        Raises:
            ConfigError: a size or ``overflow`` is out of range, or the tokenizer has no padding token.
        """
        super().__init__()
        _check_settings(encoder, max_length=max_length, overflow=overflow, batch_size=batch_size)
        self.encoder = encoder
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.total_steps = total_steps
        self.max_length = max_length
        self.overflow = overflow
        self.seed = seed
        self.validation = tuple(validation)
        self.bucket = bucket
        self.num_workers = num_workers
        self.start_step: int | None = None
        """First optimizer step of the next training loader; None goes on where the trainer stands."""
        self._sources: dict[str, DataSource] = {}
        self._transforms: dict[str, Callable[[Example], Example]] = {}
        self._order: Callable[[list[Example]], list[Example]] | None = None
        self._built: _Built | None = None
        self._is_served = False

    # ---- adding -------------------------------------------------------------------------------------------------

    def add_source(self, name: str, examples: Sequence[Example], *, count: int | None = None) -> None:
        """Add rows to the mixture; what is there already stays.

        Args:
            name: not used before.
            examples: the rows.
            count: exactly how many rows the mixture takes; None takes each once, more than there are repeats rows.

        Raises:
            ConfigError: the name is taken or ``count`` is below 1.
            DataError: there are no rows, or one has no reply.
            WiringError: the training loader was built already.
        """
        self._refuse_when_served(f"add source {name!r}")
        if name in self._sources:
            raise ConfigError(
                f"Expected the name of a data source to be new, but got {name!r} again. "
                "Sources are added, never replaced: choose another name."
            )
        self._sources[name] = DataSource(name, tuple(examples), count)
        self._built = None

    def add_transform(self, name: str, change: Callable[[Example], Example]) -> None:
        """Apply ``change`` to every row, validation rows too, after the transforms added before it.

        Raises:
            ConfigError: the name is taken.
            WiringError: the training loader was built already.
        """
        self._refuse_when_served(f"add transform {name!r}")
        if name in self._transforms:
            raise ConfigError(f"Expected the name of a transform to be new, but got {name!r} again.")
        self._transforms[name] = change
        self._built = None

    def set_order(self, order: Callable[[list[Example]], list[Example]]) -> None:
        """Train on the rows in exactly the order that ``order`` puts them in; it may leave rows out.

        Shuffling and bucketing are then off; when the run takes more rows than there are, the order starts again.

        Raises:
            WiringError: an order is set already, or the training loader was built already.
        """
        self._refuse_when_served("set the order of the rows")
        if self._order is not None:
            raise WiringError(
                "Expected one order of the rows, but got a second one. Two methods that order the data do not compose: "
                "switch one off."
            )
        self._order = order
        self._built = None

    def _refuse_when_served(self, action: str) -> None:
        if self._is_served:
            raise WiringError(
                f"Expected the data to be complete when training starts, but got a call to {action} after the "
                "training loader was built. Do it in the method's `setup`."
            )

    # ---- looking ------------------------------------------------------------------------------------------------

    @property
    def sources(self) -> tuple[DataSource, ...]:
        """The sources, in the order they were added."""
        return tuple(self._sources.values())

    @property
    def num_contributions(self) -> int:
        """How many sources, transforms and orders were added."""
        return len(self._sources) + len(self._transforms) + (self._order is not None)

    def find_examples(self, kind: CatalogKind, name_or_path: str) -> list[Example]:
        """Return a named set or the pairs of a file, so that a method need not know where sets are kept.

        Args:
            kind: what the rows are: safety, benign or harmful.
            name_or_path: ``embedded``, a name of the catalogue, or a file.
        """
        return find_examples(kind, name_or_path, seed=self.seed)

    @property
    def rows(self) -> list[Example]:
        """The mixed rows, transformed and ordered; ``Batch.example_ids`` are positions in this list."""
        return self._build().rows

    @property
    def encoded(self) -> list[EncodedExample]:
        """The token ids of ``rows``."""
        return self._build().encoded

    @property
    def overflow_report(self) -> OverflowReport:
        """How many rows were longer than ``max_length``."""
        return self._build().report

    @property
    def token_counts(self) -> TokenCounts:
        """Prompt and reply tokens of ``rows``, each row counted once."""
        encoded = self._build().encoded
        return TokenCounts(sum(e.num_prompt_tokens for e in encoded), sum(e.num_reply_tokens for e in encoded))

    def _build(self) -> _Built:
        if self._built is None:
            rows = self._transformed(mix(self.sources, seed=self.seed))
            if self._order is None:
                self._built = self._encode(rows, "training")
            else:
                self._built = self._in_order(rows, self._order)
        return self._built

    def _in_order(self, rows: list[Example], order: Callable[[list[Example]], list[Example]]) -> _Built:
        # Rows that are dropped go first: a strict order would lose their turns.
        fitting = self._encode(rows, "training") if self.overflow == "drop" else None
        ordered = list(order(rows if fitting is None else fitting.rows))
        if not ordered:
            raise DataError("Expected the order of the rows to keep at least one row, but got none.")
        built = self._encode(ordered, "training")
        return built if fitting is None else built._replace(report=fitting.report)

    def _transformed(self, rows: Sequence[Example]) -> list[Example]:
        changed = list(rows)
        for change in self._transforms.values():
            changed = [change(row) for row in changed]
        return changed

    def _encode(self, rows: Sequence[Example], what: str) -> _Built:
        encoded = [self.encoder.encode_example(row) for row in rows]
        for row, ids in zip(rows, encoded, strict=True):
            if ids.num_reply_tokens < 1:
                raise DataError(f"Expected every {what} row to have reply tokens, but got none in row {row.id!r}.")
        lengths = [len(ids.input_ids) for ids in encoded]
        too_long = [i for i, length in enumerate(lengths) if length > self.max_length]
        report = OverflowReport(len(rows), len(too_long), max(lengths))
        if not too_long:
            return _Built(list(rows), encoded, report)
        if self.overflow == "error" or (self.overflow == "drop" and len(too_long) == len(rows)):
            raise DataError(
                f"Expected every {what} row to have at most {self.max_length} tokens, but got {report.too_long} of "
                f"{report.total} rows that are longer (the longest has {report.longest}; the first is "
                f"{rows[too_long[0]].id!r}). Raise `max_length`, or set `overflow` to truncate_left"
                f"{' or drop' if self.overflow == 'error' else ''}."
            )
        if self.overflow == "drop":
            dropped = set(too_long)
            kept = [i for i in range(len(rows)) if i not in dropped]
            return _Built([rows[i] for i in kept], [encoded[i] for i in kept], report)
        for i in too_long:
            encoded[i] = self.encoder.encode_example(rows[i], max_length=self.max_length)
        return _Built(list(rows), encoded, report)

    # ---- serving ------------------------------------------------------------------------------------------------

    def _sampler(self, *, start_step: int = 0) -> StepBatchSampler:
        # A data module that was never attached serves one process.
        trainer = self.trainer
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
        encoded = self._build().encoded
        return StepBatchSampler(
            [len(ids.input_ids) for ids in encoded],
            reply_lengths=[ids.num_reply_tokens for ids in encoded],
            batch_size=self.batch_size,
            micro_batch_size=self.micro_batch_size or max(1, self.batch_size // world_size),
            total_steps=self.total_steps,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
            bucket=self.bucket,
            shuffle=self._order is None,
            start_step=start_step,
        )

    def _loader(self, encoded: Sequence[EncodedExample], batches: Any) -> DataLoader[Batch]:
        pad_id = cast(int, self.encoder.tokenizer.pad_token_id)
        return _StepLoader(
            _RowDataset(encoded, pad_id=pad_id),
            batch_sampler=batches,
            collate_fn=_keep,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
        )

    def setup(self, stage: str) -> None:
        """Tell the trainer not to validate when there are no validation rows; it would warn of an empty loader."""
        if not self.validation and self.trainer is not None:
            self.trainer.limit_val_batches = 0

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return the loader of this process: every micro-batch of the run from ``start_step`` on.

        A trainer that resumes from a checkpoint asks for the loader after it has restored its step.
        """
        start = self.start_step
        if start is None:
            start = 0 if self.trainer is None else self.trainer.global_step
        self._live = self._sampler(start_step=start)
        loader = self._loader(self._build().encoded, self._live)
        self._is_served = True
        return loader

    def val_dataloader(self) -> DataLoader[Batch] | list[Any]:
        """Return the loader of the validation rows, all of them in every process; an empty list when there are none.

        A validation batch is a step of its own: its ``step_reply_tokens`` are its own reply tokens.
        """
        if not self.validation:
            return []
        built = self._encode(self._transformed(self.validation), "validation")
        size = self.micro_batch_size or self.batch_size
        batches = []
        for step, start in enumerate(range(0, len(built.rows), size)):
            rows = range(start, min(start + size, len(built.rows)))
            tokens = sum(built.encoded[row].num_reply_tokens for row in rows)
            batches.append(MicroBatch(rows, step=step, step_reply_tokens=tokens, step_micro_batches=1))
        return self._loader(built.encoded, batches)

    # ---- resuming -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return a fingerprint of the rows and of the steps they make up; neither ranks nor micro-batches matter."""
        digest = hashlib.sha256()
        for ids in self._build().encoded:
            digest.update(np.asarray([ids.num_prompt_tokens, *ids.input_ids], dtype=np.int64).tobytes())
        digest.update(self._sampler().steps.tobytes())
        return {"steps": digest.hexdigest()[:16]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that the run being resumed had the same steps.

        Raises:
            DataError: the rows or their order differ.
        """
        own = self.state_dict()
        if state_dict != own:
            raise DataError(
                f"Expected the training rows to be those of the checkpoint (steps {state_dict.get('steps')!r}), "
                f"but got other rows or another order ({own['steps']!r}). Resume with the same data, batch size, "
                "number of steps and seed, or start anew."
            )


def _check_settings(encoder: ChatEncoder, *, max_length: int, overflow: str, batch_size: int) -> None:
    problems = []
    if overflow not in ("error", "truncate_left", "drop"):
        problems.append(f"Expected `overflow` to be one of error, truncate_left, drop, but got {overflow!r}.")
    if max_length < 2:
        problems.append(f"Expected `max_length` to be ≥ 2 tokens, but got {max_length!r}.")
    if batch_size < 1:
        problems.append(f"Expected `batch_size` to be a whole number ≥ 1, but got {batch_size!r}.")
    if encoder.tokenizer.pad_token_id is None:
        problems.append("Expected the tokenizer to have a padding token, but got none. Set `tokenizer.pad_token`.")
    if problems:
        raise ConfigError(problems)
