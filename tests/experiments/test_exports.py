from __future__ import annotations

import csv
from pathlib import Path

from pyarrow import parquet

from experiments.benchmarks.simulated_runs import SimulatedVariant, simulate_run
from experiments.exports import TIDY_COLUMNS, csv_table, tidy_rows, write_exports
from experiments.report.collecting import collect_runs
from experiments.report.entries import find_entries
from experiments.report.replies import replies_of

VARIANT = SimulatedVariant("AsFT", 0.2, 0.1, 0.9, 5.0, {"asft": {"weight": 1.0}})
COUNTS = {"harmful": 10, "benign": 8, "task": 6}


def test_every_number_is_exported_with_what_it_belongs_to(tmp_path: Path) -> None:
    run = simulate_run(tmp_path / "run", VARIANT, seed=3, counts=COUNTS)
    entries = find_entries(collect_runs([run]).runs)
    replies = replies_of(entries)
    rows = list(csv.DictReader(csv_table(entries).splitlines()))
    assert [(row["point"], row["is_final"], row["seed"]) for row in rows] == [
        ("align", "False", "3"),
        ("finetune", "True", "3"),
    ]
    final = entries[-1].metrics["attack_success"]
    assert float(rows[1]["attack_success"]) == final["value"]
    assert float(rows[1]["attack_success/high"]) == final["high"]

    tidy = list(tidy_rows(entries, replies))
    assert all(set(row) <= set(TIDY_COLUMNS) for row in tidy)
    harmful = [
        row for row in tidy if row["kind"] == "category" and row["name"].startswith("harmful/") and row["is_final"]
    ]
    assert sum(row["denominator"] for row in harmful) == 10
    assert sum(row["numerator"] for row in harmful) == final["numerator"]
    # Curves belong to the run and stand once, beside its last model.
    assert {row["title"] for row in tidy if row["kind"] == "curve"} == {entries[-1].title}

    csv_path, parquet_path = write_exports(entries, replies, tmp_path)
    assert csv_path.read_text(encoding="utf-8") == csv_table(entries)
    table = parquet.read_table(parquet_path)
    assert table.num_rows == len(tidy)
    assert table.schema.names == list(TIDY_COLUMNS)
    assert [row["value"] for row in table.to_pylist()] == [row["value"] for row in tidy]
