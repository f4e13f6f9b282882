"""As many processes as the config asks for: started here on one machine, taken as they come from torchrun or SLURM."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence

import torch

from experiments.local_processes import run_processes, watch_parent
from framework.config import RunConfig, TrainerConfig
from framework.errors import ConfigError
from framework.models import choose_device
from framework.processes import is_main, join_group, launched, world_size
from framework.registry import create_method

__all__ = ["check_connected", "check_methods", "join_or_start", "strategy_of"]

KINDS = {
    "ddp_find_unused_parameters_true": "ddp",
    "model_parallel": "fsdp2",
    "deepspeed_stage_2": "deepspeed",
    "deepspeed_stage_3": "deepspeed",
}
"""What methods call a strategy, where the two names differ."""


def join_or_start(trainer: TrainerConfig, arguments: Sequence[str]) -> int | None:
    """Connect this process with the others of its command, or start them.

    Args:
        trainer: how many processes on which devices.
        arguments: of the command line, repeated by every process that is started.

    Returns:
        None when this process is to do the work; otherwise the exit code of the processes that did it.

    Raises:
        ConfigError: the machine lacks the devices, or another number of processes was started than configured.
    """
    wanted, process = trainer.devices * trainer.num_nodes, launched()
    check_devices(trainer)
    if process is None and wanted == 1:
        return None
    if process is None:
        if trainer.num_nodes > 1:
            raise ConfigError(
                f"Expected a launcher such as torchrun or srun for `trainer.num_nodes` {trainer.num_nodes}, but got "
                "none. `experiments/cluster` holds scripts for both."
            )
        return run_processes([sys.executable, "-m", "experiments.cli", *arguments], trainer.devices)
    if process.world_size != wanted:
        raise ConfigError(
            f"Expected `trainer.devices` times `trainer.num_nodes` to be {process.world_size}, as many processes as "
            f"were started, but got {wanted}."
        )
    watch_parent()
    uses_cuda = choose_device(trainer.accelerator) == "cuda"
    join_group(process, uses_cuda=uses_cuda)
    if not is_main():
        warnings.simplefilter("ignore")  # the first process says it
        logging.getLogger().setLevel(logging.ERROR)
    return None


def check_devices(trainer: TrainerConfig) -> None:
    """Refuse more devices than there are, and a strategy they cannot run.

    Raises:
        ConfigError: says how many there are.
    """
    kind = choose_device(trainer.accelerator)
    present = {"cuda": torch.cuda.device_count(), "mps": 1}.get(kind)
    if present is not None and trainer.devices > present:
        raise ConfigError(
            f"Expected `trainer.devices` to be at most {present}, the number of {kind} devices here, but got "
            f"{trainer.devices}. Use fewer, or set trainer.accelerator=cpu."
        )
    if trainer.accelerator in ("gpu", "cuda") and kind == "cpu":
        raise ConfigError(
            f"Expected a GPU for `trainer.accelerator` {trainer.accelerator!r}, but got a machine without one. Set "
            "trainer.accelerator=auto."
        )
    if kind != "cuda" and strategy_of(trainer) in ("fsdp", "deepspeed"):
        raise ConfigError(
            f"Expected CUDA devices for `trainer.strategy` {trainer.strategy!r}, but got {kind}. Choose ddp or "
            "model_parallel."
        )


def check_connected(trainer: TrainerConfig) -> None:
    """Refuse to work with another number of processes than configured.

    Raises:
        ConfigError: says how many there are.
    """
    wanted = trainer.devices * trainer.num_nodes
    if wanted != world_size():
        raise ConfigError(
            f"Expected `trainer.devices` times `trainer.num_nodes` to be the number of connected processes, but got "
            f"{wanted} for {world_size()}. The command `seawall` starts them; from Python, call "
            "`framework.processes.join_group` first."
        )


def check_methods(config: RunConfig) -> None:
    """Refuse what the configured strategy cannot run, before anything is loaded.

    Raises:
        ConfigError: every method that does not support it, and a probe that it leaves no weights to.
    """
    kind = strategy_of(config.trainer)
    problems = []
    if config.trainer.probe_every_n_steps is not None and kind in ("fsdp", "deepspeed"):
        problems.append(
            f"Expected `trainer.probe_every_n_steps` to be null under the strategy `{kind}`, which has whole weights "
            f"only inside a training step, but got {config.trainer.probe_every_n_steps}. Choose ddp or model_parallel."
        )
    if config.trainer.guard is not None and kind not in ("single", "ddp"):
        problems.append(
            f"Expected `trainer.guard` to be null under the strategy `{kind}`, which leaves no process the whole model "
            "between two steps, but got settings. Choose ddp."
        )
    for stage, settings in config.active_stages():
        if not config.training(stage).has_training:
            continue
        for name, options in settings.methods.items():
            supports = create_method(name, options).supports
            if kind not in supports:
                problems.append(
                    f"Expected every method of `stages.{stage}` to support the strategy `{kind}`, but `{name}` "
                    f"supports {', '.join(sorted(supports))}. Choose another `trainer.strategy` or fewer "
                    "`trainer.devices`."
                )
    if problems:
        raise ConfigError(problems)


def strategy_of(trainer: TrainerConfig) -> str:
    """Return what methods call the strategy: single, ddp, fsdp, fsdp2 or deepspeed.

    Example:
        >>> strategy_of(TrainerConfig(devices=2))
        'ddp'
    """
    if trainer.strategy == "auto":
        return "ddp" if trainer.devices * trainer.num_nodes > 1 else "single"
    return KINDS.get(trainer.strategy, trainer.strategy)
