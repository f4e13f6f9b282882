"""PACT: hold the model to its own safety tokens while it learns a task.

Formula: for every reply token, with K safety tokens and their weights v, z the logits of the trained model, z_full
those of the starting model and z_reply those of the starting model without the prompt (assistant header and reply):
``c = sigmoid(slope (I(z) - I(z_reply) - offset)) exp(-max(t - prefix, 0) / decay)``, where ``I`` is the share of the K
tokens it takes to reach ``top_p`` and t the place in the reply, from 0; ``q ~ softmax(((1 - c) z_full + c z_reply) / T)
max(v, 0)``; the term is the mean over reply tokens of ``T^2 KL(q || softmax(z / T))``, added to the task loss with
``weight``. The safety tokens are the K that the aligned model expects most in refusals; v is the difference of mean
probability to the unaligned model, standardised over the K.

With ``mass_weight`` above 0 the summed probability m of the safety tokens is held too: ``mass_weight`` times
``KL(m_ref || m)`` of "a safety token or another one", ``m_ref = (1 - c) m_full + c m_reply``.

Points: ``prepare`` (safety tokens, and the reference logits of every row), ``loss_term``.

Reference: Few Tokens, Big Leverage, arXiv:2603.07445; code Glresearch1/PACT@530c1c1 (read only, re-derived), whose
``finetuning_pact.py`` and ``compute_safety_tokens_pact.py`` the formulas follow.

Deviations: the mean is over the reply tokens of the whole optimizer step (the reference: of a micro-batch); the
reference logits are read from a cache, in half precision unless asked otherwise; tokens whose score is 0 stay in the
set (the reference drops them); a template without an assistant header is refused (the reference then writes
``Assistant:``); ``mass_weight`` is ours: the published loss leaves the summed probability free, and a model may stop
refusing while the shape within the safety tokens is kept.

Cost: ``cached`` adds K columns of the logits to a step, and before training two forward passes over the rows, the
second without prompts; ``4 K + 6`` bytes a reply token on disk in float16 (206 at K = 50), 12 a row. ``live`` adds two
forward passes a step and no memory for a model; ``copy`` adds the model too. Finding the tokens reads ``pairs``
refusals with both models once.

Does not compose with: strategies that cut the weights; ``live`` with full fine-tuning and with methods that train
something outside the adapter.

Defaults: all from the reference code but ``cache_dtype``, which is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from framework.chat import ChatEncoder, EncodedExample
from framework.composition import StepContext
from framework.errors import WiringError
from framework.method import Method, MethodStore, _model_of
from framework.model_files import model_fingerprint, read_model, read_tokenizer
from framework.module import TokenOutputs
from framework.processes import main_first
from framework.reference import check_adapter_off, frozen_copy, on_fast_device
from framework.reference_cache import ReferenceRows, training_rows
from framework.registry import register_method
from methods.pact.config import PACTConfig
from methods.pact.functional import (
    gate_values,
    mass_divergence,
    mixed_log_mass,
    position_weights,
    subset_divergence,
)
from methods.pact.references import Readings, cache_columns, cached_readings, live_readings, read_outputs, row_readings
from methods.pact.tokens import (
    RefusalRow,
    SafetyTokens,
    assistant_header,
    load_tokens,
    read_both,
    refusal_rows,
    save_tokens,
    tokenizer_fingerprint,
    tokens_key,
)

__all__ = ["PACT"]

TOKENS = "safety_tokens"
CACHE = "pact_reference"
SHOWN_POSITIONS = (0, 1, 2, 4, 8, 16, 32)


@register_method("pact", config=PACTConfig)
class PACT(Method):
    """PACT with cached and live references."""

    config: PACTConfig

    def __init__(self, config: PACTConfig) -> None:
        """Keep the settings; tokens and references come with ``prepare``."""
        super().__init__(config)
        self._tokens: SafetyTokens | None = None
        self._header: list[int] = []
        # Kept outside the module tree: frozen and large, they must not enter checkpoints.
        self._references: ReferenceRows | None = None
        self._copies: list[nn.Module] = []

    def prepare(self, model: nn.Module, datamodule: Any, store: MethodStore) -> None:
        """Find the safety tokens and read the reference logits of the rows."""
        if self.weight == 0.0:
            return
        if datamodule is None:
            raise WiringError("Method `pact` needs the stage's data module for its refusals and rows, but got none.")
        self._header = assistant_header(datamodule.encoder)
        folder = self._stored_tokens(model, datamodule, store)
        self._tokens = load_tokens(folder)
        if self.config.reference != "cached":
            return
        given = self.config
        key = {
            "model": model_fingerprint(store.model("start", method=self.name)),
            "dtype": str(next(model.parameters()).dtype),
            "tokenizer": tokenizer_fingerprint(datamodule.encoder.tokenizer),
            "header": self._header,
            "tokens": self._tokens.ids.tolist(),
            "gate": [given.top_p, given.gate_temperature],
        }
        columns = cache_columns(given.num_tokens, given.cache_dtype)
        self._references = ReferenceRows(store.artifacts, kind=CACHE, key=key, columns=columns)
        self._cover(model, datamodule.encoded)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Look every row up once the data is complete: no point comes after ``configure_data`` of the other methods."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit" or self.weight == 0.0:
            return
        if self._tokens is None:
            raise WiringError(
                "Method `pact` has no safety tokens yet. Call `prepare_methods(methods, model, datamodule, store)` "
                "before `fit`."
            )
        model = _model_of(pl_module)
        if self.config.reference == "live":
            check_adapter_off(model, method=self.name)
        elif self.config.reference == "copy":
            self._copies = [frozen_copy(model)]
            self.count("stored_numbers", sum(p.numel() for p in model.parameters()))
        elif self._references is not None:
            rows = training_rows(trainer, method=self.name)
            self.count("rows_added_later", self._cover(model, rows))
            self._references.attach(rows)
            self.count("stored_bytes", self._references.bytes)

    def loss_term(self, ctx: StepContext) -> torch.Tensor | None:
        """Return the mean divergence over the reply tokens of the step, in float32."""
        given, tokens = self.config, self._found_tokens()
        device = ctx.outputs.logits.device
        ids = tokens.ids.to(device)
        reference = self._readings(ctx, ids)
        student = read_outputs(ctx.outputs, ids, top_p=given.top_p, temperature=given.gate_temperature)
        with torch.autocast(device.type, enabled=False):
            shares = position_weights(ctx.outputs.positions, prefix=given.prefix, decay=given.decay)
            gate = gate_values(
                student.competing,
                reference.reply_only.competing,
                given.gate_boost * shares,
                num_tokens=given.num_tokens,
                slope=given.gate_slope,
                offset=given.gate_offset,
            )
            values = subset_divergence(
                student.logits,
                reference.full.logits,
                reference.reply_only.logits,
                gate=gate,
                weights=tokens.weights.to(device),
                temperature=given.temperature,
            )
            if given.mass_weight:
                target = mixed_log_mass(reference.full.log_mass, reference.reply_only.log_mass, gate=gate)
                masses = mass_divergence(student.log_mass, target)
                values = values + given.mass_weight * masses
        self._report(ctx, values.detach(), gate, student.log_mass.detach(), reference)
        return ctx.token_mean(values)

    # ---- private -------------------------------------------------------------------------------------------------

    def _found_tokens(self) -> SafetyTokens:
        if self._tokens is None:
            raise WiringError("Method `pact` has no safety tokens yet. Call `prepare_methods` before `fit`.")
        return self._tokens

    def _readings(self, ctx: StepContext, ids: torch.Tensor) -> Readings:
        given = self.config
        if self._references is not None:
            return cached_readings(self._references, ctx.batch, ctx.outputs)
        model = ctx.model
        if self._copies:
            device = ids.device
            model = self._copies[0] = self._copies[0].to(device)
        return live_readings(model, ctx.batch, ids, self._header, top_p=given.top_p, temperature=given.gate_temperature)

    def _cover(self, model: nn.Module, rows: Sequence[EncodedExample]) -> int:
        """Compute what the cache lacks; the first process does, the others then find it."""
        references, ids, given = self._references, self._found_tokens().ids, self.config
        if references is None:
            return 0

        def compute(part: Sequence[EncodedExample]) -> Mapping[str, torch.Tensor]:
            with on_fast_device(model):
                return row_readings(
                    model, part, ids, self._header, top_p=given.top_p, temperature=given.gate_temperature
                )

        return main_first(lambda: references.cover(rows, compute))

    def _stored_tokens(self, model: nn.Module, datamodule: Any, store: MethodStore) -> Path:
        given, encoder = self.config, datamodule.encoder
        pairs = datamodule.find_examples("safety", given.source)[: given.pairs]
        is_plain = given.base_prompt == "plain"
        rows = refusal_rows(pairs, encoder, reply_tokens=given.reply_tokens, is_plain=is_plain)
        base = Path(given.base) if given.base else store.model("base", method=self.name)
        key = tokens_key(
            rows,
            aligned=model_fingerprint(store.model("start", method=self.name)),
            unaligned=model_fingerprint(base),
            dtype=next(model.parameters()).dtype,
            num_tokens=given.num_tokens,
            temperature=given.token_temperature,
            score=given.score,
        )
        if store.artifacts.find(TOKENS, key) is None:
            with store.artifacts.writing(TOKENS, key) as folder:
                if store.artifacts.find(TOKENS, key) is None:
                    save_tokens(folder, self._search(model, encoder, base, rows), tokenizer=encoder.tokenizer)
        return store.artifacts.path(TOKENS, key)

    def _search(self, model: nn.Module, encoder: ChatEncoder, base: Path, rows: Sequence[RefusalRow]) -> SafetyTokens:
        given = self.config
        if tokenizer_fingerprint(read_tokenizer(base), with_template=False) != tokenizer_fingerprint(
            encoder.tokenizer, with_template=False
        ):
            raise WiringError(
                f"Expected the unaligned model in `{base}` to have the tokenizer of the aligned one, but its "
                "vocabulary differs. Name the model that was aligned with `base`."
            )
        other = read_model(base, dtype=next(model.parameters()).dtype)
        return read_both(
            model,
            other,
            rows,
            num_tokens=given.num_tokens,
            temperature=given.token_temperature,
            is_log_ratio=given.score == "log_ratio",
        )

    def _report(
        self, ctx: StepContext, values: torch.Tensor, gate: torch.Tensor, log_mass: torch.Tensor, reference: Readings
    ) -> None:
        """Report means over the micro-batch every ``log_every_n_steps``: a value logged costs about a millisecond."""
        if values.shape[0] == 0 or ctx.step % max(1, ctx.module.trainer.log_every_n_steps):  # type: ignore[attr-defined]
            return
        outputs: TokenOutputs = ctx.outputs
        chosen = {"kl": values, "gate": gate, "mass": log_mass.exp(), "mass_reference": reference.full.log_mass.exp()}
        names, means = list(chosen), [value.double().mean() for value in chosen.values()]
        for position in SHOWN_POSITIONS:
            at = outputs.positions == position
            names += [f"gate/{position}", f"kl/{position}"]
            means += [(value * at).double().sum() / at.sum() for value in (gate, values)]
        for name, mean in zip(names, torch.stack(means).tolist(), strict=True):
            if mean == mean:  # no token of the micro-batch stands at that position
                self.report(name, mean)
