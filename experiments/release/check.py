"""The part of verification that runs nothing of the bundle: structure, hashes, signature, validity."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from experiments.release.manifest import (
    MANIFEST_FILE,
    SIGNATURE_FILE,
    Manifest,
    Problem,
    compare_files,
    list_files,
    parse_manifest,
    show_time,
)
from experiments.release.signing import SignatureCheck, check_signature
from framework.errors import DataError

__all__ = ["Checked", "check_bundle"]


class Checked(NamedTuple):
    """What was found."""

    manifest: Manifest | None
    """None where it is missing or cannot be read."""
    signature: SignatureCheck | None
    """None where manifest or signature is missing."""
    problems: list[Problem]
    """Empty for a bundle as it was signed."""


def check_bundle(folder: Path, *, trusted: Ed25519PublicKey | None, now: datetime) -> Checked:
    """Return everything that is wrong with the bundle in ``folder``; nothing in it is run or loaded.

    Args:
        folder: the bundle.
        trusted: the signer's public key, from elsewhere; None takes the one in the bundle.
        now: decides whether it expired.
    """
    data, spelt = _read(folder / MANIFEST_FILE), _read(folder / SIGNATURE_FILE)
    problems = []
    if data is None:
        problems.append(Problem("manifest", f"{MANIFEST_FILE} is missing."))
    if spelt is None:
        problems.append(Problem("signature", f"{SIGNATURE_FILE} is missing: the bundle is not signed."))
    signature = None
    if data is not None and spelt is not None:
        signature = check_signature(data, spelt, trusted=trusted)
        problems += signature.problems
    manifest = None
    try:
        manifest = None if data is None else parse_manifest(data)
    except DataError as error:
        problems.append(Problem("manifest", str(error)))
    if manifest is None:
        return Checked(None, signature, problems + list_files(folder)[1])
    if manifest.expires is not None and now >= manifest.expires:
        problems.append(Problem("expiry", f"The bundle was valid until {show_time(manifest.expires)}."))
    return Checked(manifest, signature, problems + compare_files(folder, manifest))


def _read(path: Path) -> bytes | None:
    """Return the bytes of a file; None if there is none. A link is not followed."""
    return path.read_bytes() if path.is_file() and not path.is_symlink() else None
