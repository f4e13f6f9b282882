"""Ed25519 keys and the signature of a manifest.

The signature covers the exact bytes of ``manifest.json``, and through its hashes every file. It stands in
``signature.json`` with the public key, in canonical JSON and lower-case hex, so that one signature has one spelling.
The private key is read, used and forgotten: it is written to the file that ``create_key`` makes and nowhere else.

The format of the package ``model-signing`` (sigstore) is not written. Tried in version 1.1.1 without a network: it
signs with a local key, but only with keys on the NIST curves (an Ed25519 key ends in an error), it brings about thirty
packages for the transparency log that an offline signature does not use, and it does not import unless ``pyOpenSSL``,
which it does not name, is installed too. Who needs it can sign the finished bundle with it and keep its file outside.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from experiments.release.manifest import SIGNATURE_FILE, Problem, canonical_json
from framework.errors import ConfigError, StorageError

__all__ = [
    "PASSPHRASE",
    "SignatureCheck",
    "check_signature",
    "create_key",
    "key_fingerprint",
    "public_key_path",
    "read_private_key",
    "read_public_key",
    "secret_forms",
    "sign_manifest",
]

ALGORITHM = "ed25519"
PASSPHRASE = "SEAWALL_KEY_PASSPHRASE"
"""Variable with the passphrase of an encrypted private key."""
_KEY, _SIGNATURE = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{128}")
_RAW = (serialization.Encoding.Raw, serialization.PublicFormat.Raw)


class SignatureCheck(NamedTuple):
    """What a signature is worth."""

    problems: list[Problem]
    signer: str | None
    """Fingerprint of the key the bundle names; None where that cannot be read."""
    is_trusted: bool
    """Whether it is the key that the reader gave, and not merely the one in the bundle."""


def create_key(path: Path) -> Ed25519PrivateKey:
    """Make a key pair: the private half in ``path`` (PEM, mode 600), the public half beside it, ending in ``.pub.pem``.

    Raises:
        ConfigError: one of the files exists.
        StorageError: they cannot be written.
    """
    public = public_key_path(path)
    for there in (path, public):
        if there.exists() or there.is_symlink():
            raise ConfigError(f"Expected `--new-key` to name a new file, but got {str(there)!r}, which exists.")
    key = Ed25519PrivateKey.generate()
    text = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    spelt = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    _write_new(path, text, 0o600)
    _write_new(public, spelt, 0o644)
    return key


def public_key_path(path: Path) -> Path:
    """Return where the public half of a new key goes.

    Example:
        >>> public_key_path(Path("release.pem")).name
        'release.pub.pem'
    """
    return path.with_name(f"{path.stem if path.suffix == '.pem' else path.name}.pub.pem")


def read_private_key(path: Path) -> Ed25519PrivateKey:
    """Return the private key in a PEM file; the variable ``SEAWALL_KEY_PASSPHRASE`` opens an encrypted one.

    Raises:
        ConfigError: there is none, it is of another kind, or its passphrase is missing or wrong. The message never
            holds a part of the file.
    """
    data = _read_key_file(path)
    given = os.environ.get(PASSPHRASE)
    try:
        key: Any = serialization.load_pem_private_key(data, password=given.encode() if given else None)
    except TypeError:  # says whether a passphrase is missing or needless
        problem = f"a key with a passphrase; set {PASSPHRASE}" if not given else f"none; unset {PASSPHRASE}"
        raise ConfigError(f"Expected the passphrase of `{path}` to fit, but got {problem}.") from None
    except (ValueError, UnsupportedAlgorithm):
        raise ConfigError(
            f"Expected `{path}` to hold a private key as PEM, but got something else or a wrong passphrase. "
            "`--new-key FILE` makes one."
        ) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"Expected `{path}` to hold an Ed25519 key, but got {type(key).__name__.lstrip('_')}.")
    return key


def read_public_key(path: Path) -> Ed25519PublicKey:
    """Return the public key in a PEM file.

    Raises:
        ConfigError: there is none, or it is of another kind.
    """
    data = _read_key_file(path)
    if b"PRIVATE KEY" in data:
        raise ConfigError(f"Expected `{path}` to hold a public key, but got a private one. Keep that to yourself.")
    try:
        key: Any = serialization.load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm):
        raise ConfigError(f"Expected `{path}` to hold a public key as PEM, but got something else.") from None
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigError(f"Expected `{path}` to hold an Ed25519 key, but got {type(key).__name__.lstrip('_')}.")
    return key


def key_fingerprint(key: Ed25519PublicKey) -> str:
    """Return the SHA-256 of a public key's 32 bytes, in hex."""
    return hashlib.sha256(key.public_bytes(*_RAW)).hexdigest()


def secret_forms(key: Ed25519PrivateKey) -> list[bytes]:
    """Return the spellings by which a private key could be found in a file: raw, hex, and its lines of PEM."""
    raw = key.private_bytes(serialization.Encoding.Raw, serialization.PrivateFormat.Raw, serialization.NoEncryption())
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return [raw, raw.hex().encode(), pem.splitlines()[1]]


def sign_manifest(manifest: bytes, key: Ed25519PrivateKey) -> bytes:
    """Return the bytes of ``signature.json`` for the bytes of a manifest."""
    return _spell(key.public_key().public_bytes(*_RAW), key.sign(manifest))


def check_signature(manifest: bytes, signature: bytes, *, trusted: Ed25519PublicKey | None) -> SignatureCheck:
    """Return whether a signature fits a manifest and comes from the key that the reader trusts.

    Args:
        manifest: bytes of ``manifest.json``.
        signature: bytes of ``signature.json``.
        trusted: the signer's public key, from elsewhere; None checks against the key in the bundle, which tells of
            accidents but not of forgery: whoever changes a bundle can sign it anew with a key of his own.
    """
    found = _parse(signature)
    if found is None:
        return _refuse(f"{SIGNATURE_FILE} is not a signature in canonical form.", None)
    public, value = found
    key = Ed25519PublicKey.from_public_bytes(public)
    signer = key_fingerprint(key)
    if trusted is not None and trusted.public_bytes(*_RAW) != public:
        return _refuse(
            f"The bundle was signed by the key {signer[:16]}, not by the one given, {key_fingerprint(trusted)[:16]}.",
            signer,
        )
    try:
        key.verify(value, manifest)
    except InvalidSignature:
        return _refuse("The signature does not fit the manifest: one of the two was changed.", signer)
    return SignatureCheck([], signer, trusted is not None)


def _refuse(detail: str, signer: str | None) -> SignatureCheck:
    return SignatureCheck([Problem("signature", detail)], signer, False)


def _spell(public: bytes, value: bytes) -> bytes:
    return canonical_json({"algorithm": ALGORITHM, "public_key": public.hex(), "signature": value.hex()})


def _parse(data: bytes) -> tuple[bytes, bytes] | None:
    """Return public key and signature; None unless the bytes are exactly the one spelling of both."""
    try:
        value = json.loads(data.decode("utf-8"))
        key, signature = value["public_key"], value["signature"]
        if not _KEY.fullmatch(key) or not _SIGNATURE.fullmatch(signature):
            return None
    except (ValueError, RecursionError, KeyError, TypeError):
        return None
    found = bytes.fromhex(key), bytes.fromhex(signature)
    return found if _spell(*found) == data else None


def _read_key_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"Expected `{path}` to be a key file, but got: {error.strerror or error}.") from error


def _write_new(path: Path, data: bytes, mode: int) -> None:
    """Write a file that must not exist yet; it never has wider rights than ``mode``, not even while it is written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), mode)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        path.chmod(mode)  # whatever the umask is
    except OSError as error:
        raise StorageError(f"Expected `{path}` to be writable, but got {error.strerror or error}.") from error
