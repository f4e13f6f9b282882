"""Conversations to token ids through the tokenizer's own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from framework.errors import ModelError
from framework.examples import Example, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ChatEncoder", "EncodedExample"]

_SENTINEL = "sentinel"


@dataclass(frozen=True)
class EncodedExample:
    """A training row as token ids."""

    input_ids: tuple[int, ...]
    """Prompt, reply, end token."""
    num_prompt_tokens: int
    """How many leading ids carry no loss."""
    num_truncated: int = 0
    """Ids cut from the left."""

    @property
    def num_reply_tokens(self) -> int:
        """Ids that carry loss."""
        return len(self.input_ids) - self.num_prompt_tokens


class ChatEncoder:
    """Renders conversations with the model's chat template and finds out how a reply ends in it."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        system: str | None = None,
        max_prompt_tokens: int | None = None,
        processor: Any = None,
    ) -> None:
        """Read the end token off the template.

        Args:
            tokenizer: must have a chat template.
            system: system message put before conversations that have none; None leaves the template's own default,
                the empty string asks for an empty system message.
            max_prompt_tokens: longer prompts lose ids from the left when they are encoded for generation; None keeps
                them whole, and generation refuses those that do not fit.
            processor: of an image-text model; renders prompts with images.

        Raises:
            ModelError: the tokenizer has no chat template.
        """
        if not getattr(tokenizer, "chat_template", None):
            raise ModelError(
                "Expected the tokenizer to have a chat template, but got none. Choose an instruction-tuned model, or "
                "save a template with it: `tokenizer.chat_template = ...; tokenizer.save_pretrained(folder)`."
            )
        self.tokenizer = tokenizer
        self.system = system
        self.max_prompt_tokens = max_prompt_tokens
        self.processor = processor
        # Templates of image-text models take a list of parts, and some silently drop a plain text.
        plain = [{"role": "user", "content": _SENTINEL}]
        self._has_parts = _SENTINEL not in str(tokenizer.apply_chat_template(plain, tokenize=False))
        self.end_ids = self._find_end_ids()
        """Ids that close a reply (usually one: the end-of-turn token)."""

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids at which generation stops: the template's end of turn and the tokenizer's end of sequence."""
        eos = self.tokenizer.eos_token_id
        return tuple(dict.fromkeys([*self.end_ids[:1], *([] if eos is None else [eos])]))

    def render_prompt(self, messages: Sequence[Turn], *, prefill: str = "") -> str:
        """Return the text up to where the reply starts, plus ``prefill``."""
        chat = [{"role": turn.role, "content": self._content(turn.content)} for turn in self._turns(messages)]
        text = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        return str(text) + prefill

    def render_with_image(self, messages: Sequence[Turn], *, prefill: str = "") -> str:
        """Return the same with the place of one image before the last turn's text, by the processor's template."""
        chat: list[dict[str, Any]] = [
            {"role": turn.role, "content": [{"type": "text", "text": turn.content}]} for turn in self._turns(messages)
        ]
        chat[-1]["content"].insert(0, {"type": "image"})
        return str(self.processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)) + prefill

    def encode_prompt(self, messages: Sequence[Turn], *, prefill: str = "") -> list[int]:
        """Return the ids of a prompt, ready for generation, cut from the left to ``max_prompt_tokens``."""
        ids = self._ids(self.render_prompt(messages, prefill=prefill))
        return ids if self.max_prompt_tokens is None else ids[-self.max_prompt_tokens :]

    def encode_reply(self, reply: str, *, is_complete: bool = True) -> list[int]:
        """Return the ids of a reply with its end token (left out when the reply was cut off)."""
        return self._ids(reply) + (list(self.end_ids) if is_complete else [])

    def encode_example(self, example: Example, *, max_length: int | None = None) -> EncodedExample:
        """Return a training row's ids; longer rows lose ids from the left and say how many.

        Prompt and reply are tokenised apart, so the loss mask never splits a token.
        """
        prompt = self.encode_prompt(example.messages, prefill=example.prefill)
        reply = self.encode_reply(example.reply, is_complete=example.is_complete)
        over = max(0, len(prompt) + len(reply) - max_length) if max_length else 0
        # Nothing predicts the first id of a row, so it carries no loss even when the cut went into the reply.
        return EncodedExample(tuple((prompt + reply)[over:]), max(1, len(prompt) - over), over)

    def _turns(self, messages: Sequence[Turn]) -> list[Turn]:
        has_own = self.system is None or messages[0].role == "system"
        return list(messages) if has_own else [Turn("system", self.system or ""), *messages]

    def _content(self, text: str) -> Any:
        return [{"type": "text", "text": text}] if self._has_parts else text

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _find_end_ids(self) -> tuple[int, ...]:
        turns = (("user", "a"), ("assistant", _SENTINEL))
        chat = [{"role": role, "content": self._content(text)} for role, text in turns]
        text = str(self.tokenizer.apply_chat_template(chat, tokenize=False))
        tail = text[text.rindex(_SENTINEL) + len(_SENTINEL) :]
        # Some tokenizers mark the end-of-turn token as special without listing it among the named ones.
        marked = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        special = {*self.tokenizer.all_special_ids, *marked}
        for token in self._ids(tail):
            if token in special:
                return (token,)
        if self.tokenizer.eos_token_id is None:
            raise ModelError(
                "Expected the chat template or the tokenizer to name an end token, but got neither. "
                "Set `tokenizer.eos_token`, or a reply would never end."
            )
        return (self.tokenizer.eos_token_id,)
