"""Mined prompts as a file: mined on one machine, trained on another.

The first line says whose rollouts these are, what they were mined for and who judged them; each further line is a
prompt with its counts and the replies that may be learnt. A file without such a first line, e.g. one written by hand,
is taken as it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datamodules.mining.hardness import Hardness
from datamodules.mining.selection import MinedPrompt, MinedReply, MinedSets
from datamodules.readers import find_file, read_records
from framework.errors import DataError
from framework.examples import Prompt
from framework.files import write_atomic

__all__ = ["read_mined", "write_mined"]

KEY, TEMPLATE, TARGET, JUDGES = "mined_from", "template", "target", "judges"


def write_mined(path: Path, mined: MinedSets, *, target: str, judges: Sequence[str]) -> None:
    """Write everything that was mined, at once or not at all.

    Args:
        path: the file.
        mined: with the key of the model; without one the file names no model, target or judges.
        target: which rollouts may be learnt.
        judges: of the rollouts, by name.

    Raises:
        StorageError: the file cannot be written.
    """
    lines = (
        [json.dumps({KEY: mined.key, TEMPLATE: mined.template, TARGET: target, JUDGES: list(judges)})]
        if mined.key
        else []
    )
    lines += [json.dumps(_line(one), ensure_ascii=False) for one in (*mined.harmful, *mined.benign)]
    write_atomic(path, "\n".join(lines) + "\n")


def read_mined(
    name_or_path: str | Path, *, model_key: str, template: str, target: str, judges: Sequence[str]
) -> MinedSets:
    """Return the content of a file of mined prompts.

    Args:
        name_or_path: the file.
        model_key: fingerprint of the model to be trained.
        template: of its conversations, as ``mine.template_key`` gives it.
        target: which rollouts are to be learnt.
        judges: who is to have judged them, in any order.

    Raises:
        DataError: the file cannot be read, was mined from another model or under another system message or chat
            template, for another target or with other judges, or a line lacks something.
    """
    path = find_file(name_or_path)
    rows = read_records(path)
    key = str(rows[0][KEY]) if rows and KEY in rows[0] else ""
    if key and key != model_key:
        raise DataError(
            f"Expected `{path}` to be mined from the model that is trained ({model_key}), but got prompts mined from "
            f"another ({key}). What is hard for one model is not for another: mine this one with `seawall mine`."
        )
    if key and rows[0].get(TEMPLATE, template) != template:
        raise DataError(
            f"Expected `{path}` to be mined under the system message and chat template of the training, but got "
            "others. Set `model.system` to what the file was mined with, or mine again with `seawall mine`."
        )
    if key:
        _check_mining(rows[0], path=path, target=target, judges=judges)
    found: dict[str, list[MinedPrompt]] = {"harmful": [], "benign": []}
    for number, row in enumerate(rows[1:] if key else rows, start=2 if key else 1):
        mined = _read(row, path=path, number=number)
        found[mined.prompt.kind].append(mined)
    return MinedSets(tuple(found["harmful"]), tuple(found["benign"]), model_key, template)


def _check_mining(header: Mapping[str, Any], *, path: Path, target: str, judges: Sequence[str]) -> None:
    """Refuse replies that were mined to teach something else, or counts of other judges."""
    found = header.get(JUDGES)
    judged = isinstance(found, list) and sorted(map(str, found)) == sorted(judges)
    for name, wanted, is_same in ((TARGET, target, header.get(TARGET) == target), (JUDGES, list(judges), judged)):
        if not is_same:
            raise DataError(
                f"Expected `{path}` to be mined with `{name}` {wanted!r}, but got {header.get(name)!r}. Set `{name}` "
                "to what the file was mined with, or mine again with `seawall mine`."
            )


def _line(mined: MinedPrompt) -> dict[str, Any]:
    prompt, counts = mined.prompt, mined.counts
    return {
        "id": prompt.id,
        "kind": prompt.kind,
        "prompt": prompt.text,
        "category": prompt.category,
        "counts": list(counts),
        "targets": [list(target) for target in mined.targets],
    }


def _read(row: Mapping[str, Any], *, path: Path, number: int) -> MinedPrompt:
    problem = next(_problems(row), None)
    if problem:
        raise DataError(f"Expected line {number} of `{path}` to be a mined prompt with {problem}.")
    prompt = Prompt(str(row["id"]), str(row["prompt"]), row["kind"], str(row.get("category", "")))
    targets = tuple(MinedReply(int(n), str(reply), bool(finished)) for n, reply, finished in row["targets"])
    return MinedPrompt(prompt, Hardness(*row["counts"]), targets)


def _problems(row: Mapping[str, Any]) -> Iterator[str]:
    for name in ("id", "prompt"):
        if not isinstance(row.get(name), str) or not row[name]:
            yield f"a text in `{name}`, but got {row.get(name)!r}"
    if row.get("kind") not in ("harmful", "benign"):
        yield f"`kind` harmful or benign, but got {row.get('kind')!r}"
    counts = row.get("counts")
    if not _are_counts(counts):
        yield f"`counts` of harmful, safe and all rollouts, but got {counts!r}"
    targets = row.get("targets")
    if not isinstance(targets, list) or not all(isinstance(one, list) and len(one) == 3 for one in targets):
        yield f"`targets` of number, reply and whether it is whole, but got {str(targets)[:60]}"


def _are_counts(counts: Any) -> bool:
    if not isinstance(counts, list) or len(counts) != 3 or not all(type(count) is int for count in counts):
        return False
    harmful, safe, total = counts
    return min(counts) >= 0 and total >= max(1, harmful + safe)
