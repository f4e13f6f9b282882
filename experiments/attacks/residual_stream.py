"""What writes into the residual stream of a decoder, and taking one direction out of it: in weights or in passing.

A direction ``r`` of norm 1 is out of the stream when every matrix that writes into it is ``W - r r^T W`` (its columns
have no part along r), the token and position embeddings included.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from framework.errors import WiringError
from framework.layer_states import numbered_layers
from framework.parameters import clean_name
from framework.text_tower import is_image_text
from framework.weight_files import linear_weights
from methods.layer_freezing import layer_of

__all__ = [
    "Padded",
    "Writer",
    "adding",
    "find_layers",
    "find_writers",
    "last_logits",
    "orthogonalise",
    "pad_right",
    "states_before",
    "without_direction",
]

WRITERS = ("o_proj", "down_proj", "out_proj", "c_proj", "dense", "dense_4h_to_h", "fc2", "fc_out", "w2", "wo")
"""Last parts of the names of linear modules that write into the stream: attention output and MLP output."""
LEAST = 2
"""Writers of a layer: attention and MLP."""


class Writer(NamedTuple):
    """A module whose output is added to the residual stream."""

    name: str
    """Clean."""
    module: nn.Module


class Padded(NamedTuple):
    """Prompts of one batch, filled up on the right."""

    ids: torch.Tensor
    """int64 ``(batch, seq)``"""
    mask: torch.Tensor
    """int64 ``(batch, seq)``"""
    lengths: torch.Tensor
    """int64 ``(batch,)``"""


def find_layers(model: nn.Module) -> list[nn.Module]:
    """Return the decoder layers, in the order they stand.

    Raises:
        WiringError: no module is a numbered layer.
    """
    try:
        return numbered_layers(model, method="refusal_direction")
    except WiringError as error:
        if is_image_text(model):  # says itself what it lacks
            raise
        raise WiringError("Expected `model` to have numbered layers, but got none. Leave the attack out.") from error


def find_writers(model: nn.Module) -> list[Writer]:
    """Return the embeddings and every attention and MLP output, in the order of the model.

    Raises:
        WiringError: a layer has fewer than two known writers: the direction would stay in the stream.
    """
    get_width: Any = model.get_input_embeddings
    width = get_width().weight.shape[1]
    linear = {name for name, weight in linear_weights(model).items() if weight.oriented.shape[0] == width}
    found, per_layer = [], dict[int, int]()
    for name, module in model.named_modules():
        plain = clean_name(f"{name}.").rstrip(".")
        layer = layer_of(f"{plain}.")
        if isinstance(module, nn.Embedding) and module.embedding_dim == width and layer is None:
            found.append(Writer(plain, module))
        elif plain in linear and layer is not None and plain.rpartition(".")[2] in WRITERS:
            found.append(Writer(plain, module))
            per_layer[layer] = per_layer.get(layer, 0) + 1
    lacking = [layer for layer in range(len(find_layers(model))) if per_layer.get(layer, 0) < LEAST]
    if lacking:
        raise WiringError(
            f"Expected every layer to have an attention output and an MLP output named like one of "
            f"{', '.join(WRITERS)}, but layer {lacking[0]} has {per_layer.get(lacking[0], 0)}. Leave the attack out."
        )
    return found


@torch.no_grad()
def orthogonalise(model: nn.Module, direction: torch.Tensor) -> int:
    """Take a direction out of every writer of a model, in place, and return how many there were.

    Args:
        model: plain.
        direction: ``(hidden,)``, of norm 1.

    Raises:
        WiringError: as ``find_writers``.
    """
    writers = find_writers(model)
    for writer in writers:
        weight: Any = writer.module.weight
        r = direction.to(weight)
        bias: Any = getattr(writer.module, "bias", None)
        if isinstance(writer.module, nn.Linear):
            weight.sub_(torch.outer(r, r @ weight))
        else:  # embeddings hold a row a token, and Conv1D stores (in, out)
            weight.sub_(torch.outer(weight @ r, r))
        if bias is not None:
            bias.sub_(r * (r @ bias))
    return len(writers)


@contextlib.contextmanager
def without_direction(writers: Sequence[Writer], direction: torch.Tensor) -> Iterator[None]:
    """Take a direction of norm 1 out of what the writers write, inside the block, leaving all weights as they are."""

    def hook(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        r = direction.to(output)
        return output - (output @ r)[..., None] * r

    handles = [writer.module.register_forward_hook(hook) for writer in writers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def adding(layer: nn.Module, vector: torch.Tensor) -> Iterator[None]:
    """Add a vector to the stream before a layer, at all tokens, inside the block."""

    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            return (args[0] + vector.to(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"] + vector.to(kwargs["hidden_states"])}

    handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def pad_right(prompts: Sequence[Sequence[int]], *, pad_id: int, device: Any = None) -> Padded:
    """Return prompts as one batch; on the right padding changes no earlier token of a causal model."""
    lengths = torch.tensor([len(ids) for ids in prompts])
    ids = torch.full((len(prompts), int(lengths.max())), pad_id, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(list(prompt))
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    return Padded(ids.to(device), mask.to(device), lengths.to(device))


@torch.no_grad()
def last_logits(
    model: nn.Module, prompts: Sequence[Sequence[int]], *, pad_id: int, batch_size: int = 16
) -> torch.Tensor:
    """Return what the model says comes after every prompt, float32 ``(prompts, vocab)``.

    Args:
        model: in evaluation mode.
        prompts: token ids, none empty.
        pad_id: fills short prompts.
        batch_size: prompts of one forward pass.
    """
    device = next(model.parameters()).device
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    parts = []
    for start in range(0, len(prompts), batch_size):
        batch = pad_right(prompts[start : start + batch_size], pad_id=pad_id, device=device)
        rows, last = torch.arange(len(batch.lengths), device=device), batch.lengths - 1

        def select(_: Any, args: Any, rows: torch.Tensor = rows, last: torch.Tensor = last) -> Any:
            return (args[0][rows, last][:, None], *args[1:])

        handle = head.register_forward_pre_hook(select)
        try:
            parts.append(model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits[:, 0].float())
        finally:
            handle.remove()
    return torch.cat(parts).cpu()


@torch.no_grad()
def states_before(
    model: nn.Module, prompts: Sequence[Sequence[int]], *, positions: int, pad_id: int, batch_size: int = 16
) -> torch.Tensor:
    """Return the stream before every layer at the last tokens, float32 ``(prompts, positions, layers, hidden)``.

    Args:
        model: in evaluation mode.
        prompts: token ids, each at least ``positions`` long.
        positions: how many last tokens; the last one comes last.
        pad_id: fills short prompts.
        batch_size: prompts of one forward pass.
    """
    device = next(model.parameters()).device
    seen: list[torch.Tensor] = []
    state: dict[str, torch.Tensor] = {}

    def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        rows = torch.arange(hidden.shape[0], device=hidden.device)[:, None]
        seen.append(hidden[rows, state["places"]].float().cpu())

    handles = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in find_layers(model)]
    parts = []
    try:
        for start in range(0, len(prompts), batch_size):
            batch = pad_right(prompts[start : start + batch_size], pad_id=pad_id, device=device)
            state["places"] = batch.lengths[:, None] + torch.arange(-positions, 0, device=device)
            seen.clear()
            last_token_only = {"logits_to_keep": 1} if _takes_logits_to_keep(model) else {}
            model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False, **last_token_only)
            parts.append(torch.stack(seen, dim=2))
    finally:
        for handle in handles:
            handle.remove()
    return torch.cat(parts)


def _takes_logits_to_keep(model: nn.Module) -> bool:
    return "logits_to_keep" in inspect.signature(model.forward).parameters
