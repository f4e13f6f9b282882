"""Model folders with patches on them: putting patches on, taking them off, and what a folder says it carries."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

from framework.errors import ConfigError, ModelError
from framework.files import read_json, write_json
from framework.model_files import check_model_folder, model_fingerprint
from methods.nest.functional import fold_rows
from methods.nest.patch import Patch, PatchRows, read_patch, rows_digest, take_rows, write_patch
from methods.nest.weight_copies import copy_changed

__all__ = ["Applied", "PatchRecord", "apply_patches", "read_record", "remove_patch"]

RECORD = "patches.json"
FOLDER = "patches"
SUFFIX = ".safetensors"


Needs = Mapping[str, Sequence[str]]


class Applied(NamedTuple):
    """What applying patches did."""

    rows: int
    rounding: float
    """Norm of what the model's number format rounded away, divided by that of the update."""


@dataclass(frozen=True)
class PatchRecord:
    """What a folder says of the patches on it."""

    base: str
    """Fingerprint of the model without them."""
    model: str
    """Fingerprint of the model with them."""
    patches: tuple[dict[str, Any], ...]
    """``name`` and ``identity`` of each, in the order they came, and as ``needs`` the names of the patches that were on
    the model it was trained on: without them its rows would not be as they were."""

    @property
    def needs(self) -> Needs:
        """By name, the patches a patch was trained on top of."""
        return {entry["name"]: tuple(entry["needs"]) for entry in self.patches}


def read_record(folder: Path) -> PatchRecord | None:
    """Return what a model folder says of its patches, None when it carries none.

    Raises:
        ModelError: the folder holds no model, or its weights were changed since the patches were put on.
    """
    check_model_folder(folder)
    if not (folder / RECORD).is_file():
        return None
    content = read_json(folder / RECORD)
    # A record without `needs` was written when patches of one base alone were accepted.
    entries = tuple({"needs": [], **entry} for entry in content["patches"])
    record = PatchRecord(content["base"], content["model"], entries)
    if (found := model_fingerprint(folder)) != record.model:
        raise ModelError(
            f"Expected `{folder}` to be as patches left it ({record.model}), but got {found}: its weights were changed "
            "afterwards. Start again from the model without patches."
        )
    return record


def apply_patches(model: Path, files: Sequence[Path], output: Path, *, keep_originals: bool = False) -> Applied:
    """Write a copy of a model folder with patches added to its rows.

    Args:
        model: what the patches were trained on, be it with patches on it or without; or a folder with other patches
            of the same base on it.
        files: of the patches; a file's name is the patch's name on the model.
        output: must not exist.
        keep_originals: store the rows as they were with the patches in the new folder, so that they come off without
            the base.

    Raises:
        ModelError: a file is no patch or was changed, or the model is not what the patches were trained on.
        ConfigError: two patches change the same rows, neither of them trained on top of the other, or have one name;
            or ``output`` exists.
    """
    record = read_record(model)
    before = [] if record is None else _carried(model, record)
    new = [replace(read_patch(path), name=path.stem) for path in files]
    base, needs = _bases(model, record, dict(zip(files, new, strict=True)))
    _check_conflicts([*before, *new], needs)
    originals: dict[str, dict[str, torch.Tensor]] = {patch.identity: {} for patch in new}
    sums = [0.0, 0.0]

    def change(weight: torch.Tensor, patch: Patch, key: str, part: PatchRows) -> torch.Tensor:
        originals[patch.identity][key] = _checked_rows(weight, part, model)
        update = patch.updates(key)
        wide = fold_rows(weight.float(), part.rows, update, is_transposed=part.is_transposed)
        folded = wide.to(weight.dtype)
        sums[0] += float((folded.float() - wide).double().square().sum())
        sums[1] += float(update.double().square().sum())
        return _only_rows(weight, folded, part)

    with _copied(model, output, new, change) as folder:
        kept = [patch.with_originals(originals[patch.identity]) if keep_originals else patch for patch in new]
        for patch in kept:
            write_patch(patch, folder / FOLDER / f"{patch.name}{SUFFIX}")
        _write_record(folder, base, [*before, *new], needs)
    return Applied(sum(patch.num_rows for patch in new), (sums[0] / sums[1]) ** 0.5 if sums[1] else 0.0)


def remove_patch(model: Path, name: str, output: Path, *, base: Path | None = None) -> int:
    """Write a copy of a model folder with a patch taken off, bit by bit as it was, and return how many rows that were.

    Args:
        model: a folder with patches on it.
        name: of the patch, or its file.
        output: must not exist.
        base: the model the patch was trained on; None takes the rows stored with the patch.

    Raises:
        ModelError: the folder carries no patches or not this one, another patch was trained on top of it, ``base`` is
            another model, or the rows as they were are not stored and no base is given.
        ConfigError: ``output`` exists.
    """
    record = read_record(model)
    carried = [] if record is None else _carried(model, record)
    chosen = _chosen(carried, name)
    if record is None or chosen is None:
        raise ModelError(
            f"Expected `{model}` to carry the patch {name!r}, but it carries "
            f"{', '.join(patch.name for patch in carried) or 'none'}. Look with `seawall patch inspect`."
        )
    _check_removable(chosen, model, record, base)
    read = _rows_reader(base) if base is not None else None

    def change(weight: torch.Tensor, patch: Patch, key: str, part: PatchRows) -> torch.Tensor:
        stored = part.originals if read is None else read(part)
        if stored is None or rows_digest(stored) != part.digest:
            raise ModelError(
                f"Expected the rows of `{part.module}` as they were before the patch, but got others. Name the model "
                "it was trained on with `--base`."
            )
        restored = weight.clone()
        if part.is_transposed:
            restored[:, part.rows] = stored.T
        else:
            restored[part.rows] = stored
        return restored

    with _copied(model, output, [chosen], change) as folder:
        (folder / FOLDER / f"{chosen.name}{SUFFIX}").unlink()
        rest = [patch for patch in carried if patch.identity != chosen.identity]
        _write_record(folder, record.base, rest, record.needs)
    return chosen.num_rows


# ---- private -----------------------------------------------------------------------------------------------------

Change = Callable[[torch.Tensor, Patch, str, PatchRows], torch.Tensor]


def _carried(folder: Path, record: PatchRecord) -> list[Patch]:
    found = []
    for entry in record.patches:
        patch = read_patch(folder / FOLDER / f"{entry['name']}{SUFFIX}")
        if patch.identity != entry["identity"]:
            raise ModelError(
                f"Expected `{folder}` to hold the patch {entry['name']!r} that was put on it, but got another one "
                "under its name. Start again from the model without patches."
            )
        found.append(patch)
    return found


def _bases(model: Path, record: PatchRecord | None, new: Mapping[Path, Patch]) -> tuple[str, Needs]:
    """Return the fingerprint of the model without patches, and what every patch on it needs, the new ones too."""
    found = model_fingerprint(model) if record is None else record.model
    base = found if record is None else record.base
    needs: dict[str, Sequence[str]] = {} if record is None else dict(record.needs)
    present = tuple(needs)
    for path, patch in new.items():
        if patch.base not in (base, found):
            patched = f", with its patches {found}" if record is not None else ""
            raise ModelError(
                f"Expected `{path}` to be a patch for `{model}` (base {base}{patched}), but got one for the base "
                f"{patch.base}. Apply it to the model it was trained on; if that one had patches on it, put them on "
                "first."
            )
        needs.setdefault(patch.name, () if patch.base == base else present)
    return base, needs


def _check_removable(chosen: Patch, model: Path, record: PatchRecord, base: Path | None) -> None:
    above = [name for name, needed in reversed(list(record.needs.items())) if chosen.name in needed]
    if above:
        raise ModelError(
            f"Expected no patch on `{model}` to be trained on top of {chosen.name!r}, but got {', '.join(above)}. Take "
            f"{'it' if len(above) == 1 else 'them'} off first{', in this order' if len(above) > 1 else ''}."
        )
    if base is not None and (found := model_fingerprint(base)) != chosen.base:
        raise ModelError(
            f"Expected `{base}` to be the model the patch {chosen.name!r} was trained on ({chosen.base}), but got "
            f"{found}. Name that one."
        )
    if base is None and not chosen.has_originals:
        raise ModelError(
            f"Expected the rows as they were to be stored with the patch {chosen.name!r}, but they are not. Name the "
            "model it was trained on with `--base`, or apply patches with `--keep-originals`."
        )


def _chosen(carried: Sequence[Patch], name: str) -> Patch | None:
    wanted = read_patch(Path(name)).identity if name.endswith(SUFFIX) else None
    return next((patch for patch in carried if name == patch.name or patch.identity == wanted), None)


def _check_conflicts(patches: Sequence[Patch], needs: Needs) -> None:
    names = [patch.name for patch in patches]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise ConfigError(
            f"Expected every patch on a model to have its own name, but got {doubled[0]!r} twice. Take the first one "
            "off, or rename the file of the second."
        )
    problems = []
    for place, second in enumerate(patches):
        for first in patches[:place]:
            # A patch trained on top of another one saw its rows as that one left them.
            shared = {} if first.name in needs[second.name] else _shared_rows(first, second)
            if shared:
                module, rows = next(iter(shared.items()))
                problems.append(
                    f"Expected patches to change different rows, but `{first.name}` and `{second.name}` share "
                    f"{sum(map(len, shared.values()))} in {len(shared)} modules (`{module}` rows {rows[:3]} first). "
                    "Take one of them off."
                )
    if problems:
        raise ConfigError(problems)


def _shared_rows(first: Patch, second: Patch) -> dict[str, list[int]]:
    ours, theirs = _rows_by_module(first), _rows_by_module(second)
    shared = {module: sorted(ours[module] & theirs[module]) for module in sorted(ours.keys() & theirs.keys())}
    return {module: rows for module, rows in shared.items() if rows}


def _rows_by_module(patch: Patch) -> dict[str, set[int]]:
    found: dict[str, set[int]] = {}
    for part in patch.parts.values():
        found.setdefault(part.module, set()).update(part.rows.tolist())
    return found


def _checked_rows(weight: torch.Tensor, part: PatchRows, model: Path) -> torch.Tensor:
    rows = take_rows(weight, part.rows, is_transposed=part.is_transposed)
    if rows_digest(rows) != part.digest:
        raise ModelError(
            f"Expected the rows of `{part.module}` in `{model}` to be those the patch was trained on, but got others. "
            "Apply it to the model it was trained on."
        )
    return rows


def _only_rows(weight: torch.Tensor, folded: torch.Tensor, part: PatchRows) -> torch.Tensor:
    changed = weight.clone()
    if part.is_transposed:
        changed[:, part.rows] = folded[:, part.rows]
    else:
        changed[part.rows] = folded[part.rows]
    return changed


def _rows_reader(base: Path) -> Callable[[PatchRows], torch.Tensor]:
    places: dict[str, Path] = {}
    for path in _weight_files(base):
        with safe_open(path, "pt") as file:
            places.update(dict.fromkeys(file.keys(), path))

    def read(part: PatchRows) -> torch.Tensor:
        name = f"{part.module}.weight"
        with safe_open(places[name], "pt") as file:
            return take_rows(file.get_tensor(name), part.rows, is_transposed=part.is_transposed)

    return read


@contextlib.contextmanager
def _copied(model: Path, output: Path, patches: Sequence[Patch], change: Change) -> Iterator[Path]:
    """Yield a copy of the folder with the weights of the patches' modules changed; it becomes ``output`` at the end."""
    if output.exists():
        raise ConfigError(f"Expected `--output` to be a new folder, but got {str(output)!r}, which exists.")
    partial = output.with_name(f".{output.name}.{os.getpid()}.partial")
    weights = {path.name for path in _weight_files(model)}
    try:
        shutil.copytree(model, partial, ignore=lambda folder, names: weights if Path(folder) == model else set())
        missing = {part.module for patch in patches for part in patch.parts.values()}
        for path in _weight_files(model):
            missing -= _copy_weights(path, partial / path.name, patches, change)
        if missing:
            raise ModelError(f"Expected `{model}` to hold the weight of `{min(missing)}`, but it does not.")
        yield partial
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _copy_weights(source: Path, target: Path, patches: Sequence[Patch], change: Change) -> set[str]:
    """Write one weight file with what the patches change in it; return the modules that lie in it."""
    with safe_open(source, "pt") as file:
        stored = set(file.keys())
    wanted: dict[str, list[tuple[Patch, str, PatchRows]]] = {}
    for patch in patches:
        for key, part in patch.parts.items():
            if (name := f"{part.module}.weight") in stored:
                wanted.setdefault(name, []).append((patch, key, part))

    def changed(name: str, weight: torch.Tensor) -> torch.Tensor:
        for patch, key, part in wanted[name]:
            weight = change(weight, patch, key, part)
        return weight

    copy_changed(source, target, wanted, changed)
    return {name.removesuffix(".weight") for name in wanted}


def _weight_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob(f"*{SUFFIX}") if not path.name.startswith("adapter_"))


def _write_record(folder: Path, base: str, patches: Sequence[Patch], needs: Needs) -> None:
    if not patches:
        (folder / RECORD).unlink(missing_ok=True)
        shutil.rmtree(folder / FOLDER, ignore_errors=True)
        return
    entries = tuple({"name": p.name, "identity": p.identity, "needs": list(needs[p.name])} for p in patches)
    write_json(folder / RECORD, asdict(PatchRecord(base, model_fingerprint(folder), entries)))
