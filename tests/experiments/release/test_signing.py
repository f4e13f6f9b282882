"""Keys on disk, and what a signature accepts."""

from __future__ import annotations

import json
import os

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from experiments.release.signing import (
    PASSPHRASE,
    check_signature,
    create_key,
    key_fingerprint,
    public_key_path,
    read_private_key,
    read_public_key,
    secret_forms,
    sign_manifest,
)
from framework.errors import ConfigError, StorageError

# RFC 8032 section 7.1, test 2
SECRET = bytes.fromhex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb")
PUBLIC = "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c"
SIGNATURE = (
    "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
    "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
)


def test_signature_is_that_of_rfc_8032():
    key = Ed25519PrivateKey.from_private_bytes(SECRET)
    spelt = sign_manifest(b"\x72", key)
    assert json.loads(spelt) == {"algorithm": "ed25519", "public_key": PUBLIC, "signature": SIGNATURE}
    found = check_signature(b"\x72", spelt, trusted=key.public_key())
    assert found.problems == []
    assert found.is_trusted
    assert found.signer == key_fingerprint(key.public_key())
    assert not check_signature(b"\x72", spelt, trusted=None).is_trusted
    assert "does not fit the manifest" in check_signature(b"\x73", spelt, trusted=None).problems[0].detail


def test_signature_has_one_spelling():
    key = Ed25519PrivateKey.from_private_bytes(SECRET)
    spelt = sign_manifest(b"m", key)
    value = json.loads(spelt)
    others = [
        spelt + b" ",
        spelt[:-1],
        spelt.replace(value["signature"].encode(), value["signature"].upper().encode()),
        json.dumps(value).encode(),
        spelt.replace(b"ed25519", b"none"),
        b"",
        b"[]",
        b'{"public_key":1,"signature":2}',
        b"[" * 100_000,
    ]
    for other in others:
        assert "not a signature in canonical form" in check_signature(b"m", other, trusted=None).problems[0].detail


def test_new_key_is_private_and_its_other_half_beside_it(tmp_path):
    old = os.umask(0)
    try:
        key = create_key(tmp_path / "keys" / "mine.pem")
    finally:
        os.umask(old)
    path = tmp_path / "keys" / "mine.pem"
    assert path.stat().st_mode & 0o777 == 0o600
    assert public_key_path(path).stat().st_mode & 0o777 == 0o644
    assert secret_forms(read_private_key(path)) == secret_forms(key)
    assert key_fingerprint(read_public_key(public_key_path(path))) == key_fingerprint(key.public_key())
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="Expected `--new-key` to name a new file"):
        create_key(path)
    assert path.read_bytes() == before
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="to be writable"):
        create_key(tmp_path / "file" / "k.pem")


def test_existing_public_half_is_never_overwritten(tmp_path):
    (tmp_path / "k.pub.pem").write_text("someone's")
    with pytest.raises(ConfigError, match="which exists"):
        create_key(tmp_path / "k.pem")
    assert not (tmp_path / "k.pem").exists()


def pem(key, passphrase=None):
    lock = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, lock)


def test_encrypted_key_opens_with_its_passphrase_only(tmp_path, monkeypatch):
    key = Ed25519PrivateKey.from_private_bytes(SECRET)
    path = tmp_path / "k.pem"
    path.write_bytes(pem(key, b"open"))
    monkeypatch.delenv(PASSPHRASE, raising=False)
    with pytest.raises(ConfigError, match=f"a key with a passphrase; set {PASSPHRASE}"):
        read_private_key(path)
    monkeypatch.setenv(PASSPHRASE, "wrong")
    with pytest.raises(ConfigError, match="something else or a wrong passphrase"):
        read_private_key(path)
    monkeypatch.setenv(PASSPHRASE, "open")
    assert secret_forms(read_private_key(path)) == secret_forms(key)
    path.write_bytes(pem(key))
    with pytest.raises(ConfigError, match=f"none; unset {PASSPHRASE}"):
        read_private_key(path)


def test_keys_of_another_kind_are_refused_without_being_shown(tmp_path):
    other = ec.generate_private_key(ec.SECP256R1())
    path = tmp_path / "k.pem"
    path.write_bytes(pem(other))
    with pytest.raises(ConfigError, match="to hold an Ed25519 key, but got E"):
        read_private_key(path)
    with pytest.raises(ConfigError, match="to hold a public key, but got a private one"):
        read_public_key(path)
    path.write_bytes(
        other.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    with pytest.raises(ConfigError, match="to hold an Ed25519 key, but got E"):
        read_public_key(path)
    path.write_text("hunter2")
    for read in (read_private_key, read_public_key):
        with pytest.raises(ConfigError, match="as PEM, but got something else") as caught:
            read(path)
        assert "hunter2" not in str(caught.value)
        with pytest.raises(ConfigError, match="to be a key file, but got: No such file"):
            read(tmp_path / "none")
