"""One page on a set of runs: ``report.html``, its pictures as PNG, and the numbers as CSV and parquet."""

from __future__ import annotations

from experiments.report.collecting import Collection, collect_runs
from experiments.report.page import Report, build_report
from experiments.report.writing import ReportFiles, write_report

__all__ = ["Collection", "Report", "ReportFiles", "build_report", "collect_runs", "write_report"]
