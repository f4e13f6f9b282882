"""Writes a report: the page, its pictures, and the numbers as files."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from experiments.report.collecting import Collection, collect_runs
from experiments.report.page import build_report
from experiments.report.transcripts import Replies
from framework.errors import ConfigError
from framework.files import write_atomic

__all__ = ["REPORT_FILE", "ReportFiles", "write_report"]

REPORT_FILE = "report.html"
FIGURES = "figures"


class ReportFiles(NamedTuple):
    """What was written."""

    page: Path
    figures: tuple[Path, ...]
    csv: Path
    parquet: Path


def write_report(
    paths: Sequence[Path] | Collection,
    *,
    output: Path | None = None,
    reference: str | None = None,
    show: Replies = "redacted",
    title: str | None = None,
) -> ReportFiles:
    """Write ``report.html``, ``figures/*.png``, ``metrics.csv`` and ``results.parquet``.

    Args:
        paths: what ``collect_runs`` takes, or the runs it returned.
        output: the page; None writes into the only folder given, else into the present one.
        reference: label the others are compared with.
        show: which replies are in the page: ``redacted`` leaves out those to harmful requests, and the requests.
        title: of the page; None takes the study's or run's name.

    Returns:
        The files.

    Raises:
        ConfigError: ``output`` is no .html file, or no run has the label ``reference``.
        DataError: as ``collect_runs`` and ``build_report``.
        StorageError: the folder cannot be written.
    """
    from experiments.exports import write_exports  # it takes entries from this package

    page = output or _default_page(paths)
    if page.suffix.lower() != ".html":
        raise ConfigError(f"Expected `output` to be a file ending in .html, but got {str(page)!r}.")
    with _without_collector():
        collection = paths if isinstance(paths, Collection) else collect_runs(paths, name=title)
    labels = sorted({run.label for run in collection.runs})
    if reference is not None and reference not in labels:
        raise ConfigError(
            f"Expected `reference` to be a label of the runs ({', '.join(labels)}), but got {reference!r}."
        )
    with _without_collector():
        report = build_report(collection, reference=reference, show=show)
    figures = tuple(page.parent / FIGURES / f"{picture.name}.png" for picture in report.pictures)
    for path, picture in zip(figures, report.pictures, strict=True):
        write_atomic(path, picture.png)
    csv, parquet = write_exports(report.entries, report.replies, page.parent)
    write_atomic(page, report.html)  # last: a page stands for a complete report
    return ReportFiles(page, figures, csv, parquet)


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """Pause the garbage collector: it looks for cycles among some hundred thousand records, and there are none."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _default_page(paths: Sequence[Path] | Collection) -> Path:
    is_folder = not isinstance(paths, Collection) and len(paths) == 1 and paths[0].is_dir()
    return (paths[0] if is_folder and not isinstance(paths, Collection) else Path()) / REPORT_FILE
