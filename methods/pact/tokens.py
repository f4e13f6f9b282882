"""Finding the safety tokens: what an aligned model expects in refusals and its unaligned base does not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from framework.batch import collate
from framework.chat import ChatEncoder, EncodedExample
from framework.errors import DataError, ModelError, WiringError
from framework.examples import Example
from framework.files import fingerprint, write_json
from framework.module import forward_reply_tokens
from framework.reference import on_fast_device, reference_mode

__all__ = [
    "RefusalRow",
    "SafetyTokens",
    "assistant_header",
    "choose_tokens",
    "find_safety_tokens",
    "load_tokens",
    "read_both",
    "refusal_logits",
    "refusal_rows",
    "save_tokens",
    "tokenizer_fingerprint",
    "tokens_key",
]

TENSORS = "tokens.safetensors"
TABLE = "tokens.json"
PAIRS = 4
"""Pairs read at a time: the whole vocabulary of every reply token is kept."""


class SafetyTokens(NamedTuple):
    """The safety tokens, by falling probability under the aligned model."""

    ids: torch.Tensor
    """int64 ``(K,)``"""
    weights: torch.Tensor
    """float64 ``(K,)``: standardised score, of norm 1; above 0 where the aligned model expects the token more."""
    aligned: torch.Tensor
    """float64 ``(K,)``, mean probability under the aligned model."""
    unaligned: torch.Tensor
    """float64 ``(K,)``, under the unaligned one."""


class RefusalRow(NamedTuple):
    """One pair as both models read it; the reply has the same tokens in both."""

    aligned: EncodedExample
    unaligned: EncodedExample


Logits = Callable[[Sequence[EncodedExample]], torch.Tensor]
"""Returns the logits at the reply tokens of some rows, row by row: ``(tokens, vocab)``."""


def refusal_rows(
    pairs: Sequence[Example], encoder: ChatEncoder, *, reply_tokens: int, is_plain: bool = True
) -> list[RefusalRow]:
    """Return the pairs encoded for both models.

    Args:
        pairs: harmful prompts and refusals.
        encoder: of the aligned model.
        reply_tokens: how many of the first tokens of each refusal are used.
        is_plain: whether the unaligned model reads ``User: ...`` and ``Assistant: `` instead of the chat template.

    Raises:
        DataError: there are no pairs, or no refusal has tokens.
    """
    rows = []
    for pair in pairs:
        reply = encoder.encode_reply(pair.reply.strip(), is_complete=False)[:reply_tokens]
        if not reply:
            continue
        prompt = encoder.encode_prompt(pair.messages)
        text = "".join(f"User: {turn.content}\n\n" for turn in pair.messages if turn.role == "user") + "Assistant: "
        # An empty reply has no end token when it is cut off, so this gives the tokens of the text alone.
        plain = encoder.encode_reply(text, is_complete=False) if is_plain else prompt
        rows.append(
            RefusalRow(EncodedExample((*prompt, *reply), len(prompt)), EncodedExample((*plain, *reply), len(plain)))
        )
    if not rows:
        raise DataError(
            f"Expected pairs of harmful prompt and refusal to find safety tokens in, but got none among {len(pairs)} "
            "rows. Name others with `source`."
        )
    return rows


def refusal_logits(model: nn.Module, *, is_reference: bool = True) -> Logits:
    """Return the function that reads a model's logits at reply tokens.

    Args:
        model: on the device it is to compute on.
        is_reference: whether its adapter is switched off. With one adapter on a shared base, on is one model and
            off the other, and no second one is needed.
    """

    def logits(rows: Sequence[EncodedExample]) -> torch.Tensor:
        device = next(model.parameters()).device
        batch = collate(rows, example_ids=range(len(rows)), pad_id=0, step_reply_tokens=1).to(device)
        if is_reference:
            with reference_mode(model):
                return forward_reply_tokens(model, batch).logits
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad():
                return forward_reply_tokens(model, batch).logits
        finally:
            model.train(was_training)

    return logits


def find_safety_tokens(
    rows: Sequence[RefusalRow],
    aligned: Logits,
    unaligned: Logits,
    *,
    num_tokens: int = 50,
    temperature: float = 1.0,
    is_log_ratio: bool = False,
) -> SafetyTokens:
    """Return the safety tokens of the aligned model.

    Probabilities and their difference are averaged over the reply tokens of a pair, then over pairs.

    Args:
        rows: at least one pair.
        aligned: reads the aligned model.
        unaligned: reads the unaligned model.
        num_tokens: K.
        temperature: divides the logits.
        is_log_ratio: score by ``p_a (log p_u - log p_a)`` instead of ``p_a - p_u``.

    Raises:
        WiringError: the models differ in vocabulary or give the same probabilities, or K is larger than the vocabulary.
    """
    sums: list[torch.Tensor] = []
    for start in range(0, len(rows), PAIRS):
        part = rows[start : start + PAIRS]
        lengths = [row.aligned.num_reply_tokens for row in part]
        ours, theirs = aligned([row.aligned for row in part]), unaligned([row.unaligned for row in part])
        if ours.shape != theirs.shape:
            raise WiringError(
                f"Expected two models with one vocabulary, but got {ours.shape[-1]} and {theirs.shape[-1]} tokens. "
                "Compare models with the same tokenizer."
            )
        ours, theirs = ((z.double() / temperature).log_softmax(-1) for z in (ours, theirs))
        score = ours.exp() * (theirs - ours) if is_log_ratio else ours.exp() - theirs.exp()
        stacked = torch.stack([ours.exp(), theirs.exp(), score])
        means = torch.stack([piece.mean(dim=1) for piece in stacked.split(lengths, dim=1)]).sum(dim=0)
        sums.append(means.cpu())
    p_aligned, p_unaligned, difference = torch.stack(sums).sum(dim=0) / len(rows)
    return choose_tokens(p_aligned, p_unaligned, difference, num_tokens=num_tokens)


def tokens_key(
    rows: Sequence[RefusalRow],
    *,
    aligned: str,
    unaligned: str,
    dtype: torch.dtype,
    num_tokens: int,
    temperature: float,
    score: str,
) -> dict[str, Any]:
    """Return everything that decides the safety tokens; their fingerprint is that of this.

    Args:
        rows: the pairs, encoded for both models.
        aligned: fingerprint of the aligned model.
        unaligned: of the unaligned one.
        dtype: number format both compute in.
        num_tokens: K.
        temperature: divides the logits.
        score: ``difference`` or ``log_ratio``.
    """
    return {
        "aligned": aligned,
        "unaligned": unaligned,
        "dtype": str(dtype),
        "pairs": fingerprint([[list(side.input_ids), side.num_prompt_tokens] for row in rows for side in row]),
        "settings": [num_tokens, temperature, score],
    }


def choose_tokens(
    aligned: torch.Tensor, unaligned: torch.Tensor, score: torch.Tensor, *, num_tokens: int
) -> SafetyTokens:
    """Return the K most probable tokens under the aligned model, with their standardised scores.

    Args:
        aligned: mean probabilities, ``(vocab,)``.
        unaligned: the same of the other model.
        score: ``(vocab,)``.
        num_tokens: K, at most the vocabulary.

    Raises:
        WiringError: K is larger than the vocabulary, or all scores are the same.

    Example:
        >>> p = torch.tensor([0.5, 0.3, 0.1, 0.1]).double()
        >>> found = choose_tokens(p, p.flip(0), p - p.flip(0), num_tokens=2)
        >>> found.ids.tolist(), [round(w, 3) for w in found.weights.tolist()]
        ([0, 1], [0.707, -0.707])
    """
    if num_tokens > aligned.shape[0]:
        raise WiringError(
            f"Expected `num_tokens` to be at most the {aligned.shape[0]} tokens of the vocabulary, but got "
            f"{num_tokens}."
        )
    ids = aligned.sort(descending=True, stable=True).indices[:num_tokens]
    # Dividing by the standard deviation too would change nothing: the norm is 1 afterwards.
    centred = score[ids] - score[ids].mean()
    norm = centred.norm()
    if not norm > 1e-12:
        raise WiringError(
            "Expected the aligned and the unaligned model to differ on refusals, but their probabilities are the same. "
            "Name the model before alignment with `base`."
        )
    return SafetyTokens(ids, centred / norm, aligned[ids], unaligned[ids])


def save_tokens(folder: Path, tokens: SafetyTokens, *, tokenizer: Any = None) -> None:
    """Write the tokens as tensors, and as a table to read when a tokenizer is given."""
    save_file({name: value.contiguous() for name, value in tokens._asdict().items()}, folder / TENSORS)
    if tokenizer is not None:
        write_json(folder / TABLE, token_table(tokens, tokenizer))


def load_tokens(folder: Path) -> SafetyTokens:
    """Return the tokens that ``save_tokens`` wrote."""
    return SafetyTokens(**load_file(folder / TENSORS))


def token_table(tokens: SafetyTokens, tokenizer: Any) -> list[dict[str, Any]]:
    """Return a line for every token: id, text, weight and mean probabilities."""
    columns = (tokens.ids, tokens.weights, tokens.aligned, tokens.unaligned)
    return [
        {"id": i, "text": tokenizer.decode([i]), "weight": w, "aligned": a, "unaligned": u}
        for i, w, a, u in zip(*(column.tolist() for column in columns), strict=True)
    ]


def assistant_header(encoder: ChatEncoder) -> list[int]:
    """Return the ids with which the template opens a reply.

    Raises:
        ModelError: the template has no such opening.
    """
    chat = [{"role": "user", "content": "hello"}]
    texts = [
        str(encoder.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=is_open))
        for is_open in (False, True)
    ]
    header = texts[1].removeprefix(texts[0]) if texts[1].startswith(texts[0]) else ""
    if not header.strip():
        raise ModelError(
            "Expected the chat template to open the assistant's reply with a header, but got none. PACT reads replies "
            "without their prompt; use a template with an assistant header."
        )
    return encoder.encode_reply(header, is_complete=False)


def tokenizer_fingerprint(tokenizer: Any, *, with_template: bool = True) -> str:
    """Return 16 hex digits of the vocabulary, and of the chat template if wanted."""
    template = str(tokenizer.chat_template) if with_template else ""
    return fingerprint({"vocab": tokenizer.get_vocab(), "template": template})


def read_both(model: nn.Module, other: nn.Module, rows: Sequence[RefusalRow], **settings: Any) -> SafetyTokens:
    """Return the safety tokens of ``model`` with its adapter off, ``other`` being the unaligned model."""
    with on_fast_device(model), on_fast_device(other):
        return find_safety_tokens(rows, refusal_logits(model), refusal_logits(other), **settings)
