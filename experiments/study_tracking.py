"""A study in Weights & Biases: one run of its own in the study's group, with the trade-off as table and scatter.

Its artefacts hold the results of every run and all replies. The runs' numbers stand in the summaries of their own W&B
runs (see ``tracking``) and, side by side, in a second table here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import wandb

from experiments.measured_runs import RunSamples
from experiments.tracking import TrackingLogger, artifact_name, close_logger, kept_run_id, open_logger
from framework.files import to_plain
from framework.schema import TrackingConfig

__all__ = ["SCATTERS", "runs_table", "study_summary", "track_study", "tradeoff_table"]

STAGE = "study"
RATES = ("attack_success", "harmful_rate", "over_refusal", "task_accuracy", "refusal_rate")
COSTS = ("prepare_seconds", "train_seconds", "evaluate_seconds", "peak_memory_mib")
SCATTERS: Mapping[str, tuple[str, str]] = {
    "tradeoff/utility": ("attack_success", "task_accuracy"),
    "tradeoff/over_refusal": ("attack_success", "over_refusal"),
    "tradeoff/cost": ("attack_success", "train_seconds"),
}
"""Key of a chart to its horizontal and vertical column."""

Rows = list[dict[str, Any]]
Groups = Sequence[Mapping[str, Any]]
"""What ``compare_runs`` returns."""


def track_study(
    name: str, comparison: Groups, runs: Sequence[RunSamples], *, folder: Path, tracking: TrackingConfig
) -> bool:
    """Write a study to W&B and return whether it did; one that is there already, unchanged, is left alone.

    Args:
        name: of the study; the group of its W&B runs too unless the settings say another.
        comparison: as ``compare_runs`` returns it.
        runs: finished ones, with their folders.
        folder: of the study; W&B writes to ``wandb/`` inside.
        tracking: whether and where to.

    Raises:
        ConfigError: tracking is online and W&B cannot be reached or has no account.
        StorageError: the folder cannot be written.
    """
    if tracking.wandb == "off":
        return False
    key = {"comparison": to_plain(comparison), "runs": sorted(run.name for run in runs)}
    run_id = kept_run_id(folder, STAGE, key)
    if tracking.wandb == "offline" and any((folder / "wandb").glob(f"offline-run-*-{run_id}")):
        return False
    labels = sorted({row["label"] for group in comparison for row in group["methods"]})
    logger = open_logger(
        name, tracking, folder=folder, stage=STAGE, run_id=run_id, settings={"study": name, "variants": labels}
    )
    if not logger:
        return False
    _fill(logger, name, comparison, runs, folder)
    close_logger(logger)
    return True


def _fill(logger: TrackingLogger, name: str, comparison: Groups, runs: Sequence[RunSamples], folder: Path) -> None:
    logger.put_media(lambda: _charts(tradeoff_table(comparison), runs_table(runs)))
    logger.put_summary(study_summary(comparison, num_runs=len(runs)))
    results = {path.name: path for path in sorted(folder.glob("*.json")) if path.name != "owner.json"}
    samples = {f"{run.name}.jsonl": run.folder / "samples.jsonl" for run in runs if run.folder is not None}
    logger.put_files(artifact_name(name, "results"), "results", results)
    logger.put_files(artifact_name(name, "samples"), "samples", samples)


def tradeoff_table(comparison: Groups) -> Rows:
    """Return one row per variant: rates with bounds, costs, and its place in the trade-off."""
    rows = []
    for group in comparison:
        points = {point["name"]: point for point in group["tradeoff"]["points"]}
        for method in group["methods"]:
            point = points.get(method["label"], {})
            row: dict[str, Any] = {
                "variant": method["label"],
                "model": group["model"],
                "task": group["task"],
                "harmful_share": group["share"],
                "seeds": len(method["seeds"]),
                "is_reference": method["is_reference"],
            }
            for rate in RATES:
                if rate in method["metrics"]:
                    row |= _rate_columns(rate, method["metrics"][rate])
            row |= {cost: method["cost"].get(cost) for cost in COSTS if cost in method["cost"]}
            row |= {key: point.get(key) for key in ("is_dominated", "is_knee", "safety_tax")}
            rows.append(row)
    return rows


def runs_table(runs: Sequence[RunSamples]) -> Rows:
    """Return one row per run: what it is and its last model's rates and costs."""
    return [
        {
            "run": run.name,
            "variant": run.label,
            "model": run.model,
            "task": run.task,
            "harmful_share": run.share,
            "seed": run.seed,
            **{rate: run.row["metrics"][rate]["value"] for rate in RATES if rate in run.row["metrics"]},
            **{cost: (run.row.get("cost") or {}).get(cost) for cost in COSTS},
        }
        for run in runs
    ]


def study_summary(comparison: Groups, *, num_runs: int) -> dict[str, Any]:
    """Return the study's numbers: how many runs, and per group the hypervolume and the winners.

    Args:
        comparison: as ``compare_runs`` returns it.
        num_runs: finished ones.
    """
    found: dict[str, Any] = {"study/runs": num_runs}
    for group in comparison:
        prefix = f"study/{'/'.join(_axes(group))}/" if len(comparison) > 1 else "study/"
        found[f"{prefix}hypervolume"] = group["tradeoff"]["hypervolume"]
        for method in group["methods"]:
            for rate, metric in method["metrics"].items():
                if metric.get("is_winner"):
                    found[f"{prefix}winner/{rate}"] = method["label"]
    return found


def _axes(group: Mapping[str, Any]) -> list[str]:
    return [str(group["model"]).rsplit("/", 1)[-1], str(group["task"] or "no task"), f"p{group['share']:g}"]


def _rate_columns(rate: str, metric: Mapping[str, Any]) -> dict[str, Any]:
    bounds = ("seed_low", "seed_high") if metric.get("seed_low") is not None else ("low", "high")
    return {
        rate: metric["value"],
        f"{rate}_low": metric.get(bounds[0]),
        f"{rate}_high": metric.get(bounds[1]),
        f"{rate}_wins": bool(metric.get("is_winner")),
    }


def _charts(tradeoff: Rows, runs: Rows) -> dict[str, Any]:
    """Return tables and scatter plots by the key they are logged under."""
    table = _table(tradeoff)
    charts = {
        key: wandb.plot.scatter(table, x, y, title=f"{y.replace('_', ' ')} against {x.replace('_', ' ')}")
        for key, (x, y) in SCATTERS.items()
        if {x, y} <= set(table.columns)
    }
    return {"tradeoff/table": table, **charts, "study/runs_table": _table(runs)}


def _table(rows: Rows) -> wandb.Table:
    columns: list[str | int] = list(dict.fromkeys(name for row in rows for name in row))
    return wandb.Table(columns=columns, data=[[row.get(str(name)) for name in columns] for row in rows])
