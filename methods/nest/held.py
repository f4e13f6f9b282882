"""Rows that stay where they are while everything around them is trained or edited."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from framework.parameters import clean_name, lora_pairs
from framework.weight_edits import digits_of
from framework.weight_files import WeightFiles
from methods.nest.patch import take_rows
from methods.nest.selection import Selection
from methods.nest.sites import find_projections

__all__ = ["HeldRows", "find_held", "put_back"]


class HeldRows(NamedTuple):
    """Rows of one tensor and their values."""

    name: str
    """Plain name of the tensor; of a LoRA matrix that of its module, which no file has."""
    parameter: nn.Parameter
    rows: torch.Tensor
    """int64 ``(rows,)``"""
    is_transposed: bool
    """Whether the rows are columns."""
    values: torch.Tensor
    """``(rows, in)``, of a bias ``(rows,)``"""
    is_trained: bool
    """Whether training moves them, so that they are put back after every step."""


def find_held(model: nn.Module, selection: Selection, targets: Sequence[str] = ()) -> list[HeldRows]:
    """Return the selected rows of every tensor they lie in, as they are now.

    Args:
        model: plain or with adapters.
        selection: of neurons.
        targets: as in ``find_projections``.
    """
    pairs = lora_pairs(model)
    plain = {clean_name(name): p for name, p in model.named_parameters()}
    projections = find_projections(model, targets)
    held = []
    for one in selection.neurons:
        if not one.rows:
            continue
        rows, module = torch.tensor(one.rows, dtype=torch.long), one.site.module
        # The update of row i is row i of B times A: holding B's row holds the weight's.
        places = [(module, pairs[module].B, False)] if module in pairs else []
        places.append((f"{module}.weight", plain[f"{module}.weight"], projections[module].is_transposed))
        if f"{module}.bias" in plain:
            places.append((f"{module}.bias", plain[f"{module}.bias"], False))
        for name, parameter, is_transposed in places:
            values = take_rows(parameter.detach(), rows, is_transposed=is_transposed)
            held.append(HeldRows(name, parameter, rows, is_transposed, values, parameter.requires_grad))
    return held


@torch.no_grad()
def put_back(held: Sequence[HeldRows], files: WeightFiles | None = None) -> None:
    """Give rows the values they had.

    Args:
        held: rows and values.
        files: of the model they were taken from: values that are no more than a file's numbers rounded get its digits.
    """
    for one in held:
        values = one.values
        if files is not None and one.name in files:
            stored = take_rows(files.read(one.name).tensor, one.rows, is_transposed=one.is_transposed)
            values = digits_of(values.float(), stored.to(values.device))
        if one.is_transposed:
            one.parameter[:, one.rows] = values.T.to(one.parameter)
        else:
            one.parameter[one.rows] = values.to(one.parameter)
