"""How many random single-byte changes of a bundle are detected, and what checking a bundle costs.

Run: ``python -m experiments.benchmarks.verify [--bundle FOLDER] [--changes 200] [--output FILE]``. Without a bundle one
is made of a tiny random model, every file of it as in a real one. A change picks a file, then a byte, then another
value for it; every file of the bundle is picked at least once. The bundle itself is never touched, only a copy of it.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from experiments.release.check import check_bundle
from experiments.release.manifest import Problem

__all__ = ["Change", "change_bytes", "change_file", "main"]

RECIPE = """
name: tiny
model: {{name: {model}, dtype: float32, system: ""}}
adapter: {{rank: 2, alpha: 4, targets: [q_proj, v_proj]}}
max_length: 400
max_steps: 2
batch_size: 4
stages: {{align: {{data: {{safety: embedded, benign: embedded, safety_count: 8, benign_count: 8}}}}}}
evaluate: {{after: [align], max_new_tokens: 12, limit: 20, benign_nll: false, task: false}}
trainer: {{accelerator: cpu, threads: 1}}
tracking: {{wandb: "off"}}
"""


class Change(NamedTuple):
    """One changed byte and what was found."""

    path: str
    place: int
    """Of the byte in its file."""
    problems: Sequence[Problem]


def change_bytes(
    bundle: Path, *, count: int, seed: int, trusted: Ed25519PublicKey | None, now: datetime
) -> Iterator[Change]:
    """Change one byte of a bundle, check it, put the byte back, and so on; every file has its turn.

    Args:
        bundle: a folder that may be written to.
        count: changes to make.
        seed: decides which.
        trusted: public key to check with.
        now: time of the check.

    Yields:
        One change after the other.
    """
    draw = random.Random(seed)
    paths = sorted(path for path in bundle.rglob("*") if path.is_file() and path.stat().st_size)
    turns = [*paths, *(draw.choice(paths) for _ in range(count - len(paths)))][:count]
    for path in turns:
        place = _change(path, draw)
        yield Change(
            path.relative_to(bundle).as_posix(), place.number, check_bundle(bundle, trusted=trusted, now=now).problems
        )
        place.restore()


def change_file(archive: Path, *, count: int, seed: int, now: datetime) -> Iterator[Change]:
    """Change one byte of an archive, verify it, put the byte back, and so on.

    Args:
        archive: a file that may be written to.
        count: changes to make.
        seed: decides which.
        now: time of the check.

    Yields:
        One change after the other.
    """
    from experiments.release.verify import VerifyOptions, verify_bundle

    draw = random.Random(seed)
    for _ in range(count):
        place = _change(archive, draw)
        yield Change(archive.name, place.number, verify_bundle(archive, VerifyOptions(prompts=0), now=now).problems)
        place.restore()


class _Place(NamedTuple):
    path: Path
    number: int
    before: bytes

    def restore(self) -> None:
        _put(self.path, self.number, self.before)


def _change(path: Path, draw: random.Random) -> _Place:
    number = draw.randrange(path.stat().st_size)
    with path.open("rb") as handle:
        handle.seek(number)
        before = handle.read(1)
    _put(path, number, bytes([(before[0] + draw.randrange(1, 256)) % 256]))
    return _Place(path, number, before)


def _put(path: Path, number: int, value: bytes) -> None:
    with path.open("r+b") as handle:
        handle.seek(number)
        handle.write(value)


def main() -> None:
    """Print how many changes were detected, by file, and the seconds of one check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--changes", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    from experiments.run import environment, set_threads
    from framework.files import write_json

    set_threads(1)
    now = datetime.now(timezone.utc)
    with tempfile.TemporaryDirectory() as place:
        home = Path(place)
        bundle = home / "copy"
        shutil.copytree(arguments.bundle or _make_bundle(home), bundle)
        size = sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())
        started = time.perf_counter()
        clean = check_bundle(bundle, trusted=None, now=now).problems
        seconds = time.perf_counter() - started
        changes = list(change_bytes(bundle, count=arguments.changes, seed=arguments.seed, trusted=None, now=now))
    made, found = Counter(c.path for c in changes), Counter(c.path for c in changes if c.problems)
    for path, number in sorted(made.items()):
        print(f"{path}: {found[path]}/{number}")
    print(f"unchanged: {len(clean)} problems; {size / 2**20:.2f} MiB checked in {seconds:.3f} s")
    print(f"detected {sum(found.values())}/{len(changes)} random single-byte changes")
    if arguments.output:
        write_json(
            arguments.output,
            {
                "changes": len(changes),
                "detected": sum(found.values()),
                "by_file": {path: [found[path], number] for path, number in made.items()},
                "problems_unchanged": len(clean),
                "bytes": size,
                "seconds_of_a_check": seconds,
                "environment": environment(),
            },
        )


def _make_bundle(home: Path) -> Path:
    """Run a tiny recipe and release it; returns the bundle."""
    from experiments.contract.tiny import make_model, make_tokenizer
    from experiments.release.bundle import ReleaseOptions, release_run
    from experiments.run import run_recipe
    from framework.config import load_run_config

    os.environ["SEAWALL_CACHE"] = str(home / "cache")
    make_model().save_pretrained(home / "model")
    make_tokenizer().save_pretrained(home / "model")
    (home / "tiny.yaml").write_text(RECIPE.format(model=home / "model"), encoding="utf-8")
    run_recipe(load_run_config(home / "tiny.yaml", [f"output={home / 'runs'}"]))
    options = ReleaseOptions(output=home / "bundle", new_key=home / "key.pem")
    return release_run(home / "runs" / "tiny", options).path


if __name__ == "__main__":
    main()
