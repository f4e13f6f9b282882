"""What is released: the folder of a finished run, read and checked as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from experiments.measured_runs import check_results, read_samples
from framework.config import RunConfig, check_run
from framework.errors import DataError
from framework.files import read_json
from framework.model_files import check_model_folder, model_fingerprint

__all__ = ["FinishedRun", "read_finished_run"]


@dataclass(frozen=True)
class FinishedRun:
    """A run that finished and measured its last model."""

    folder: Path
    config: RunConfig
    results: Mapping[str, Any]
    """Content of ``results.json``."""
    row: Mapping[str, Any]
    """Of the last model: label, point, metrics, cost."""
    samples: tuple[Mapping[str, Any], ...]
    """Replies of the last model with their verdicts."""

    @property
    def name(self) -> str:
        """Of the run, without the folders it was put in."""
        return self.config.name.rsplit("/", 1)[-1]

    @property
    def model(self) -> Path:
        """The last model, merged."""
        return self.folder / "model"

    @property
    def is_model_checked(self) -> bool:
        """Whether the model was compared with the measured one; results of earlier versions do not tell."""
        return bool((self.row.get("model") or {}).get("weights"))

    @property
    def adapter(self) -> Path:
        """What the last stage trained; not every run has one."""
        return self.folder / "adapter"


def read_finished_run(folder: Path) -> FinishedRun:
    """Return the run in ``folder``.

    Raises:
        DataError: it is not there, not finished, damaged, did not measure its last model, or holds another one.
        ModelError: its model is missing or incomplete.
    """
    if not folder.is_dir():
        raise DataError(f"Expected `{folder}` to be the folder of a run, but got no such folder. Check the path.")
    path = folder / "results.json"
    if not path.is_file():
        raise DataError(
            f"Expected `{folder}` to be the folder of a finished run, but it has no results.json. Run it to its end."
        )
    try:
        results = read_json(path)
    except ValueError as error:
        raise DataError(f"Expected `{path}` to be JSON, but got: {error}. Run it again.") from error
    check_results(results, path)
    status = results["run"].get("status")
    if status != "finished":
        raise DataError(f"Expected run `{folder}` to be finished, but got status {status!r}. Run it to its end.")
    config, row = _read_config(folder), results["rows"][-1]
    last = [name for name, _ in config.active_stages()][-1:] or ["start"]
    if row["point"] != last[0]:
        raise DataError(
            f"Expected run `{folder}` to have measured its last model, after `{last[0]}`, but got numbers after "
            f"`{row['point']}`. Add `{last[0]}` to `evaluate.after` and run again."
        )
    check_model_folder(folder / "model")
    _check_measured(folder / "model", row)
    samples = read_samples(folder / "samples.jsonl", point=row["point"])
    return FinishedRun(folder, config, results, row, tuple(samples))


def _check_measured(model: Path, row: Mapping[str, Any]) -> None:
    """Refuse a model that is not the measured one; results of earlier versions do not say which it was."""
    wanted = (row.get("model") or {}).get("weights")
    if wanted is None:
        return
    found = model_fingerprint(model)
    if found != wanted:
        raise DataError(
            f"Expected `{model}` to hold the measured model, with fingerprint {wanted}, but got {found}. It was "
            "changed after the run; run again."
        )


def _read_config(folder: Path) -> RunConfig:
    path = folder / "config.yaml"
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DataError(f"Expected `{path}` to be the settings of the run, but got: {error}.") from error
    checked = check_run(values if isinstance(values, dict) else {})
    if checked.config is None:
        raise DataError(f"Expected `{path}` to be the settings of a run, but got: {'; '.join(checked.problems)}")
    return checked.config
