"""A patch: the shared vectors of some rows in one small file, bound to the model they were trained on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from framework.errors import ModelError
from framework.files import write_atomic
from framework.weight_files import WeightFiles
from methods.nest.selection import Selection, selection_from

__all__ = ["Patch", "PatchRows", "build_patch", "read_patch", "rows_digest", "take_rows", "write_patch"]

FORMAT = 1
"""Raise it when a patch changes its meaning."""
KIND = "seawall patch"


class PatchRows(NamedTuple):
    """The rows of one projection, or of one half of a fused one."""

    module: str
    """Name of the projection in the weight files, where its weight is ``<module>.weight``."""
    is_transposed: bool
    """Whether the weight is ``(in, out)`` and the rows are its columns."""
    rows: torch.Tensor
    """int64 ``(rows,)``, ascending"""
    clusters: torch.Tensor
    """int64 ``(rows,)``, place of the row's vector in its group"""
    group: str
    digest: str
    """sha256 of the rows of the base, in its number format"""
    originals: torch.Tensor | None = None
    """``(rows, in)`` of the base, in its number format"""


@dataclass(frozen=True)
class Patch:
    """Vectors to be added to rows of one model."""

    name: str
    base: str
    """Fingerprint of the model it belongs on."""
    parts: Mapping[str, PatchRows]
    """By ``<module>:<kind>``."""
    vectors: Mapping[str, torch.Tensor]
    """float32 ``(clusters, in)`` by group."""
    selection: Mapping[str, Any] = field(default_factory=dict)
    """How the rows were found, for people to read."""

    @property
    def identity(self) -> str:
        """Depends on what the patch does, and not on its name or on what is stored beside it."""
        digest = hashlib.sha256(self.base.encode())
        for key, part in sorted(self.parts.items()):
            digest.update(f"{key} {part.module} {part.group} {part.is_transposed} {part.digest}".encode())
            digest.update(_bytes(part.rows) + _bytes(part.clusters))
        for group, vectors in sorted(self.vectors.items()):
            digest.update(group.encode() + _bytes(vectors))
        return digest.hexdigest()

    @property
    def num_rows(self) -> int:
        """Rows it changes."""
        return sum(part.rows.numel() for part in self.parts.values())

    @property
    def num_parameters(self) -> int:
        """Numbers in its vectors."""
        return sum(vectors.numel() for vectors in self.vectors.values())

    @property
    def has_originals(self) -> bool:
        """Whether it can be taken off without its base."""
        return all(part.originals is not None for part in self.parts.values())

    def updates(self, key: str) -> torch.Tensor:
        """Return what is added to each row of a part, float32 ``(rows, in)``."""
        part = self.parts[key]
        return self.vectors[part.group][part.clusters]

    def with_originals(self, originals: Mapping[str, torch.Tensor]) -> Patch:
        """Return the patch with the rows of the base stored in it."""
        parts = {key: part._replace(originals=originals[key]) for key, part in self.parts.items()}
        return replace(self, parts=parts)

    def found(self) -> Selection | None:
        """Return how the rows were found, None when the file does not say."""
        return selection_from(self.selection) if self.selection else None


def build_patch(
    name: str,
    selection: Mapping[str, Any],
    vectors: Mapping[str, torch.Tensor],
    *,
    base: str,
    files: WeightFiles,
    transposed: frozenset[str] = frozenset(),
    has_originals: bool = False,
) -> Patch:
    """Return the patch of trained vectors.

    Args:
        name: what people call it.
        selection: as plain values.
        vectors: ``(clusters, in)`` by group.
        base: fingerprint of the model.
        files: of the model.
        transposed: modules whose weight is ``(in, out)``.
        has_originals: whether the rows of the base are stored in it.
    """
    parts = {}
    for one in selection_from(selection).neurons:
        if not one.rows:
            continue
        rows, module = torch.tensor(one.rows), one.site.module
        stored = files.read(f"{module}.weight")
        original = files.stored_name(f"{module}.weight").removesuffix(".weight")
        originals = take_rows(stored.tensor.to(stored.dtype), rows, is_transposed=module in transposed)
        parts[one.site.key] = PatchRows(
            original,
            module in transposed,
            rows,
            torch.tensor(one.clusters),
            one.group,
            rows_digest(originals),
            originals if has_originals else None,
        )
    kept = {group: value.detach().float().cpu().contiguous() for group, value in vectors.items()}
    return Patch(name, base, parts, kept, selection)


def take_rows(weight: torch.Tensor, rows: torch.Tensor, *, is_transposed: bool) -> torch.Tensor:
    """Return rows of a weight, ``(rows, in)``; its columns when transposed."""
    return (weight[:, rows].T if is_transposed else weight[rows]).contiguous()


def rows_digest(rows: torch.Tensor) -> str:
    """Return the sha256 of rows, number format included."""
    return hashlib.sha256(str(rows.dtype).encode() + _bytes(rows)).hexdigest()


def write_patch(patch: Patch, path: Path) -> None:
    """Write a patch as one safetensors file with its manifest inside; atomic.

    Raises:
        StorageError: the folder cannot be written or the disk is full.
    """
    tensors = {f"vectors/{group}": vectors.contiguous() for group, vectors in patch.vectors.items()}
    for key, part in patch.parts.items():
        tensors[f"rows/{key}"] = part.rows.to(torch.int32)
        tensors[f"clusters/{key}"] = part.clusters.to(torch.int32)
        if part.originals is not None:
            tensors[f"originals/{key}"] = part.originals.contiguous()
    manifest = {
        "kind": KIND,
        "format": FORMAT,
        "name": patch.name,
        "base": patch.base,
        "identity": patch.identity,
        "parts": {
            key: {"module": p.module, "is_transposed": p.is_transposed, "group": p.group, "digest": p.digest}
            for key, p in sorted(patch.parts.items())
        },
        "selection": patch.selection,
    }
    text = json.dumps(manifest, sort_keys=True)
    write_atomic(path, save(tensors, metadata={"manifest": text, "checksum": _checksum(text, tensors)}))


def read_patch(path: Path) -> Patch:
    """Return the patch in a file.

    Raises:
        ModelError: there is no such file, it is no patch, of another format, or not what was once written.
    """
    if not path.is_file():
        raise ModelError(f"Expected `{path}` to be a patch file, but got no such file. Check the path.")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
        manifest = json.loads(metadata.get("manifest", "{}"))
    except (SafetensorError, ValueError) as error:
        raise ModelError(
            f"Expected `{path}` to be a patch file, but it cannot be read: {error}. Copy it again."
        ) from error
    if manifest.get("kind") != KIND:
        raise ModelError(f"Expected `{path}` to be a patch file, but got other tensors. Name a file that NeST wrote.")
    if manifest.get("format") != FORMAT:
        raise ModelError(
            f"Expected `{path}` to be a patch of format {FORMAT}, but got {manifest.get('format')!r}. Train it again."
        )
    if metadata.get("checksum") != _checksum(metadata["manifest"], tensors):
        raise ModelError(
            f"Expected `{path}` to be as it was written, but its checksum differs: the file was changed. Copy it again."
        )
    parts = {key: _part(key, one, tensors) for key, one in manifest["parts"].items()}
    vectors = {name.partition("/")[2]: value for name, value in tensors.items() if name.startswith("vectors/")}
    return Patch(manifest["name"], manifest["base"], parts, vectors, manifest["selection"])


# ---- private -----------------------------------------------------------------------------------------------------


def _part(key: str, one: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> PatchRows:
    rows, clusters = tensors[f"rows/{key}"].long(), tensors[f"clusters/{key}"].long()
    return PatchRows(
        one["module"],
        one["is_transposed"],
        rows,
        clusters,
        one["group"],
        one["digest"],
        tensors.get(f"originals/{key}"),
    )


def _checksum(manifest: str, tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(manifest.encode())
    for piece in _pieces(tensors):
        digest.update(piece)
    return digest.hexdigest()


def _pieces(tensors: Mapping[str, torch.Tensor]) -> Iterator[bytes]:
    for name, tensor in sorted(tensors.items()):
        yield f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
        yield _bytes(tensor)


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
