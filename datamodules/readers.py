"""Reading data files: which one a name means, and its records as dictionaries."""

from __future__ import annotations

import csv
import gzip
import importlib
import importlib.util
import io
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from framework.errors import DataError

__all__ = [
    "SUFFIXES",
    "data_root",
    "find_file",
    "is_spelt_as_path",
    "load_hub",
    "read_json_value",
    "read_records",
    "set_name",
]

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".txt")
"""Kinds of file that can be read; each also with ``.gz`` behind it."""

Record = dict[str, Any]


def data_root() -> Path | None:
    """Return the folder of data sets that ``SEAWALL_DATA`` names, or None when it names none."""
    configured = os.environ.get("SEAWALL_DATA")
    return Path(configured).expanduser() if configured else None


def find_file(name_or_path: str | Path, *, dataset: str = "") -> Path:
    """Return the file or folder that a name stands for.

    Looked at in turn: the path itself, ``$SEAWALL_DATA/<dataset>/<name>``, ``$SEAWALL_DATA/<name>``.

    Args:
        name_or_path: a path, or a name below ``SEAWALL_DATA``.
        dataset: folder of the data set below ``SEAWALL_DATA``.

    Raises:
        DataError: it is in none of these places; the message lists them.
    """
    path = Path(name_or_path).expanduser()
    root = data_root()
    places = [path]
    if root is not None and not path.is_absolute():
        places += [root / dataset / path, root / path] if dataset else [root / path]
    for place in places:
        if place.exists():
            return place
    looked = ", ".join(str(place) for place in places)
    remedy = (
        "Check the path."
        if root
        else "Check the path, or set the variable SEAWALL_DATA to the folder that holds the data sets."
    )
    raise DataError(f"Expected `{name_or_path}` to be a file, but found nothing at: {looked}. {remedy}")


def read_records(path: str | Path, *, columns: Sequence[str] | None = None) -> list[Record]:
    """Return the records of a data file, in order.

    JSON Lines: one object a line, blank lines skipped. JSON: a list of objects or of strings (these become
    ``{"text": ...}``), or an object with one list in it. CSV and TSV: the first line names the columns; a first line
    that starts with ``# `` is a comment. Text: one ``{"text": ...}`` a line. Each also compressed with gzip.

    Args:
        path: the file.
        columns: names of the columns of a CSV or TSV file that has no header.

    Raises:
        DataError: the file is missing, empty, of an unknown kind or malformed; names the file and the line.
    """
    path = Path(path)
    suffix = _suffix(path)
    text = _read_text(path)
    if suffix == ".jsonl":
        records = list(_json_lines(text, path))
    elif suffix == ".json":
        records = _json_records(text, path)
    elif suffix == ".txt":
        records = [{"text": line.strip()} for line in text.split("\n") if line.strip()]
    else:
        records = list(_table(text, path, columns=columns, is_tsv=suffix == ".tsv"))
    if not records:
        raise DataError(f"Expected `{path}` to hold records, but got an empty file.")
    return records


def is_spelt_as_path(text: str) -> bool:
    """Return whether a text in the settings means a file, and not a name, by its spelling alone.

    Example:
        >>> is_spelt_as_path("own.jsonl"), is_spelt_as_path("embedded")
        (True, False)
    """
    return "/" in text or any(suffix in text.lower() for suffix in SUFFIXES)


def set_name(path: Path) -> str:
    """Return the file's name without the endings that tell its kind.

    Example:
        >>> set_name(Path("data/alpaca_2.5k.json.gz"))
        'alpaca_2.5k'
    """
    bare = path.name.removesuffix(".gz")
    return bare.removesuffix(Path(bare).suffix)


def _suffix(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    if not suffixes or suffixes[-1] not in SUFFIXES:
        raise DataError(
            f"Expected `{path}` to end in one of {', '.join(SUFFIXES)} (or one of these and .gz), "
            f"but got {path.name!r}."
        )
    return suffixes[-1]


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise DataError(f"Expected `{path}` to be a file, but found {'a folder' if path.is_dir() else 'nothing'}.")
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix.lower() == ".gz" else path.read_bytes()
        return data.decode("utf-8-sig")
    except (OSError, EOFError) as error:
        raise DataError(f"Expected `{path}` to be readable, but got: {error}.") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(
            f"Expected `{path}` to be UTF-8 text, but line {line} is not. Save the file as UTF-8."
        ) from error


def _json_lines(text: str, path: Path) -> Iterator[Record]:
    # Not splitlines(): U+2028 may stand inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"Expected line {number} of `{path}` to be a JSON object, but got {line[:60]!r} ({error.msg})."
            ) from error
        if not isinstance(record, dict):
            raise DataError(f"Expected line {number} of `{path}` to be a JSON object, but got {line[:60]!r}.")
        yield record


def read_json_value(path: Path) -> Any:
    """Return the content of a JSON file, compressed or not.

    Raises:
        DataError: it is missing or malformed; names the line.
    """
    return _parse_json(_read_text(path), path)


def _parse_json(text: str, path: Path) -> Any:
    if not text.strip():
        raise DataError(f"Expected `{path}` to hold records, but got an empty file.")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"Expected `{path}` to be JSON, but got {error.msg} in line {error.lineno}.") from error


def _json_records(text: str, path: Path) -> list[Record]:
    value = _parse_json(text, path)
    if isinstance(value, Mapping):
        lists = [item for item in value.values() if isinstance(item, list)]
        filled = [item for item in lists if item] or lists
        if len(filled) != 1:
            raise DataError(
                f"Expected `{path}` to be a JSON list, or an object with one list in it, "
                f"but got an object with {len(filled)} lists."
            )
        value = filled[0]
    if not isinstance(value, list):
        raise DataError(f"Expected `{path}` to be a JSON list of objects, but got {type(value).__name__}.")
    records = []
    for number, item in enumerate(value, start=1):
        record = {"text": item} if isinstance(item, str) else item
        if not isinstance(record, dict):
            raise DataError(f"Expected record {number} of `{path}` to be an object, but got {str(item)[:60]!r}.")
        records.append(record)
    return records


def _table(text: str, path: Path, *, columns: Sequence[str] | None, is_tsv: bool) -> Iterator[Record]:
    csv.field_size_limit(sys.maxsize)
    skipped = 0
    if text.startswith("# "):
        text = text.partition("\n")[2]
        skipped = 1
    lines = io.StringIO(text, newline="")
    # Tab-separated sets hold bare quotation marks, which are text there and not quoting.
    reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE) if is_tsv else csv.reader(lines, strict=True)
    try:
        header = list(columns) if columns is not None else next(reader, [])
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                raise DataError(
                    f"Expected line {reader.line_num + skipped} of `{path}` to have {len(header)} columns "
                    f"({', '.join(header)}), but got {len(cells)}."
                )
            yield dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise DataError(
            f"Expected line {reader.line_num + skipped} of `{path}` to be a row of a table, but got: {error}."
        ) from error


def load_hub(dataset_id: str, split: str, *, config: str | None = None) -> list[Record]:
    """Return a split of a data set of the Hugging Face hub (needs the optional package ``datasets``).

    Args:
        dataset_id: ``owner/name``.
        split: ``train``, ``test``, ``validation``.
        config: configuration of a data set that has several.

    Raises:
        DataError: offline, the package is missing, the download failed or the split is empty.
    """
    remedy = "Give a local file or folder, or set SEAWALL_DATA to the folder that holds the data sets"
    for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        if os.environ.get(variable, "").upper() in ("1", "ON", "YES", "TRUE"):
            raise DataError(
                f"Expected data set `{dataset_id}` to be reachable, but {variable} is set. {remedy}, or unset it."
            )
    if importlib.util.find_spec("datasets") is None:
        raise DataError(
            f"Expected the package `datasets` to fetch `{dataset_id}` from the hub, but it is not installed. "
            f"{remedy}, or run `pip install datasets`."
        )
    datasets = importlib.import_module("datasets")
    try:
        rows = [dict(row) for row in datasets.load_dataset(dataset_id, config, split=split)]
    # Whatever a third-party loader raises means the same to the user: the set could not be had.
    except Exception as error:
        raise DataError(
            f"Expected data set `{dataset_id}` (split {split}) to be loadable from the hub, but got: {error}. {remedy}."
        ) from error
    if not rows:
        raise DataError(f"Expected split {split!r} of data set `{dataset_id}` to have rows, but got none.")
    return rows
