"""Likelihood probes: multiple choice by log-likelihood, and mean negative log-likelihood of given replies."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from framework.chat import ChatEncoder
from framework.errors import DataError
from framework.evaluation.decoding import (
    check_prompts,
    evaluating,
    has_position_argument,
    prefill,
    shared_prefix,
)
from framework.evaluation.metrics import Mean, MeanMetricWithInterval, Rate
from framework.examples import Example, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["ChoiceItem", "ChoiceResult", "mean_nll", "read_bbh", "read_mmlu", "score_choices"]

_MAX_LOGITS = 2**26
"""Logits held at once, 256 MiB in float32; long replies are computed in smaller batches."""
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_MMLU_COLUMNS = ("question", "choice0", "choice1", "choice2", "choice3", "answer")
_LETTERED = re.compile(r"^\(([A-Z])\)", re.MULTILINE)
_LISTED = re.compile(r"^- (.+)$", re.MULTILINE)


@dataclass(frozen=True)
class ChoiceItem:
    """A question with its possible answers."""

    id: str
    prompt: str
    """The whole question, lettered options included."""
    choices: tuple[str, ...]
    """What the model may answer: the letters, or the answers themselves."""
    answer: int
    """Index of the right one, from 0."""
    category: str = ""

    def __post_init__(self) -> None:
        """Refuse an item that cannot be scored."""
        if len(self.choices) < 2 or not all(self.choices) or not 0 <= self.answer < len(self.choices):
            raise DataError(
                f"Expected item `{self.id}` to have two or more choices and the answer among them, but got "
                f"{list(self.choices)!r} and answer {self.answer!r}."
            )


@dataclass(frozen=True)
class ChoiceResult:
    """Accuracy of a model on multiple-choice items."""

    accuracy: Rate
    predictions: tuple[int, ...]
    """Index of the likeliest choice of each item."""
    log_likelihoods: tuple[tuple[float, ...], ...]
    """Of every choice of every item: sum over its tokens, in nats."""


def score_choices(
    model: PreTrainedModel,
    encoder: ChatEncoder | PreTrainedTokenizerBase,
    items: Sequence[ChoiceItem],
    *,
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> ChoiceResult:
    """Return the accuracy of choosing, for each item, the choice of the highest log-likelihood (ties: the first).

    With a ``ChatEncoder`` the item is the user's turn and the choice the start of the reply. With a bare tokenizer the
    text is the item, "Answer:" on a line of its own, and the choice after a space. Choices of one token, such as
    letters, cost nothing beyond the prompt; others one short forward pass per distinct choice of a batch.

    Args:
        model: any HF causal language model, bare or wrapped by peft.
        encoder: how items become tokens.
        items: at least one.
        batch_size: items computed together.
        progress: called with (done, total) in items.

    Returns:
        Accuracy with its counts, predictions and log-likelihoods in the order of ``items``.

    Raises:
        ConfigError: the batch size is below 1.
        DataError: no items, or one that does not fit the model's context.
        WiringError: the model is under prompt learning.
    """
    prompts = [_prompt_ids(encoder, item.prompt) for item in items]
    ids = {choice: _choice_ids(encoder, choice) for item in items for choice in item.choices}
    room = max(map(len, ids.values()), default=1)
    check_prompts(model, prompts, max_new_tokens=room, batch_size=batch_size)
    order = sorted(range(len(items)), key=lambda i: -len(prompts[i]))
    scores: list[tuple[float, ...]] = [()] * len(items)
    with evaluating(model):
        prefix = shared_prefix(model, prompts)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = [prompts[i] for i in rows]
            state = prefill(model, batch, prefix=prefix, max_new_tokens=room, can_rewind=True)
            wanted = dict.fromkeys(choice for i in rows for choice in items[i].choices)
            found = {choice: state.log_probs(ids[choice]).sum(dim=-1).tolist() for choice in wanted}
            for row, i in enumerate(rows):
                scores[i] = tuple(found[choice][row] for choice in items[i].choices)
            if progress is not None:
                progress(start + len(rows), len(items))
    predictions = tuple(max(range(len(row)), key=row.__getitem__) for row in scores)
    num_right = sum(item.answer == guess for item, guess in zip(items, predictions, strict=True))
    return ChoiceResult(Rate.of("choice_accuracy", num_right, len(items)), predictions, tuple(scores))


def _prompt_ids(encoder: ChatEncoder | PreTrainedTokenizerBase, text: str) -> list[int]:
    if isinstance(encoder, ChatEncoder):
        return encoder.encode_prompt([Turn("user", text)])
    return list(encoder(f"{text}\nAnswer:")["input_ids"])


def _choice_ids(encoder: ChatEncoder | PreTrainedTokenizerBase, choice: str) -> list[int]:
    if isinstance(encoder, ChatEncoder):
        return encoder.encode_reply(choice, is_complete=False)
    return list(encoder(f" {choice}", add_special_tokens=False)["input_ids"])


def mean_nll(
    model: PreTrainedModel,
    encoder: ChatEncoder,
    examples: Sequence[Example],
    *,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> Mean:
    """Return the mean negative log-likelihood of the replies, in nats per reply token (end tokens included).

    The mean is over all reply tokens together; its interval treats replies as independent and their tokens as not.
    Logits are computed from the first reply position of the batch on, replies of like length sharing a batch.

    Args:
        model: any HF causal language model, bare or wrapped by peft.
        encoder: renders the conversations.
        examples: at least one.
        batch_size: replies computed together at most.
        progress: called with (done, total) in replies.

    Returns:
        The mean named ``nll``, with tokens as its count and replies as its groups.

    Raises:
        ConfigError: the batch size is below 1.
        DataError: no examples, or one that does not fit the model's context.
        WiringError: the model is under prompt learning.
    """
    rows = [encoder.encode_example(example) for example in examples]
    check_prompts(model, [row.input_ids[:-1] for row in rows], max_new_tokens=1, batch_size=batch_size)
    rows.sort(key=lambda row: (-row.num_reply_tokens, -len(row.input_ids)))
    vocab_size = model.config.get_text_config(decoder=True).vocab_size
    metric = MeanMetricWithInterval()
    with evaluating(model):
        start = 0
        while start < len(rows):
            affordable = _MAX_LOGITS // (vocab_size * rows[start].num_reply_tokens)
            batch = rows[start : start + min(batch_size, max(1, affordable))]
            start += len(batch)
            counts = [row.num_reply_tokens for row in batch]
            metric.update(_reply_nll(model, [row.input_ids for row in batch], counts), torch.tensor(counts))
            if progress is not None:
                progress(start, len(rows))
    return metric.mean("nll", is_shared=False)  # whoever calls has scored all rows


def _reply_nll(model: PreTrainedModel, rows: Sequence[Sequence[int]], counts: Sequence[int]) -> torch.Tensor:
    """Return minus the log-likelihood of the last ``counts`` ids of each row, float32 ``(batch,)`` on the CPU."""
    device = next(model.parameters()).device
    width, most = max(map(len, rows)), max(counts)
    # Padded on the left, so that all replies end in the last column.
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    is_reply = torch.tensor([[0] * (most - count) + [1] * count for count in counts])
    inputs: dict[str, Any] = {"input_ids": ids[:, :-1].to(device), "attention_mask": mask[:, :-1].to(device)}
    if has_position_argument(model):
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(dim=-1) - 1).clamp_min(0)
    logits = model(**inputs, use_cache=False, logits_to_keep=most).logits.float()
    targets = ids[:, -most:].to(device)
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return (losses.view_as(targets).cpu() * is_reply).sum(dim=-1)


def read_mmlu(path: Path) -> list[ChoiceItem]:
    """Return the items of one MMLU csv file (header question, choice0 … choice3, answer; answer 0 to 3).

    The category is the subject: the file's name without ``_test``, ``_dev`` or ``_val``.

    Raises:
        DataError: the file is missing or empty, or a row (named by its number) does not fit the layout.
    """
    category = re.sub(r"_(test|dev|val)$", "", path.stem)
    items = []
    for number, row in enumerate(csv.DictReader(io.StringIO(_read(path))), start=1):
        if any(not row.get(column) for column in _MMLU_COLUMNS) or row["answer"] not in ("0", "1", "2", "3"):
            raise DataError(
                f"Expected row {number} of `{path}` to have {', '.join(_MMLU_COLUMNS)} with an answer from 0 to 3, "
                f"but got {dict(row)!r}."
            )
        options = "\n".join(f"{_LETTERS[i]}. {row[f'choice{i}']}" for i in range(4))
        prompt = f"{row['question'].strip()}\n{options}\nAnswer with the letter of the right option."
        items.append(ChoiceItem(f"{path.stem}-{number}", prompt, tuple(_LETTERS[:4]), int(row["answer"]), category))
    if not items:
        raise DataError(f"Expected `{path}` to hold at least one question, but got none.")
    return items


def read_bbh(path: Path) -> list[ChoiceItem]:
    """Return the items of one BIG-Bench-Hard json file (``examples``, each with ``input`` and ``target``).

    Choices are the options in the input: ``(A) …`` by letter, ``- Yes`` by text. Where the input names none, they are
    all different targets of the file.

    Raises:
        DataError: the file is missing, no json of this layout, or a target is not among the options.
    """
    try:
        rows = [(str(row["input"]), str(row["target"]).strip()) for row in json.loads(_read(path))["examples"]]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise DataError(
            f"Expected `{path}` to be json with `examples` of `input` and `target`, but got {type(error).__name__}: "
            f"{error}."
        ) from error
    if not rows:
        raise DataError(f"Expected `{path}` to hold at least one question, but got none.")
    targets = tuple(sorted({target for _, target in rows}))
    items = []
    for number, (text, target) in enumerate(rows, start=1):
        choices = _options(text) or targets
        if target not in choices:
            raise DataError(
                f"Expected the target of example {number} of `{path}` to be one of {', '.join(choices)}, but got "
                f"{target!r}."
            )
        items.append(ChoiceItem(f"{path.stem}-{number}", text, choices, choices.index(target), path.stem))
    return items


def _options(text: str) -> tuple[str, ...]:
    """Return the options that ``text`` lists after the line "Options:", or none."""
    _, heading, listed = text.rpartition("Options:")
    if not heading:
        return ()
    lettered = tuple(f"({letter})" for letter in _LETTERED.findall(listed))
    return lettered or tuple(option.strip() for option in _LISTED.findall(listed))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"Expected `{path}` to be a readable text file, but got {type(error).__name__}: {error}."
        ) from error
