"""Deep alignment: rows in which the reply has begun harmfully and then turns into a refusal.

Formula: none; ``count`` rows are added. A row is a triplet (harmful request, harmful reply, refusal): with probability
``prefix_share`` the assistant's turn opens with the first k tokens of the harmful reply, k uniform in 1 to
``max_prefix``, which carry no loss; the refusal follows and is learnt.

Points: ``prepare`` (the triplets; harmful replies are sampled from the unaligned model unless you name some),
``configure_data``.

Reference: Safety Alignment Should Be Made More Than Just a Few Tokens Deep, ICLR 2025, arXiv:2406.05946, section 3;
code Unispac/shallow-vs-deep-alignment (read only, re-derived).

Deviations: the rows are mixed with the task's instead of a training of their own before it; k is drawn once for each
row of the mixture, not anew in every pass; the anchor rows (harmless requests with answers) are yours to name, the
reference takes four of the original model's answers for each safety row.

Cost: no extra computation in a step, the added rows take their share of the steps; sampling replies takes minutes on a
laptop, once.

Does not compose with: nothing known.

Defaults: 256 rows, ``prefix_share`` 0.5 and ``max_prefix`` 100 are those of the reference; no anchor rows, because the
task's rows do their work here.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from framework.chat import ChatEncoder
from framework.errors import ConfigError, DataError, WiringError
from framework.evaluation.generation import generate_ids
from framework.evaluation.refusal_rules import is_refusal
from framework.examples import Example, Turn
from framework.files import fingerprint, read_json, write_json
from framework.method import Method, MethodStore
from framework.model_files import model_fingerprint, read_model
from framework.reference import on_fast_device
from framework.registry import register_method

__all__ = [
    "DeepAlignment",
    "DeepAlignmentConfig",
    "Triplet",
    "deep_rows",
    "first_tokens",
    "match_triplets",
    "sampled_harmful",
]

SAMPLED = "sampled"
ARTEFACT = "harmful_openings"
REPLIES = "replies.json"
BATCH = 16


@dataclass(frozen=True)
class DeepAlignmentConfig:
    """Settings of deep alignment."""

    count: int = 256
    """Rows added, >= 0."""
    harmful: str = SAMPLED
    """Harmful replies: ``sampled`` (from the unaligned model), a registered set or a file of pairs."""
    source: str = "embedded"
    """Refusals: ``embedded``, a registered set or a file of pairs."""
    base: str | None = None
    """Folder of the unaligned model; null takes the model that entered ``align``."""
    prefix_share: float = 0.5
    """Share of the rows whose reply begins harmfully, from 0 to 1."""
    max_prefix: int = 100
    """Longest beginning, in tokens, >= 1."""
    anchor: str = "embedded"
    """Anchor rows: ``embedded``, a registered set or a file of pairs."""
    anchor_count: int = 0
    """Anchor rows added, >= 0."""

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: lists every problem.
        """
        problems = list(self._problems())
        if problems:
            raise ConfigError(problems)

    def _problems(self) -> Iterator[str]:
        for name, least in (("count", 0), ("max_prefix", 1), ("anchor_count", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                yield f"Expected `{name}` to be a whole number >= {least}, but got {value!r}."
        share = self.prefix_share
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
            yield f"Expected `prefix_share` to be a share from 0 to 1, but got {share!r}."
        for name in ("harmful", "source", "anchor"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                yield f"Expected `{name}` to be a set's name or a file, but got {getattr(self, name)!r}."
        if self.base is not None and not isinstance(self.base, str):
            yield f"Expected `base` to be a folder or null, but got {self.base!r}."


class Triplet(NamedTuple):
    """A harmful request with both replies."""

    messages: tuple[Turn, ...]
    harmful: str
    refusal: str


def match_triplets(harmful: Sequence[Example], refusals: Sequence[Example], *, seed: int) -> list[Triplet]:
    """Return a triplet for every harmful pair: with the refusal of the same request, or else one drawn by ``seed``.

    Raises:
        DataError: there are no harmful pairs or no refusals.
    """
    if not harmful or not refusals:
        raise DataError(
            f"Expected harmful replies and refusals to build rows of, but got {len(harmful)} and {len(refusals)}. Name "
            "others with `harmful` and `source`."
        )
    by_request = {pair.prompt: pair.reply for pair in refusals}
    draw = random.Random(f"deep alignment refusals {seed}")
    return [
        Triplet(pair.messages, pair.reply, by_request.get(pair.prompt) or draw.choice(refusals).reply)
        for pair in harmful
    ]


def first_tokens(encoder: ChatEncoder, text: str, count: int) -> str:
    """Return the text of the first ``count`` tokens, without a character that the cut would split."""
    ids = encoder.encode_reply(text, is_complete=False)[:count]
    start = str(encoder.tokenizer.decode(ids))
    while not text.startswith(start):
        start = start[:-1]
    return start


def deep_rows(
    triplets: Sequence[Triplet],
    encoder: ChatEncoder,
    *,
    count: int,
    prefix_share: float,
    max_prefix: int,
    seed: int,
) -> list[Example]:
    """Return ``count`` rows; triplets come in a seeded order and round again, each time with another beginning.

    Args:
        triplets: at least one.
        encoder: says what a token is.
        count: rows.
        prefix_share: probability that the reply begins harmfully.
        max_prefix: longest beginning, in tokens.
        seed: decides order and beginnings.
    """
    draw = random.Random(f"deep alignment {seed}")
    order = list(triplets)
    draw.shuffle(order)
    rows = []
    for number in range(count):
        triplet = order[number % len(order)]
        is_deep, length = draw.random() < prefix_share, draw.randint(1, max_prefix)
        opening = first_tokens(encoder, triplet.harmful, length) if is_deep else ""
        rows.append(Example(f"deep-{number}", triplet.messages, triplet.refusal, kind="safety", prefill=opening))
    return rows


@register_method("deep_alignment", config=DeepAlignmentConfig)
class DeepAlignment(Method):
    """Refusals behind harmful beginnings, among the task rows."""

    config: DeepAlignmentConfig
    supports = frozenset({"single", "ddp", "fsdp2"})

    def __init__(self, config: DeepAlignmentConfig) -> None:
        """Keep the settings; triplets come with ``prepare``."""
        super().__init__(config)
        self._triplets: list[Triplet] | None = None

    def prepare(self, model: nn.Module, datamodule: Any, store: MethodStore) -> None:
        """Collect the triplets; harmful replies are sampled where none are named."""
        if self.config.count == 0:
            return
        if datamodule is None:
            raise WiringError("Method `deep_alignment` needs the stage's data module for its rows, but got none.")
        refusals = datamodule.find_examples("safety", self.config.source)
        if self.config.harmful == SAMPLED:
            base = Path(self.config.base) if self.config.base else store.model("base", method=self.name)
            harmful = sampled_harmful(refusals, datamodule.encoder, store, base=base, tokens=self.config.max_prefix)
        else:
            harmful = datamodule.find_examples("harmful", self.config.harmful)
        self._triplets = match_triplets(harmful, refusals, seed=datamodule.seed)

    def configure_data(self, datamodule: Any) -> None:
        """Add the rows, and the anchor rows, as sources of their own."""
        given = self.config
        if given.count:
            if self._triplets is None:
                raise WiringError(
                    "Method `deep_alignment` has no rows yet. Call `prepare_methods(methods, model, datamodule, "
                    "store)` before `fit`."
                )
            rows = deep_rows(
                self._triplets,
                datamodule.encoder,
                count=given.count,
                prefix_share=given.prefix_share,
                max_prefix=given.max_prefix,
                seed=datamodule.seed,
            )
            self.count("rows_with_opening", sum(bool(row.prefill) for row in rows))
            datamodule.add_source("deep_alignment", rows)
        if given.anchor_count:
            anchors = datamodule.find_examples("benign", given.anchor)
            datamodule.add_source("deep_alignment_anchor", anchors, count=given.anchor_count)


def sampled_harmful(
    refusals: Sequence[Example], encoder: ChatEncoder, store: MethodStore, *, base: Path, tokens: int
) -> list[Example]:
    """Return one reply of the unaligned model to each request, refusals left out; sampled once and kept.

    Args:
        refusals: whose requests are asked.
        encoder: renders them.
        store: keeps the replies.
        base: folder of the unaligned model.
        tokens: longest reply; those cut off there are marked as not complete.
    """
    requests = list({pair.messages: pair for pair in refusals}.values())
    prompts = [encoder.encode_prompt(pair.messages) for pair in requests]
    key = {
        "model": model_fingerprint(base),
        "prompts": fingerprint(prompts),
        "stop": list(encoder.stop_ids),
        "tokens": tokens,
        "marks": "ended",
    }
    if store.artifacts.find(ARTEFACT, key) is None:
        with store.artifacts.writing(ARTEFACT, key) as folder:
            if store.artifacts.find(ARTEFACT, key) is None:
                write_json(folder / REPLIES, _replies(base, prompts, encoder, tokens))
    replies = read_json(store.artifacts.path(ARTEFACT, key) / REPLIES)
    return [
        Example(pair.id, pair.messages, reply, kind="harmful", is_complete=ended)
        for pair, (reply, ended) in zip(requests, replies, strict=True)
        if reply.strip() and not is_refusal(reply)
    ]


def _replies(
    base: Path, prompts: Sequence[Sequence[int]], encoder: ChatEncoder, max_new_tokens: int
) -> list[tuple[str, bool]]:
    """Return every reply, and whether it ended by itself."""
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    other = read_model(base, dtype=dtype)
    with on_fast_device(other):
        found = generate_ids(
            other,
            prompts,
            stop_ids=encoder.stop_ids,
            max_new_tokens=max_new_tokens,
            batch_size=BATCH,
            temperature=1.0,
        )
    stops = set(encoder.stop_ids)
    return [(str(encoder.tokenizer.decode([i for i in ids if i not in stops])), ids[-1] in stops) for ids in found]
