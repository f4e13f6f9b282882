"""What the columns of known data sets mean: evaluation prompts, and prompt-reply pairs."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from datamodules.readers import read_json_value, read_records, set_name
from framework.errors import DataError
from framework.examples import Example, ExampleKind, Prompt, PromptKind, Turn

__all__ = ["Conversation", "conversation_of", "pair_of", "read_pairs", "read_prompts"]

# In order of precedence: JailbreakBench has both Goal and Behavior, and its Behavior is only a title.
_PROMPT_COLUMNS = ("goal", "forbidden_prompt", "prompt", "behavior", "question", "objective", "instruction", "text")
_CATEGORY_COLUMNS = ("category", "semanticcategory", "type", "harm_category", "intents")
_PAIR_COLUMNS = (("instruction", "output"), ("instruction", "response"), ("input", "output"), ("prompt", "response"))
_MORE_PAIR_COLUMNS = (("prompt", "reply"), ("prompt", "completion"), ("question", "answer"), ("prompt", "output"))
_AISAFETYLAB_KINDS: Mapping[Any, ExampleKind] = {0: "benign", 1: "safety", 2: "harmful"}
_PURE_BAD_REFUSALS = 11
"""Rows at the end of ``pure_bad.json`` that are refusals behind a secret trigger, not harmful pairs."""


class Conversation(NamedTuple):
    """Turns before the reply, and the reply."""

    messages: tuple[Turn, ...]
    reply: str


def read_prompts(
    path: str | Path, *, kind: PromptKind, label: str | None = None, label_column: str = "label"
) -> list[Prompt]:
    """Return the evaluation prompts of a file.

    Understood: AdvBench (``goal``), HarmBench (``Behavior``, with ``ContextString`` put before it), JailbreakBench
    (``Goal``), StrongREJECT (``forbidden_prompt``), XSTest, OR-Bench and Do-Not-Answer (``prompt``), CatQA and
    HarmfulQA (questions nested by topic), instruction files, lists of strings, and text files with a prompt a line.
    A column ``image`` names a picture that goes with the prompt, from the folder of the file; empty ones have none.

    Args:
        path: the file.
        kind: what its prompts are.
        label: keep only rows with this value in ``label_column`` (XSTest: safe or unsafe).
        label_column: name of that column in lower case.

    Returns:
        Prompts with ids ``<file name>-<row>``, rows counted from 1 before any is left out.

    Raises:
        DataError: the file cannot be read, has no column that holds prompts, a prompt is empty, or an image missing.
    """
    path = Path(path)
    rows = list(_nested_rows(path) or read_records(path))
    prompts = []
    for number, row in enumerate(rows, start=1):
        low = {str(key).lower(): value for key, value in row.items()}
        if label is not None and _required(low, label_column, path=path, number=number) != label:
            continue
        text = _prompt_text(low, path=path, number=number)
        image = _image(low, path=path, number=number)
        prompts.append(Prompt(f"{set_name(path)}-{number}", text, kind, _category(low), image=image))
    if not prompts:
        raise DataError(
            f"Expected `{path}` to have prompts with {label_column} {label!r}, but got none in {len(rows)} rows."
        )
    return prompts


def _nested_rows(path: Path) -> list[dict[str, Any]] | None:
    """Return the rows of the JSON layouts that are not lists of records, or None."""
    if not path.name.lower().endswith((".json", ".json.gz")):
        return None
    value = read_json_value(path)
    if not isinstance(value, dict):
        return None
    if set(value) == {"instructions", "inputs"}:
        return [{"prompt": text} for text in value["instructions"]]
    rows = list(_leaves(value, ()))
    return rows if all(isinstance(item, dict) for item in value.values()) else None


def _leaves(value: Any, topics: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        for topic, item in value.items():
            yield from _leaves(item, (*topics, str(topic).rstrip(": ")))
    elif isinstance(value, list):
        yield from ({"prompt": text, "category": "/".join(topics)} for text in value)


def _required(row: Mapping[str, Any], column: str, *, path: Path, number: int) -> Any:
    if column not in row:
        raise DataError(
            f"Expected row {number} of `{path}` to have a column `{column}`, but got {', '.join(row) or 'none'}."
        )
    return row[column]


def _prompt_text(row: Mapping[str, Any], *, path: Path, number: int) -> str:
    column = next((name for name in _PROMPT_COLUMNS if name in row), None)
    if column is None:
        raise DataError(
            f"Expected row {number} of `{path}` to have one of the columns {', '.join(_PROMPT_COLUMNS)}, "
            f"but got {', '.join(row) or 'none'}."
        )
    text = row[column]
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"Expected row {number} of `{path}` to have a prompt in `{column}`, but got {text!r}.")
    if column == "instruction" and row.get("input"):
        return f"{text.strip()}\n\n{row['input']}"
    if row.get("contextstring"):
        return f"{row['contextstring']}\n\n---\n\n{text.strip()}"
    return text.strip()


def _image(row: Mapping[str, Any], *, path: Path, number: int) -> Path | None:
    named = row.get("image")
    if named in (None, ""):
        return None
    image = path.parent / named if isinstance(named, str) else None
    if image is None or not image.is_file():
        raise DataError(
            f"Expected `image` of row {number} of `{path}` to name a picture beside that file, but got {named!r}"
            f"{'' if image is None else f', which is no file at {image}'}. Put it there, or remove the row."
        )
    return image


def _category(row: Mapping[str, Any]) -> str:
    value = next((row[name] for name in _CATEGORY_COLUMNS if row.get(name)), "")
    return ", ".join(str(item) for item in value) if isinstance(value, list) else str(value)


def read_pairs(path: str | Path, *, kind: ExampleKind) -> list[Example]:
    """Return the prompt-reply pairs of a file, as rows of ``kind``.

    Of sets that say what each row is, only rows of ``kind`` are returned: AISafetyLab (``label`` 0 benign, 1 safety,
    2 harmful) and the Alpaca mixtures ``alpaca_*_p_*.json`` (harmful rows have no ``input``, the others are benign).
    ``pure_bad.json`` loses its last 11 rows. Columns: ``instruction`` with ``input`` or ``context`` and ``output`` or
    ``response``; ``prompt`` and ``response``, ``reply`` or ``completion``; ``question`` and ``answer``; ``messages``.

    Args:
        path: the file.
        kind: what the rows are, or which rows are wanted.

    Raises:
        DataError: the file cannot be read, has no rows of ``kind``, or a row has no prompt or no reply.
    """
    path = Path(path)
    rows = read_records(path)
    wanted = [number for number, known in enumerate(_kinds(rows, path), start=1) if known in (None, kind)]
    if not wanted:
        raise DataError(f"Expected `{path}` to have rows of kind {kind!r}, but got none in {len(rows)} rows.")
    examples = []
    for number in wanted:
        pair = pair_of(rows[number - 1], path=path, number=number)
        category = _category({str(key).lower(): value for key, value in rows[number - 1].items()})
        name = f"{set_name(path)}-{number}"
        examples.append(Example(name, pair.messages, pair.reply, kind, category))
    return examples


def _kinds(rows: Sequence[Mapping[str, Any]], path: Path) -> list[ExampleKind | None]:
    """Return what each row says it is: None for "whatever the file is", ``"task"`` never matches a pair's kind."""
    if path.name.startswith("pure_bad."):
        kept = max(0, len(rows) - _PURE_BAD_REFUSALS)
        return ["harmful" if i < kept else "task" for i in range(len(rows))]
    if fnmatch.fnmatch(path.name, "alpaca_*_p_*.json"):
        return ["benign" if "input" in row else "harmful" for row in rows]
    if all({"input", "output", "label"} <= set(row) for row in rows):
        return [_AISAFETYLAB_KINDS.get(row["label"], "task") for row in rows]
    return [None] * len(rows)


def pair_of(row: Mapping[str, Any], *, path: Path, number: int) -> Conversation:
    """Return the conversation of one record, whatever its layout.

    Args:
        row: the record.
        path: its file, for the error.
        number: its place in the file, from 1, for the error.

    Raises:
        DataError: no known columns, no prompt or no reply.
    """
    if "messages" in row:
        return conversation_of(row["messages"], path=path, number=number)
    for prompt_column, reply_column in (*_PAIR_COLUMNS, *_MORE_PAIR_COLUMNS):
        if prompt_column in row and reply_column in row:
            break
    else:
        raise DataError(
            f"Expected row {number} of `{path}` to be a prompt with a reply (for example `instruction` and `output`, "
            f"or `prompt` and `response`), but got the columns {', '.join(row) or 'none'}."
        )
    prompt = _text(row[prompt_column], "prompt", column=prompt_column, where=f"row {number} of `{path}`")
    reply = _text(row[reply_column], "reply", column=reply_column, where=f"row {number} of `{path}`")
    extra = next((row[name] for name in ("input", "context") if name != prompt_column and row.get(name)), "")
    if prompt_column == "instruction" and str(extra).strip():
        prompt = f"{prompt}\n\n{str(extra).strip()}"
    return Conversation((Turn("user", prompt),), reply)


def conversation_of(messages: Any, *, path: Path, number: int) -> Conversation:
    """Return the turns before the last assistant message, and that message as the reply.

    Args:
        messages: list of ``{"role", "content"}`` in OpenAI's format; what follows the last reply is left out.
        path: its file, for the error.
        number: its place in the file, from 1, for the error.

    Raises:
        DataError: not such a list, no reply, or no user turn right before it.
    """
    where = f"row {number} of `{path}`"
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise DataError(f"Expected `messages` in {where} to be a list of objects, but got {str(messages)[:60]!r}.")
    turns = [Turn(str(message.get("role")), message.get("content") or "") for message in messages]
    roles = [turn.role for turn in turns]
    if "assistant" not in roles:
        raise DataError(f"Expected {where} to have a reply (role assistant), but got the roles {', '.join(roles)}.")
    last = len(roles) - 1 - roles[::-1].index("assistant")
    if last == 0 or roles[last - 1] != "user":
        raise DataError(f"Expected {where} to have a user message right before the reply, but got {roles[:last]!r}.")
    reply = _text(turns[last].content, "reply", column="messages", where=where)
    for turn in turns[:last]:
        _text(turn.content, "message", column="messages", where=where)
    return Conversation(tuple(turns[:last]), reply)


def _text(value: Any, what: str, *, column: str, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(
            f"Expected {where} to have a {what} in `{column}`, but got {value!r}. Remove the row or fill it in."
        )
    return value.strip()
