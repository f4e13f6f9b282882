"""Replies of an image-text model to prompts with an image, through the model's processor and ``model.generate``.

Slower than the decode loop for text, which knows no pixels: nothing is shared between prompts, and sampled replies are
drawn one at a time, so that a reply depends on (seed, prompt number) alone.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from framework.chat import ChatEncoder
from framework.errors import DataError, ModelError
from framework.evaluation.decoding import evaluating
from framework.examples import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["ImageReply", "generate_image_ids"]


class ImageReply(NamedTuple):
    """Ids of one prompt and of what came of it."""

    prompt_ids: list[int]
    """Those of the image's place included, padding left out."""
    ids: list[int]
    """1 to ``max_new_tokens``; an end token is the last one."""


def generate_image_ids(
    model: PreTrainedModel,
    encoder: ChatEncoder,
    batches: Sequence[Sequence[tuple[int, Prompt]]],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> dict[int, ImageReply]:
    """Return the ids generated for each prompt by its number.

    Args:
        model: an image-text model.
        encoder: with the model's processor.
        batches: prompts with an image and their numbers, generated together when greedy.
        max_new_tokens: limit per reply, in tokens.
        temperature: 0 is greedy.
        seed: with the number it decides a sampled reply.
        progress: called with the prompts that are done.

    Raises:
        ModelError: the model looks at no images.
        DataError: an image cannot be read, or a prompt does not fit the model's context with its reply.
    """
    found: dict[int, ImageReply] = {}
    with evaluating(model):
        for batch in batches:
            for part in [batch] if temperature == 0 else [[one] for one in batch]:
                found |= _generate(model, encoder, part, max_new_tokens, temperature, seed)
            if progress is not None:
                progress(len(found))
    return found


def _generate(
    model: PreTrainedModel,
    encoder: ChatEncoder,
    batch: Sequence[tuple[int, Prompt]],
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> dict[int, ImageReply]:
    from transformers import GenerationConfig

    inputs = _inputs(model, encoder, [prompt for _, prompt in batch])
    width = inputs["input_ids"].shape[1]
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and width + max_new_tokens > context:
        raise DataError(
            f"Expected prompts with images and {max_new_tokens} new tokens to fit the model's context of {context} "
            f"tokens, but got {width} tokens in a batch with {batch[0][1].id!r}. Lower max_new_tokens, or shorten the "
            "prompts or their images."
        )
    stops = list(encoder.stop_ids)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    pad_id = encoder.tokenizer.pad_token_id
    settings = GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=stops, pad_token_id=pad_id, **sampling)
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []), torch.no_grad():
        digest = hashlib.blake2b(f"{seed}:{batch[0][0]}".encode(), digest_size=7).digest()
        torch.manual_seed(int.from_bytes(digest, "big"))
        with _plain_generation(model):
            made: Any = model.generate(**inputs, generation_config=settings)  # type: ignore[operator]
    replies = {}
    for row, (number, _) in enumerate(batch):
        real = inputs["input_ids"][row][inputs["attention_mask"][row].bool()].tolist()
        replies[number] = ImageReply(real, list(_until_end(made[row, width:].tolist(), stops)))
    return replies


@contextlib.contextmanager
def _plain_generation(model: PreTrainedModel) -> Iterator[None]:
    """Put the model's own generation settings (beams, penalties) aside: transformers fills what is not set from them.

    Replies are decoded as those to prompts without an image are.
    """
    from transformers import GenerationConfig

    kept: Any = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = kept


def _inputs(model: PreTrainedModel, encoder: ChatEncoder, prompts: Sequence[Prompt]) -> dict[str, Any]:
    if encoder.processor is None:
        raise ModelError(
            f"Expected a model that looks at images for prompt {prompts[0].id!r}, but got one for text alone. Name an "
            "image-text model, or leave out the sets with images."
        )
    texts = [encoder.render_with_image(prompt.messages, prefill=prompt.prefill) for prompt in prompts]
    images = [[_read_image(prompt.image)] for prompt in prompts if prompt.image is not None]
    try:
        encoded = encoder.processor(
            text=texts, images=images, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
        )
    except (ValueError, RuntimeError) as error:
        raise DataError(
            f"Expected the images of prompts {prompts[0].id!r} to {prompts[-1].id!r} to make one batch, but got: "
            f"{str(error).splitlines()[0]}. Set the batch size to 1, or bring them to one size."
        ) from error
    moved = encoded.to(model.device)
    return {k: v.to(model.dtype) if torch.is_floating_point(v) else v for k, v in moved.items()}


def _read_image(path: Path) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, UnidentifiedImageError, ValueError) as error:
        raise DataError(f"Expected `{path}` to be an image, but got: {error}. Save it as PNG or JPEG.") from error


def _until_end(ids: Sequence[int], stops: Sequence[int]) -> Iterator[int]:
    for token in ids:
        yield token
        if token in stops:
            return
