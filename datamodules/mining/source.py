"""What a data module offers methods: mined rows, prompts to watch, whole steps, and another order while training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from datamodules.mining.mine import MiningProgress, Target, mine_sets, template_key
from datamodules.mining.mined_file import read_mined
from datamodules.mining.pool import probe_prompts
from datamodules.mining.selection import MinedSets
from datamodules.sampler import StepBatchSampler
from framework.batch import Batch, collate
from framework.chat import ChatEncoder, EncodedExample
from framework.errors import WiringError
from framework.examples import Prompt, PromptKind
from framework.files import ArtifactStore
from framework.mining_settings import MiningSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["MiningSource"]


class MiningSource:
    """Part of a data module."""

    encoder: ChatEncoder
    num_workers: int
    mining_progress: MiningProgress | None = None
    """Called with (done, total) in rollouts while prompts are mined."""
    _live: StepBatchSampler | None = None
    """The sampler of the loader in use."""

    @property
    def encoded(self) -> list[EncodedExample]:
        """The token ids of the mixed rows."""
        raise NotImplementedError

    def mined(
        self, model: PreTrainedModel, config: Any, *, model_key: str, artifacts: ArtifactStore, target: Target
    ) -> MinedSets:
        """Return mined prompts: from the file ``config.mined``, or by mining ``model`` where it is null.

        Args:
            model: the model about to be trained.
            config: holds the fields of ``MiningSettings``, ``mined`` and ``ratio``.
            model_key: fingerprint of the model's weights.
            artifacts: where rollouts and verdicts are kept.
            target: which rollouts may be learnt.

        Raises:
            DataError: the file or the store is another model's, the file was mined for another target or with other
                judges, or one is damaged.
        """
        if config.mined is not None:
            return read_mined(
                config.mined,
                model_key=model_key,
                template=template_key(self.encoder),
                target=target,
                judges=config.judges,
            )
        return mine_sets(
            model,
            self.encoder,
            MiningSettings.of(config),
            model_key=model_key,
            artifacts=artifacts,
            target=target,
            has_benign=config.needs_benign,
            progress=self.mining_progress,
        )

    def probe_prompts(self, count: int, *, kind: PromptKind) -> list[Prompt]:
        """Return at most ``count`` prompts to watch a model by, never trained on."""
        return probe_prompts(count, kind=kind)

    def step_batches(self, step: int) -> list[Batch]:
        """Return all micro-batches of this process in an optimizer step, as the loader in use serves them.

        Args:
            step: from 0.

        Raises:
            WiringError: no training loader is in use.
        """
        if self._live is None:
            raise WiringError("Expected a training loader to look at a step of, but got none. Call it while training.")
        parts, encoded = self._live.plan(step)[self._live.rank], self.encoded
        pad_id = int(self.encoder.tokenizer.pad_token_id or 0)
        tokens = self._live.step_reply_tokens(step)
        return [
            collate(
                [encoded[row] for row in rows],
                example_ids=rows,
                pad_id=pad_id,
                step_reply_tokens=tokens,
                step_micro_batches=len(parts),
            )
            for rows in parts
        ]

    def reorder(self, start_step: int, rows: Sequence[int]) -> None:
        """Let the steps from ``start_step`` on take ``rows`` of the mixed rows, in this order.

        Every process must give the same rows.

        Raises:
            WiringError: no training loader is in use, or worker processes have fetched steps ahead.
        """
        if self._live is None or self.num_workers:
            got = "no loader" if self._live is None else f"{self.num_workers} workers, which fetch steps ahead"
            raise WiringError(
                f"Expected a training loader without workers to change the order of its rows, but got {got}. Call it "
                "while training, with `num_workers=0`."
            )
        self._live.replace_steps(start_step, np.asarray(rows, dtype=np.int64))
