"""Releasing the adapter alone: only where it gives the released model on a base that others can get."""

from __future__ import annotations

import gc
from pathlib import Path

from experiments.release.finished_run import FinishedRun
from framework.errors import ConfigError, ModelError
from framework.files import read_json, write_json
from framework.model_files import model_fingerprint, read_model
from framework.models import ModelSpec, find_model, load_model, merge_adapter

__all__ = ["check_adapter", "name_base"]

TOLERANCE = 1e-4
"""Largest relative difference (Frobenius norm) of a tensor between base with adapter and the run's model."""


def check_adapter(run: FinishedRun) -> str:
    """Check that the adapter on the run's start model is the run's model; return the start model's fingerprint.

    Raises:
        ConfigError: the run has no adapter, it belongs to a model inside the run, or base and adapter together are not
            the model that was measured.
    """
    if not (run.adapter / "adapter_config.json").is_file():
        raise ConfigError(f"Expected run `{run.folder}` to hold an adapter, but got none. Release the model.")
    stages = [name for name, _ in run.config.active_stages()]
    if len(stages) != 1:
        raise ConfigError(
            f"Expected one stage for a release of the adapter alone, but got {', '.join(stages)}: it belongs on the "
            "model that an earlier stage made, which nobody else has. Release the model."
        )
    given = run.config.model
    spec = ModelSpec(given.name, given.dtype, given.revision, given.trust_remote_code)
    worst = _largest_difference(spec, run)
    if worst > TOLERANCE:
        raise ConfigError(
            f"Expected base and adapter to give the measured model, but got a tensor that differs by {worst:.1e} "
            f"(relative; {TOLERANCE:.0e} is allowed): a method changed more than the adapter. Release the model."
        )
    return model_fingerprint(find_model(spec).folder)


def name_base(folder: Path, base: str) -> None:
    """Write the base model's public name into a copied adapter, in place of a folder of this machine."""
    path = folder / "adapter_config.json"
    write_json(path, read_json(path) | {"base_model_name_or_path": base})


def _largest_difference(spec: ModelSpec, run: FinishedRun) -> float:
    import torch
    from peft import PeftModel
    from safetensors import SafetensorError

    try:
        wrapped = PeftModel.from_pretrained(load_model(spec).model, str(run.adapter))
    except (SafetensorError, ValueError, RuntimeError, OSError) as error:
        raise ModelError(f"Expected `{run.adapter}` to hold a complete adapter, but got: {error}.") from error
    ours = merge_adapter(wrapped).state_dict()
    theirs = read_model(run.model, dtype=torch.float32).state_dict()
    if set(ours) != set(theirs):
        return float("inf")
    worst = 0.0
    for name, tensor in theirs.items():
        norm = float(tensor.float().norm()) or 1.0
        worst = max(worst, float((ours[name].float() - tensor.float()).norm()) / norm)
    del ours, theirs, wrapped
    gc.collect()
    return worst
