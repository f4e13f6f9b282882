"""How long a report on 200 runs takes and how large its page is: ``python -m experiments.benchmarks.report``.

The runs are simulated: 20 variants, 5 seeds, 2 harmful shares, 240 replies of each of two models a run. Times are of
this process from its first import to the last written file, wall clock and CPU. Writes
``experiments/benchmarks/results/report-cpu.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

STARTED = time.perf_counter()
RESULTS = Path(__file__).parent / "results" / "report-cpu.json"
LIMITS = {"seconds": 20.0, "page_bytes": 5_000_000}


def main(argv: Sequence[str] | None = None) -> int:
    """Simulate, report, print and keep the figures; 0 if both limits hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", metavar="FOLDER", help="keep the simulated runs and the report here")
    parser.add_argument("--output", metavar="FILE", default=str(RESULTS))
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        figures = measure(Path(arguments.runs or temporary))
    print(json.dumps(figures, indent=2))
    from framework.files import write_json

    write_json(Path(arguments.output), figures)
    return 0 if all(float(figures[key]) <= limit for key, limit in LIMITS.items()) else 1  # type: ignore[arg-type]


def measure(folder: Path) -> dict[str, object]:
    """Return seconds, bytes and what was reported on.

    Args:
        folder: where the simulated runs and the report go.
    """
    from experiments.report import write_report

    imported = time.perf_counter() - STARTED
    imported_cpu = time.process_time()
    runs = _runs(folder)
    started, started_cpu = time.perf_counter(), time.process_time()
    files = write_report([folder], output=folder / "report.html")
    seconds, cpu = time.perf_counter() - started, time.process_time() - started_cpu
    return {
        "runs": len(runs),
        "seconds": round(seconds + imported, 2),
        "seconds_importing": round(imported, 2),
        "cpu_seconds": round(cpu + imported_cpu, 2),
        "cpu_seconds_importing": round(imported_cpu, 2),
        "page_bytes": files.page.stat().st_size,
        "csv_bytes": files.csv.stat().st_size,
        "parquet_bytes": files.parquet.stat().st_size,
        "pictures": len(files.figures),
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "python": platform.python_version(),
        "limits": LIMITS,
    }


def _runs(folder: Path) -> list[Path]:
    from experiments.benchmarks.simulated_runs import SimulatedVariant, simulate_study

    variants = [SimulatedVariant("Plain LoRA", 0.65, 0.1, 0.94, 8.0)]
    for number in range(1, 20):
        strength = number / 20
        variants.append(
            SimulatedVariant(
                f"Method {number:02d}",
                0.6 - 0.5 * strength + 0.04 * (number % 3),
                0.1 + 0.2 * strength,
                0.94 - 0.15 * strength - 0.02 * (number % 4),
                6.0 + number % 5,
                {f"method_{number:02d}": {"weight": strength}},
            )
        )
    return simulate_study(folder, variants, seeds=range(5), shares=(0.05, 0.1))


if __name__ == "__main__":
    sys.exit(main())
