"""``seawall verify``: whether a bundle is what was signed, is still valid, and says of itself what its model does."""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from experiments.release.archive import unpack
from experiments.release.check import Checked, check_bundle
from experiments.release.manifest import Problem, show_time
from experiments.release.rerun import Rerun, Tolerance, read_release, rerun_sample
from experiments.release.samples import has_image
from experiments.release.signing import read_public_key
from framework.errors import ConfigError, DataError

__all__ = ["PARTS", "Verification", "VerifyOptions", "verification_table", "verify_bundle"]

PARTS = ("archive", "manifest", "signature", "expiry", "files", "replies")
DEFAULT_PROMPTS = 8


@dataclass(frozen=True)
class VerifyOptions:
    """How a bundle is verified."""

    key: Path | None = None
    """The signer's public key (PEM); None takes the one in the bundle, which proves no origin."""
    prompts: int | None = None
    """Replies to make again; None takes 8 or all that can be, 0 makes none."""
    seed: int | None = None
    """Of the choice; None draws one, so that nobody knows beforehand which are made again."""
    base: str | None = None
    """Base model of an adapter; None takes the name in the bundle."""
    tolerance: Tolerance = field(default_factory=Tolerance)
    accelerator: str = "auto"


@dataclass(frozen=True)
class Verification:
    """What verification found."""

    bundle: Path
    checked: Checked | None
    """None for an archive that cannot be unpacked."""
    rerun: Rerun | None
    """None if no replies were made again."""
    problems: tuple[Problem, ...]

    @property
    def is_good(self) -> bool:
        """Whether nothing is wrong in what was checked."""
        return not self.problems

    @property
    def unchecked(self) -> tuple[str, ...]:
        """What a bundle with nothing wrong has not shown, in sentences; the options leave open ``left_out`` of it."""
        return (*self.left_out, *self._beyond_reach())

    @property
    def left_out(self) -> tuple[str, ...]:
        """What other options would have checked, in sentences; empty when everything that can be checked was."""
        if self.problems or self.checked is None or self.checked.signature is None:
            return ()
        trusted = self.checked.signature.is_trusted
        return (
            *(() if trusted else ("Who signed it is not checked: give the signer's public key with --key.",)),
            *(() if self.rerun else ("What it says of its model is not checked: no reply was made again.",)),
        )

    def _beyond_reach(self) -> tuple[str, ...]:
        """Return what no option checks, because the bundle does not hold what decides it."""
        if self.problems or self.rerun is None:
            return ()
        found, claims = [], self.rerun.unchecked_claims
        if claims:
            found.append(f"Nothing in the bundle decides these numbers, its signer states them: {', '.join(claims)}.")
        if self.rerun.num_with_image:
            found.append(
                f"{self.rerun.num_with_image} of {self.rerun.num_recorded} replies were made with pictures, which the "
                "bundle does not hold; none of them was made again."
            )
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values, for ``--json``."""
        manifest = self.checked.manifest if self.checked else None
        signature = self.checked.signature if self.checked else None
        return {
            "bundle": str(self.bundle),
            "is_good": self.is_good,
            "bad_parts": [part for part in PARTS if any(problem.part == part for problem in self.problems)],
            "problems": [problem._asdict() for problem in self.problems],
            "unchecked": list(self.unchecked),
            "left_out": list(self.left_out),
            "name": manifest.name if manifest else None,
            "files": len(manifest.files) if manifest else None,
            "bytes": sum(entry.size for entry in manifest.files.values()) if manifest else None,
            "expires": show_time(manifest.expires) if manifest and manifest.expires else None,
            "signer": signature.signer if signature else None,
            "is_trusted_key": bool(signature and signature.is_trusted),
            "rerun": _plain_rerun(self.rerun) if self.rerun else None,
        }


def verify_bundle(
    path: Path,
    options: VerifyOptions = VerifyOptions(),
    *,
    now: datetime | None = None,
) -> Verification:
    """Return what is wrong with a bundle; its model is loaded only after every file, signature and validity are right.

    Args:
        path: folder or archive.
        options: how.
        now: decides whether it expired; None takes the clock's.

    Raises:
        ConfigError: no such bundle, no usable key, or a number of prompts that cannot be.
        ModelError: the base of an adapter is not there or another one.
    """
    if options.prompts is not None and options.prompts < 0:
        raise ConfigError(f"Expected `--prompts` to be a whole number >= 0, but got {options.prompts}.")
    if not path.is_dir() and not path.is_file():
        raise ConfigError(f"Expected `{path}` to be a bundle, a folder or a .tar file, but got nothing there.")
    trusted = read_public_key(options.key) if options.key else None
    with _opened(path) as (folder, broken):
        if broken:
            return Verification(path, None, None, tuple(broken))
        checked = check_bundle(folder, trusted=trusted, now=now or datetime.now(timezone.utc))
        problems, rerun = list(checked.problems), None
        if not problems and options.prompts != 0:
            try:
                rerun = _rerun(folder, options)
                problems += [Problem("replies", text) for text in rerun.problems]
            except DataError as error:  # signed, and yet not what a bundle must say
                problems.append(Problem("replies", str(error)))
    return Verification(path, checked, rerun, tuple(problems))


def verification_table(found: Verification) -> Table:
    """Return one row a part: whether it is good, and what was found."""
    verdict = "BAD" if not found.is_good else "NOT ALL CHECKED" if found.left_out else "good"
    table = Table(box=box.SIMPLE, title=f"{found.bundle}: {verdict}", title_justify="left")
    table.add_column("part")
    table.add_column("verdict")
    table.add_column("detail", overflow="fold")
    for part in PARTS:
        bad = [problem.detail for problem in found.problems if problem.part == part]
        if bad:
            table.add_row(part, "bad", "\n".join(bad))
        elif detail := _good_detail(found, part):
            table.add_row(part, *detail)
    return table


def _rerun(folder: Path, options: VerifyOptions) -> Rerun:
    wanted = options.prompts
    if wanted is None:
        wanted = min(DEFAULT_PROMPTS, sum(not has_image(sample) for sample in read_release(folder)[1]))
    seed = secrets.randbelow(2**31) if options.seed is None else options.seed
    return rerun_sample(
        folder, num_prompts=wanted, seed=seed, base=options.base, tolerance=options.tolerance,
        accelerator=options.accelerator,
    )  # fmt: skip


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Path, list[Problem]]]:
    """Yield the bundle's folder, and what is wrong with the archive it came in."""
    if path.is_dir():
        yield path.resolve(), []
        return
    with tempfile.TemporaryDirectory(prefix="seawall-verify-") as folder:
        yield Path(folder), unpack(path, Path(folder))


def _good_detail(found: Verification, part: str) -> tuple[str, str] | None:
    """Return verdict and detail of a part nothing is wrong with; None for a part that there is not."""
    if found.checked is None or found.checked.manifest is None or found.checked.signature is None:
        return None
    manifest, signature = found.checked.manifest, found.checked.signature
    size = sum(entry.size for entry in manifest.files.values())
    if part == "archive":
        return ("good", "exactly its files") if found.bundle.is_file() else None
    if part == "manifest":
        return "good", f"{manifest.name}, {show_time(manifest.created)}"
    if part == "signature":
        known = (
            "the key given" if signature.is_trusted else "the bundle's own key; WHO SIGNED IS NOT CHECKED without --key"
        )
        return ("good" if signature.is_trusted else "unproven"), f"{str(signature.signer)[:16]}: {known}"
    if part == "expiry":
        return "good", f"valid until {show_time(manifest.expires)}" if manifest.expires else "no end of validity"
    if part == "files":
        return "good", f"{len(manifest.files)} files, {size / 2**20:.1f} MiB, none missing, changed or added"
    return _rerun_detail(found.rerun)


def _rerun_detail(rerun: Rerun | None) -> tuple[str, str]:
    if rerun is None:
        return "not run", "no reply was made again"
    given = rerun.tolerance
    lines = [
        f"{rerun.num_exact}/{rerun.num_prompts} the same (needed {given.min_exact:.0%}), "
        f"{rerun.mean_prefix:.1%} of words from the start (needed {given.min_prefix:.0%})",
        *(f"{count.what}: {count.recorded} recorded, {count.now} now, of {count.num_known}" for count in rerun.counts),
        f"{rerun.num_prompts} of {rerun.num_recorded} replies, seed {rerun.seed}; "
        f"a count may change by {given.allowed(rerun.num_prompts)}",
        *(f"judge not asked: {name}" for name in rerun.not_asked),
    ]
    return "good", "\n".join(lines)


def _plain_rerun(rerun: Rerun) -> dict[str, Any]:
    from framework.files import to_plain

    return {
        **to_plain(rerun),
        "counts": [count._asdict() for count in rerun.counts],
        "allowed_shift": rerun.tolerance.allowed(rerun.num_prompts),
    }
