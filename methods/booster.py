"""Booster: learn refusals where a harmful step would gain little.

Formula: with h the loss on harmful rows and ``g = grad h(w)``, the task loss plus ``weight`` (the paper's lambda) times
``h(w) - h(w - alpha g / ||g||)``: how much one normalised harmful step lowers the harmful loss. The inner step is taken
as a constant shift, so the gradient added is ``weight (grad h(w) - grad h(w - alpha g / ||g||))``.

Points: ``prepare`` (the harmful rows), ``loss_term``. The term's gradient is computed once a step, outside the task's
graph, and attached to its value, so that no optimizer has to call its closure twice.

Reference: Booster, Huang et al., ICLR 2025, arXiv:2409.01586, eq. 3 and algorithm 1; code git-disl/Booster, Apache-2.0
(read only, re-derived).

Deviations: harmful rows of a step are divided among the processes and their gradients are summed, so that the step is
the same however it is cut; the optional combination with Vaccine is left out: switch on both methods instead.

Cost: two more forward and backward passes over ``batch_size`` harmful rows a step; two copies of the gradient of what
is trained.

Does not compose with: strategies that cut the weights.

Defaults: ``weight`` 5 and ``alpha`` 0.1 are the paper's; as many harmful rows a step as the run has rows. Harmful
replies are sampled from the unaligned model unless you name some.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from framework.batch import collate
from framework.chat import ChatEncoder, EncodedExample
from framework.composition import StepContext
from framework.errors import ConfigError, WiringError
from framework.examples import Example
from framework.method import Method, MethodStore
from framework.module import forward_reply_tokens
from framework.paired_rows import encode_within
from framework.registry import register_method
from methods.asft.functional import attach_gradients
from methods.deep_alignment import SAMPLED, first_tokens, sampled_harmful

__all__ = ["Booster", "BoosterConfig", "harmful_step", "moved", "rows_of_step", "shortened"]

SMALLEST = 1e-7
"""Added to the norm, as in the reference."""
LONGEST = 100
"""Tokens of a sampled harmful reply."""


@dataclass(frozen=True)
class BoosterConfig:
    """Settings of Booster."""

    weight: float = 5.0
    """Strength of the term (lambda), >= 0."""
    alpha: float = 0.1
    """Length of the harmful step in the space of what is trained, > 0."""
    harmful: str = SAMPLED
    """Harmful pairs: ``sampled`` (replies of the unaligned model), a registered set or a file of pairs."""
    source: str = "embedded"
    """Refusals whose requests are asked when replies are sampled: ``embedded``, a registered set or a file."""
    base: str | None = None
    """Folder of the unaligned model; null takes the model that entered ``align``."""
    batch_size: int | None = None
    """Harmful rows of a step, >= 1; null takes the run's batch size."""

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: lists every problem.
        """
        problems = list(self._problems())
        if problems:
            raise ConfigError(problems)

    def _problems(self) -> Iterator[str]:
        for name, holds, text in (
            ("weight", lambda value: 0 <= value < math.inf, ">= 0"),
            ("alpha", lambda value: 0 < value < math.inf, "> 0"),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not holds(value):
                yield f"Expected `{name}` to be a number {text}, but got {value!r}."
        for name in ("harmful", "source"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                yield f"Expected `{name}` to be a set's name or a file, but got {getattr(self, name)!r}."
        if self.base is not None and not isinstance(self.base, str):
            yield f"Expected `base` to be a folder or null, but got {self.base!r}."
        size = self.batch_size
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            yield f"Expected `batch_size` to be a whole number >= 1 or null, but got {size!r}."


def rows_of_step(num_rows: int, *, batch_size: int, step: int, seed: int) -> list[int]:
    """Return which harmful rows a step takes: the next ones of seeded passes, a function of the step alone.

    Example:
        >>> sorted(rows_of_step(4, batch_size=2, step=0, seed=0) + rows_of_step(4, batch_size=2, step=1, seed=0))
        [0, 1, 2, 3]
    """
    orders: dict[int, list[int]] = {}
    found = []
    for place in range(step * batch_size, (step + 1) * batch_size):
        number = place // num_rows
        if number not in orders:
            orders[number] = list(range(num_rows))
            random.Random(f"booster {seed} {number}").shuffle(orders[number])
        found.append(orders[number][place % num_rows])
    return found


def harmful_step(gradients: Sequence[torch.Tensor], *, alpha: float) -> list[torch.Tensor]:
    """Return the step of length ``alpha`` down the harmful loss: ``-alpha g / ||g||``, one norm over all tensors.

    Args:
        gradients: of the harmful loss.
        alpha: length.

    Example:
        >>> [round(float(step), 3) for step in harmful_step([torch.tensor([3.0]), torch.tensor([4.0])], alpha=10.0)]
        [-6.0, -8.0]
    """
    norm = float(torch.stack([gradient.double().square().sum() for gradient in gradients]).sum().sqrt())
    return [gradient * (-alpha / (norm + SMALLEST)) for gradient in gradients]


@contextlib.contextmanager
def moved(parameters: Sequence[nn.Parameter], shifts: Sequence[torch.Tensor]) -> Iterator[None]:
    """Move the parameters inside the block and put the same tensors back behind it.

    The data is swapped, not written to: graphs made before still see the values they were made with.

    Args:
        parameters: on which nothing is differentiated that was computed outside.
        shifts: one for each, of the same shape.
    """
    kept = [parameter.data for parameter in parameters]
    # Autocast keeps the weights it has rounded; they would hide the move.
    torch.clear_autocast_cache()
    try:
        for parameter, shift in zip(parameters, shifts, strict=True):
            parameter.data = parameter.data + shift.to(parameter.dtype)
        yield
    finally:
        for parameter, data in zip(parameters, kept, strict=True):
            parameter.data = data
        torch.clear_autocast_cache()


def shortened(pair: Example, encoder: ChatEncoder, *, max_length: int) -> Example:
    """Return a pair whose reply is cut from the right, so that it fits behind its request; one that fits as it is.

    A reply that is cut is marked as not complete: it gets no end token. A request that leaves no room for a reply is
    left to the stage's ``overflow``.

    Args:
        pair: request and reply.
        encoder: says what a token is.
        max_length: of request and reply together, in tokens.
    """
    room = max_length - len(encoder.encode_prompt(pair.messages, prefill=pair.prefill))
    if len(encoder.encode_reply(pair.reply, is_complete=pair.is_complete)) <= room:
        return pair
    # The text of so many tokens may be cut into more of them again.
    for count in range(room, 0, -1):
        text = first_tokens(encoder, pair.reply, count)
        if text and len(encoder.encode_reply(text, is_complete=False)) <= room:
            return replace(pair, reply=text, is_complete=False)
    return pair


class _Harm(NamedTuple):
    """The harmful loss of a step and its gradients."""

    loss: torch.Tensor
    gradients: list[torch.Tensor]


@register_method("booster", config=BoosterConfig)
class Booster(Method):
    """Refusals that a harmful step does not undo."""

    config: BoosterConfig

    def __init__(self, config: BoosterConfig) -> None:
        """Keep the settings; harmful rows come with ``prepare``."""
        super().__init__(config)
        self._rows: list[EncodedExample] = []
        self._step = -1
        self._term: _Harm | None = None

    def prepare(self, model: nn.Module, datamodule: Any, store: MethodStore) -> None:
        """Collect the harmful rows; replies are sampled where none are named."""
        given = self.config
        if given.weight == 0:
            return
        if datamodule is None:
            raise WiringError("Method `booster` needs the stage's data module for its rows, but got none.")
        if given.harmful == SAMPLED:
            base = Path(given.base) if given.base else store.model("base", method=self.name)
            refusals = datamodule.find_examples("safety", given.source)
            pairs = sampled_harmful(refusals, datamodule.encoder, store, base=base, tokens=LONGEST)
            pairs = [shortened(pair, datamodule.encoder, max_length=datamodule.max_length) for pair in pairs]
        else:
            pairs = datamodule.find_examples("harmful", given.harmful)
        if not pairs:
            raise WiringError(
                "Method `booster` needs harmful replies, but the unaligned model refused every request. Name pairs "
                "with `harmful`."
            )
        self._rows = encode_within(datamodule, pairs, source=given.harmful)
        self.effects["harmful_rows"] = len(self._rows)

    def loss_term(self, ctx: StepContext) -> torch.Tensor | None:
        """Return what a harmful step gains, with its gradient; the same in every micro-batch and process of a step."""
        if not self._rows:
            raise WiringError(
                "Method `booster` has no harmful rows yet. Call `prepare_methods(methods, model, datamodule, store)` "
                "before `fit`."
            )
        parameters = [p for p in ctx.model.parameters() if p.requires_grad]
        if self._term is None or self._step != ctx.step:
            here = self._harm(ctx, parameters)
            with moved(parameters, harmful_step(here.gradients, alpha=self.config.alpha)):
                there = self._harm(ctx, parameters)
            differences = [a - b for a, b in zip(here.gradients, there.gradients, strict=True)]
            self._step, self._term = ctx.step, _Harm(here.loss - there.loss, differences)
            self.report("harmful_loss", here.loss)
        return attach_gradients(self._term.loss, parameters, self._term.gradients)

    def _harm(self, ctx: StepContext, parameters: Sequence[nn.Parameter]) -> _Harm:
        """Return the mean loss over the harmful reply tokens of the step, and its gradients, over all processes."""
        trainer = ctx.module.trainer
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        size = self.config.batch_size or datamodule.batch_size
        chosen = rows_of_step(len(self._rows), batch_size=size, step=ctx.step, seed=datamodule.seed)
        tokens = sum(self._rows[row].num_reply_tokens for row in chosen)
        mine = sorted(chosen[trainer.global_rank :: trainer.world_size], key=lambda row: len(self._rows[row].input_ids))
        step = max(1, datamodule.micro_batch_size or len(mine))
        device = parameters[0].device
        total = torch.zeros((), device=device)
        gradients = [torch.zeros_like(p) for p in parameters]
        for start in range(0, len(mine), step):
            rows = [self._rows[row] for row in mine[start : start + step]]
            batch = collate(rows, example_ids=range(len(rows)), pad_id=0, step_reply_tokens=tokens).to(device)
            # In half precision gradients of the mean fall below the smallest number; those of the sum do not.
            loss = forward_reply_tokens(ctx.model, batch).nll.sum()
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
            total = total + loss.detach() / tokens
            for gradient, part in zip(gradients, found, strict=True):
                if part is not None:
                    gradient += part / tokens
        return _Harm(*_summed(trainer, total, gradients))


def _summed(
    trainer: Any, total: torch.Tensor, gradients: list[torch.Tensor]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the sums over all processes."""
    if trainer.world_size == 1:
        return total, gradients
    reduce = trainer.strategy.reduce
    return reduce(total, reduce_op="sum"), [reduce(gradient, reduce_op="sum") for gradient in gradients]
