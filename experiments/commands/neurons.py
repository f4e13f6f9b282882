"""``seawall neurons``: which neurons of a model tell harm, layer by layer, as a table and a picture."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments.commands.output import clean_stdout, print_json
from framework.errors import ConfigError

__all__ = ["SUMMARY", "add_arguments", "command"]

SUMMARY = "show which neurons of a model tell harm, layer by layer"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("model", metavar="MODEL|PATCH", help="a model to probe, a folder or a name; or a patch file")
    parser.add_argument(
        "settings", nargs="*", metavar="key=value", help="settings of the method nest, e.g. threshold=2.5 count=200"
    )
    parser.add_argument("--picture", metavar="FILE.svg", help="draw neurons, cluster sizes and probe accuracy by layer")
    parser.add_argument("--system", metavar="TEXT", help="system message before the prompts (default: the template's)")
    parser.add_argument("--dtype", default="auto", help="number format of the model (default: auto)")


def command(arguments: argparse.Namespace) -> int:
    """Probe a model or read a patch, and show the selected neurons; returns the exit code.

    Args:
        arguments: ``model``, ``settings``, ``picture``, ``system``, ``dtype`` and ``json``.

    Raises:
        ConfigError: the picture is no SVG file, settings are wrong, or come with a patch, which has its neurons.
    """
    from experiments.neuron_picture import neuron_svg, neuron_table, selection_summary
    from framework.files import write_atomic

    picture = Path(arguments.picture) if arguments.picture else None
    if picture is not None and picture.suffix.lower() != ".svg":
        raise ConfigError(f"Expected `--picture` to be a file ending in .svg, but got {str(picture)!r}.")
    with clean_stdout(True):
        selection = _selection(arguments)
    if picture is not None:
        write_atomic(picture, neuron_svg(selection))
    if arguments.json:
        print_json(selection_summary(selection))
    else:
        Console().print(neuron_table(selection))
    return 0


def _selection(arguments: argparse.Namespace) -> Any:
    from framework.config import parse_overrides
    from framework.registry import create_method
    from methods.nest.patch import read_patch

    if arguments.model.endswith(".safetensors"):
        if arguments.settings:
            raise ConfigError(
                f"Expected no settings with a patch, whose neurons are chosen, but got {arguments.settings}. Name a "
                "model to probe."
            )
        found = read_patch(Path(arguments.model)).found()
        if found is None:
            raise ConfigError(
                f"Expected `{arguments.model}` to say how its neurons were found, but it does not. Name a model."
            )
        return found
    settings = {override.key: override.value for override in parse_overrides(arguments.settings)}
    return probe_model(arguments.model, create_method("nest", settings).config, arguments.system, arguments.dtype)


def probe_model(name: str, config: Any, system: str | None, dtype: Any) -> Any:
    """Return the selection of a model.

    Args:
        name: of the model.
        config: settings of NeST.
        system: message before the prompts.
        dtype: number format.
    """
    from datamodules.catalog import find_examples
    from framework.chat import ChatEncoder
    from framework.models import ModelSpec, load_model
    from framework.reference import on_fast_device
    from methods.nest.probe import build_prompts
    from methods.nest.selection import find_neurons

    loaded = load_model(ModelSpec(name, dtype))
    encoder = ChatEncoder(loaded.tokenizer, system=system)
    harmful, ordinary = (
        [
            encoder.encode_prompt(row.messages)
            for one in names
            for row in find_examples(kind, one, seed=0)  # type: ignore[arg-type]
        ]
        for kind, names in (("safety", config.safety), ("benign", config.benign))
    )
    prompts = build_prompts(harmful, ordinary, config)
    pad_id: Any = loaded.tokenizer.pad_token_id
    with on_fast_device(loaded.model):
        return find_neurons(loaded.model, prompts, config, pad_id=pad_id)
