"""Self-Mined Hardness: learn from the prompts the model itself sometimes fails, and do not forget to answer.

Formula: none in the loss. K rollouts of each prompt are judged; ``rate = harmful / K``; prompts with 0 < rate < 1 are
eligible. Training rows are the chosen prompts, hardest first, each with one random safe rollout of the model itself as
its reply, and harmless (also jailbreak-shaped) prompts with rollouts that do not refuse, strictly interleaved: at place
k of the mined rows stands a harmless one where ``floor((k + 1) q) > floor(k q)``, ``q = ratio / (1 + ratio)``.

With ``balance: controlled`` (ours) the ratio follows what is measured every ``block_steps`` steps:
``log ratio' = log ratio + gain (max(0, target_compliance - compliance) - max(0, target_refusal - refusal))``.

Points: ``prepare`` (mining), ``configure_data``. Also overrides ``on_train_start`` and ``on_train_batch_end``, because
the controlled ratio is measured between steps, where no contribution point lies.

Reference: Self-Mined Hardness for Safety Fine-Tuning, arXiv:2605.03226; code prakharg55/jailbreak-ICML (read only,
re-derived).

Deviations: any ratio (published: none and 1:1) and any share; a cut-off rollout is trained without an end token (the
reference trains it as a complete reply); where as many judges say yes as no, the rollout is neither harmful nor a
target; ``adaptive`` rollouts, the controller, ``target: refusal`` and other rows among the mined ones are ours.

Cost: mining once a model, 64 tokens x 16 rollouts x 240 prompts by default, kept and reused; no extra computation in a
step; a measurement of the controller is 2 x ``probe_prompts`` replies of 24 tokens, with ``margin`` some forward
passes.

Does not compose with: methods that set the order of the rows; ``balance: controlled`` with strategies that cut the
weights.

Defaults: K = 16 and 64 tokens are ours for a small machine (published: 64 and 256), as are the prompt counts;
``share`` 0.5, ratio 1 and temperature 1 are the published ones; the controller's are ours. It reads replies: in a
run of the default model the margin called every look-alike refused; replies, in two others, about two in five.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytorch_lightning as pl
from torch import nn

from framework.conductor import strategy_kind
from framework.errors import ConfigError, DataError, WiringError
from framework.evaluation.generation import generate_replies
from framework.evaluation.margin import refusal_margin
from framework.evaluation.refusal_rules import is_refusal
from framework.examples import Example, Prompt
from framework.method import Method, MethodStore, _model_of
from framework.model_files import model_fingerprint
from framework.processes import on_main
from framework.registry import register_method
from methods.smh.config import SMHConfig
from methods.smh.functional import Decision, Groups, adjust_ratio, initial_order, ordered_rows

__all__ = ["SMH"]

HARMFUL, BENIGN = "smh_harmful", "smh_benign"


@register_method("smh", config=SMHConfig)
class SMH(Method):
    """Mined rows in their order, at a fixed or a controlled ratio."""

    config: SMHConfig
    supports = frozenset({"single", "ddp", "fsdp2"})

    def __init__(self, config: SMHConfig) -> None:
        """Keep the settings; rows come with ``prepare``."""
        super().__init__(config)
        if self._is_controlled:  # it measures the whole model, which no process has where weights are cut
            self.supports = frozenset({"single", "ddp"})  # type: ignore[misc]
        self._rows: tuple[list[Example], list[Example]] | None = None
        self.decisions: list[Decision] = []
        """Every ratio the controller set, in order."""

    def prepare(self, model: nn.Module, datamodule: Any, store: MethodStore) -> None:
        """Mine the model, or find what was mined, and choose the rows."""
        given = self.config
        if given.count == 0:
            return
        if datamodule is None:
            raise WiringError("Method `smh` needs the stage's data module for its prompts, but got none.")
        self._check_blocks(datamodule.total_steps)
        mined = datamodule.mined(
            model,
            given,
            model_key=model_fingerprint(store.model("start", method=self.name)),
            artifacts=store.artifacts,
            target=given.target,
        )
        if given.needs_benign and not mined.benign:
            raise DataError(
                f"Expected `{given.mined or 'the mined prompts'}` to hold harmless prompts for `ratio` {given.ratio}, "
                "but got none. Mine again with that ratio, or set `ratio` to 0."
            )
        rows = mined.rows(
            select=given.select,
            count=given.count,
            share=given.share,
            seed=datamodule.seed,
            has_benign=given.needs_benign,
        )
        self._rows = (rows.harmful, rows.benign)
        self.count("prompts_mined", len(mined.harmful))
        self.count("prompts_eligible", len(mined.eligible))

    def configure_data(self, datamodule: Any) -> None:
        """Add the rows as two sources, and set the order of all rows."""
        if self.config.count == 0:
            return
        if self._rows is None:
            raise WiringError(
                "Method `smh` has no mined rows yet. Call `prepare_methods(methods, model, datamodule, store)` before "
                "`fit`."
            )
        harmful, benign = self._rows
        datamodule.add_source(HARMFUL, harmful)
        num_benign = round(len(harmful) * self.config.ratio)
        if self.config.balance == "controlled":
            datamodule.add_source(BENIGN, benign)
        elif num_benign:
            datamodule.add_source(BENIGN, benign, count=num_benign)
        datamodule.set_order(self._ordered)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a controller that could not measure the model."""
        if stage == "fit" and self._is_controlled and strategy_kind(trainer) not in ("single", "ddp"):
            raise WiringError(
                f"Method `smh` with `balance: controlled` measures the whole model, but the trainer's strategy is "
                f"`{strategy_kind(trainer)}`. Set `balance: fixed`, or train with `trainer.strategy=ddp`."
            )
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lay the steps out, under the decisions of an interrupted run if there are any; none was served yet."""
        super().on_train_start(trainer, pl_module)
        if self._is_controlled:
            self._apply(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure after every block of steps, and set the ratio of what follows."""
        step, moved = trainer.global_step, trainer.global_step != self._last_step
        is_due = moved and step % self.config.block_steps == 0
        if self._is_controlled and is_due and step < trainer.datamodule.total_steps:  # type: ignore[attr-defined]
            self._decide(trainer, _model_of(pl_module), step)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def state_dict(self) -> dict[str, Any]:
        """Return the decisions beside the counters."""
        return {**super().state_dict(), "decisions": [list(decision) for decision in self.decisions]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the decisions of the interrupted run."""
        super().load_state_dict(state_dict)
        self.decisions = [Decision(int(step), *rest) for step, *rest in state_dict["decisions"]]

    # ---- private -------------------------------------------------------------------------------------------------

    @property
    def _is_controlled(self) -> bool:
        return self.config.balance == "controlled" and self.config.count != 0

    def _check_blocks(self, total_steps: int) -> None:
        """Refuse a controller whose first block ends with the run or after it: it would never measure."""
        block_steps = self.config.block_steps
        if self._is_controlled and block_steps >= total_steps and not self.allow_no_effect:
            raise ConfigError(
                f"Expected `smh.block_steps` to be below the {total_steps} steps of the stage with `balance: "
                f"controlled`, which measures between blocks, but got {block_steps}. Lower it, or set `balance: fixed`."
            )

    def _ordered(self, rows: list[Example]) -> list[Example]:
        """Return the rows of one pass in training order; with a controlled ratio, all harmless rows stay at hand."""
        groups = self._groups(rows)
        self._check_left(groups)
        order = initial_order(groups, ratio=self.config.ratio)
        if self._is_controlled:
            # Rows the first pass has no place for may be needed once the ratio rises.
            order += sorted(set(groups.benign) - set(order))
        mined = set(order) - set(groups.others)
        # Set, not added to: the rows are ordered anew whenever a source is added.
        self.effects["rows_mixed_in"] = len(mined)
        self.effects["rows_cut_off"] = sum(not rows[i].is_complete for i in mined)
        return [rows[i] for i in order]

    def _check_left(self, groups: Groups) -> None:
        """Refuse to train without what was mined, and count what the data module dropped of it."""
        harmful = self._rows[0] if self._rows else []
        if harmful and not groups.harmful:
            raise DataError(
                f"Expected some of {len(harmful)} mined rows to fit, but got none: all are longer than `max_length` "
                "and were dropped. Raise `max_length`, or set `overflow` to truncate_left."
            )
        self.effects["harmful_rows_dropped"] = len(harmful) - len(groups.harmful)

    def _groups(self, rows: list[Example]) -> Groups:
        """Return the numbers of the rows by kind: harmful and harmless ones in the order they were chosen."""
        # By id: a transform of another method may have changed the text.
        sides = [[row.id for row in side] for side in self._rows or ([], [])]
        place: dict[str, int] = {}
        for number, row in enumerate(rows):
            place.setdefault(row.id, number)
        own = [[place[name] for name in side if name in place] for side in sides]
        mined = {name for side in sides for name in side}
        others = [number for number, row in enumerate(rows) if row.id not in mined]
        return Groups(own[0], own[1], others if self.config.other_rows == "keep" else [])

    def _decide(self, trainer: pl.Trainer, model: nn.Module, step: int) -> None:
        given, datamodule = self.config, trainer.datamodule  # type: ignore[attr-defined]
        refusal, compliance = on_main(lambda: self._measure(model, datamodule))
        before = self.decisions[-1].ratio if self.decisions else given.ratio
        ratio = adjust_ratio(
            before,
            refusal=refusal,
            compliance=compliance,
            target_refusal=given.target_refusal,
            target_compliance=given.target_compliance,
            gain=given.gain,
            low=given.ratio_low,
            high=given.ratio_high,
        )
        self.decisions.append(Decision(step, ratio, refusal, compliance))
        for name, value in (("ratio", ratio), ("refusal", refusal), ("compliance", compliance)):
            self.report(name, value)
            # What is logged shows the last value only; the results keep every decision.
            self.reports[f"decision/{step}/{name}"] = value
        self._apply(trainer)

    def _measure(self, model: nn.Module, datamodule: Any) -> tuple[float, float]:
        """Return the share of harmful prompts refused, and of harmless look-alikes answered."""
        harmful, benign = (
            datamodule.probe_prompts(self.config.probe_prompts, kind=kind) for kind in ("harmful", "benign")
        )
        refused, refused_benign = (self._refused(model, datamodule, side) for side in (harmful, benign))
        if self.config.probe == "margin" and refused == refused_benign and refused in (0.0, 1.0):
            warnings.warn(
                f"The margin of `smh` calls {'every' if refused else 'no'} prompt refused, harmful or not, so that the "
                "ratio moves one way only. Set `probe: replies`.",
                stacklevel=2,
            )
        return refused, 1.0 - refused_benign

    def _refused(self, model: Any, datamodule: Any, prompts: list[Prompt]) -> float:
        if self.config.probe == "margin":
            margins = refusal_margin(model, datamodule.encoder, prompts).per_prompt
            return sum(margin > 0 for margin in margins) / len(margins)
        replies = generate_replies(model, datamodule.encoder, prompts, max_new_tokens=self.config.probe_tokens)
        return sum(is_refusal(reply.text) for reply in replies) / len(replies)

    def _apply(self, trainer: pl.Trainer) -> None:
        """Let every step take its rows at the ratio that holds for it."""
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        rows = ordered_rows(
            datamodule.total_steps * datamodule.batch_size,
            self.decisions,
            batch_size=datamodule.batch_size,
            groups=self._groups(datamodule.rows),
            start=self.config.ratio,
        )
        # From the first step on: what a decision leaves as it was comes out the same.
        datamodule.reorder(0, rows)
