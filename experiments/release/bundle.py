"""``seawall release``: the folder or archive in which a finished run's model is handed to others."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import yaml
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from experiments.release.adapter import check_adapter, name_base
from experiments.release.archive import pack
from experiments.release.attacks import read_attacks
from experiments.release.check import check_bundle
from experiments.release.facts import release_facts
from experiments.release.finished_run import FinishedRun, read_finished_run
from experiments.release.manifest import MANIFEST_FILE, SIGNATURE_FILE, list_files, make_manifest
from experiments.release.model_card import model_card
from experiments.release.names import public_name, short_names, without_paths
from experiments.release.overlap import Overlap, OverlapKind, find_overlap, training_prompts
from experiments.release.samples import bundle_sample, has_image, select_samples
from experiments.release.signing import create_key, key_fingerprint, read_private_key, secret_forms, sign_manifest
from framework.errors import ConfigError, DataError, SeawallError, StorageError
from framework.files import to_plain, write_atomic, write_json
from framework.model_files import model_fingerprint

__all__ = ["ReleaseOptions", "Released", "release_run"]

RELEASE_FILE = "release.json"
SAMPLES_FILE = "samples.jsonl"
MODEL_SUFFIXES = (".safetensors", ".json", ".jinja", ".txt", ".model")
LEFT_BEHIND = ("README.md",)
"""What libraries write beside weights and the model card takes the place of."""
_MARK = b"PRIVATE KEY-----"


@dataclass(frozen=True)
class ReleaseOptions:
    """How a run is released."""

    output: Path | None = None
    """Folder or, for an archive, file to make; None takes ``releases/<name>`` in the working directory."""
    key: Path | None = None
    """Private key to sign with (PEM, Ed25519)."""
    new_key: Path | None = None
    """File for a new private key, instead of ``key``."""
    content: Literal["model", "adapter"] = "model"
    expires: datetime | None = None
    """End of validity, with a time zone; None for none."""
    is_archive: bool = False
    """Make one file instead of a folder."""
    exclude: OverlapKind | None = None
    """Leave measured prompts out of the numbers that stood in the training data."""
    full_replies: bool = False
    """Keep replies to harmful prompts, and sampled openings, readable."""
    attacks: Sequence[Path] = ()
    """Files of ``seawall attack``, or JSON lists of what attacks found."""


class Released(NamedTuple):
    """A bundle that was made."""

    path: Path
    num_files: int
    num_bytes: int
    """Of all files but manifest and signature."""
    signer: str
    """Fingerprint of the public key."""
    overlap: Overlap
    num_excluded: int
    num_without_opening: int
    """Replies left out because a sampled opening was forced on the model."""
    num_with_image: int
    """Replies that cannot be made again because their pictures are not in the bundle."""


def release_run(folder: Path, options: ReleaseOptions, *, now: datetime | None = None) -> Released:
    """Make a signed bundle of a finished run; it appears whole or not at all.

    Args:
        folder: of the run.
        options: how.
        now: stands in the bundle as its time; None takes the clock's.

    Raises:
        ConfigError: options that do not go together, a wrong key, or an adapter that is not the measured model.
        DataError: the run is not finished or damaged, no prompts are left, or attacks are not on its model.
        ModelError: the run's model is missing or incomplete.
        StorageError: the bundle cannot be written.
    """
    moment = now or datetime.now(timezone.utc)
    target = _check_options(folder, options, moment)
    run = read_finished_run(folder)
    key = read_private_key(options.key) if options.key else None
    base = check_adapter(run) if options.content == "adapter" else None
    weights = model_fingerprint(run.model) if options.attacks else ""
    attacks = [attack for path in options.attacks for attack in read_attacks(path, fingerprint=weights)]
    overlap = _measure_overlap(run, options)
    excluded = overlap.excluded(options.exclude)
    keeps = options.full_replies or run.config.evaluate.prefill_replies == "opening"
    samples, num_left = select_samples(run.samples, excluded, keeps_openings=keeps)
    counted, _ = select_samples(run.samples, excluded, keeps_openings=True)
    num_with_image = sum(has_image(sample) for sample in samples)
    facts = release_facts(
        run, counted, content=options.content, created=moment, expires=options.expires, overlap=overlap,
        excluded=excluded, base_fingerprint=base, attacks=attacks, num_with_image=num_with_image,
    )  # fmt: skip
    with _staging(target) as staging:
        _fill(staging, run, facts, samples, full=options.full_replies)
        _refuse_strangers(staging)
        signing_key = key or create_key(cast(Path, options.new_key))
        _refuse_secrets(staging, signing_key)
        manifest = make_manifest(staging, name=run.name, created=moment, expires=options.expires)
        write_atomic(staging / MANIFEST_FILE, manifest)
        write_atomic(staging / SIGNATURE_FILE, sign_manifest(manifest, signing_key))
        checked = check_bundle(staging, trusted=signing_key.public_key(), now=moment)
        if checked.problems or checked.manifest is None:
            raise SeawallError(f"Expected the new bundle to pass its own checks, but got: {checked.problems[0].detail}")
        _deliver(staging, target, is_archive=options.is_archive)
    sizes = [entry.size for entry in checked.manifest.files.values()]
    signer = key_fingerprint(signing_key.public_key())
    return Released(target, len(sizes), sum(sizes), signer, overlap, len(excluded), num_left, num_with_image)


def _check_options(folder: Path, options: ReleaseOptions, now: datetime) -> Path:
    """Return where the bundle goes; refuse options that do not go together."""
    problems = []
    if (options.key is None) == (options.new_key is None):
        got = "both" if options.key else "neither"
        problems.append(f"Expected either `--key FILE` or `--new-key FILE`, but got {got}. A bundle is always signed.")
    if options.expires is not None and options.expires <= now:
        problems.append(f"Expected `--expires` to lie ahead, but got {options.expires.isoformat()}.")
    suffix = ".tar" if options.is_archive else ""
    target = options.output or Path("releases") / f"{folder.resolve().name}{suffix}"
    if options.is_archive and target.suffix != ".tar":
        problems.append(f"Expected the output of `--archive` to end in .tar, but got {str(target)!r}.")
    if target.exists() or target.is_symlink():
        problems.append(
            f"Expected the output to be new, but got {str(target)!r}, which exists. Choose another `--output`."
        )
    if options.new_key is not None:
        places = [place.resolve() for place in (folder, target)]
        if any(place in [options.new_key.resolve(), *options.new_key.resolve().parents] for place in places):
            problems.append(
                f"Expected `--new-key` to lie outside run and bundle, but got {str(options.new_key)!r}. Whoever copies "
                "the folder would copy the key."
            )
    if problems:
        raise ConfigError(problems)
    return target


def _measure_overlap(run: FinishedRun, options: ReleaseOptions) -> Overlap:
    """Return the overlap; where the training data is not there any more, say so instead of finding none."""
    try:
        return find_overlap(run.samples, training_prompts(run.config))
    except SeawallError as error:
        if options.exclude is not None:
            raise DataError(
                f"Expected the run's training data to be there for `--exclude-overlap`, but got: {error}"
            ) from error
        reason = str(without_paths(str(error).split("\n")[0], short_names(to_plain(run.config))))
        return Overlap(
            len(run.samples), 0, unknown=(f"the training data could not be read again: {reason.rstrip('.')}",)
        )


class _staging:
    """A folder beside the target that goes away, whatever happens."""

    def __init__(self, target: Path) -> None:
        self._target = target

    def __enter__(self) -> Path:
        try:
            self._target.parent.mkdir(parents=True, exist_ok=True)
            self._folder = Path(tempfile.mkdtemp(prefix=f".{self._target.name}.", dir=self._target.parent))
        except OSError as error:
            raise StorageError(
                f"Expected `{self._target}` to be writable, but got {error.strerror or error}."
            ) from error
        self._folder.chmod(0o755)
        return self._folder

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


def _fill(
    folder: Path, run: FinishedRun, facts: dict[str, Any], samples: Sequence[Mapping[str, Any]], *, full: bool
) -> None:
    """Write everything but manifest and signature, without the names of this machine's folders."""
    if all(has_image(sample) for sample in samples):
        raise DataError(
            "Expected replies that verification can make again, but got none without a forced opening or a picture."
        )
    config = to_plain(run.config)
    names = short_names([config, run.results])
    facts = without_paths(facts, names)
    source = run.model if facts["content"] == "model" else run.adapter
    _copy_model(source, folder / facts["content"])
    if facts["content"] == "adapter":
        name_base(folder / "adapter", facts["base_model"]["name"])
    lines = [bundle_sample(sample, names=names, full=full) for sample in samples]
    text = "".join(json.dumps(line, ensure_ascii=False, sort_keys=True) + "\n" for line in lines)
    write_atomic(folder / SAMPLES_FILE, text)
    write_json(folder / "results.json", without_paths(run.results, names))
    plain = without_paths(config, names)
    plain["model"]["name"] = public_name(run.config.model.name)
    write_atomic(folder / "config.yaml", yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))
    write_json(folder / RELEASE_FILE, facts)
    write_atomic(folder / "README.md", model_card(facts))


def _copy_model(source: Path, target: Path) -> None:
    """Copy the files of a model or an adapter; never links, which would change with what they were linked to."""
    target.mkdir()
    for path in sorted(source.iterdir()):
        if path.name in LEFT_BEHIND:
            continue
        if path.is_symlink() or not path.is_file() or path.suffix not in MODEL_SUFFIXES:
            raise DataError(
                f"Expected `{source}` to hold only files of a model ({', '.join(MODEL_SUFFIXES)}), but got "
                f"{path.name!r}. Move it away: what lies there would be released."
            )
        try:
            shutil.copyfile(path, target / path.name)
        except OSError as error:
            raise StorageError(f"Expected `{target}` to be writable, but got {error.strerror or error}.") from error


def _refuse_strangers(folder: Path) -> None:
    """Refuse a bundle in which any private key stands, whoever's it is."""
    for path in list_files(folder)[0]:
        if not path.endswith(".safetensors") and _MARK in (folder / path).read_bytes():
            raise DataError(f"Expected a bundle without private keys, but {path!r} holds one. Remove it from the run.")


def _refuse_secrets(folder: Path, key: Ed25519PrivateKey) -> None:
    """Refuse a bundle in which the signing key stands in any spelling, weights included."""
    forms = secret_forms(key)
    for path in list_files(folder)[0]:
        if _holds(folder / path, forms):
            raise DataError(
                f"Expected a bundle without its signing key, but {path!r} holds it. Remove it from the run."
            )


def _holds(path: Path, forms: Sequence[bytes]) -> bool:
    overlap = max(map(len, forms)) - 1
    rest = b""
    with path.open("rb") as handle:
        while chunk := handle.read(1 << 22):
            block = rest + chunk
            if any(form in block for form in forms):
                return True
            rest = block[-overlap:]
    return False


def _deliver(staging: Path, target: Path, *, is_archive: bool) -> None:
    try:
        if is_archive:
            pack(staging, target)
        else:
            os.rename(staging, target)
    except OSError as error:
        raise StorageError(f"Expected `{target}` to be writable, but got {error.strerror or error}.") from error
