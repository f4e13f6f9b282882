"""Kill a study at random moments, start it again until it ends, and compare every run with an undisturbed study.

Run: ``python -m experiments.benchmarks.study_kills [--kills 30] [--runs 12] [--workers 1] [--output FILE]``. A study
of tiny runs (random model; plain LoRA and AsFT, the rest are seeds) runs once undisturbed. Then the same command
is started in a fresh folder, gets SIGKILL after a random time, and is started again, until it ends; then the next
folder, until all kills are spent. Compared are weights, metrics, replies and curves of every run, the study's compared
table, and that no run is missing, failed or there twice.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from experiments.benchmarks.kill_outcome import outcome
from experiments.benchmarks.kills import Running
from framework.errors import SeawallError
from framework.files import fingerprint, read_json, write_atomic, write_json

__all__ = ["KilledStudy", "main", "run_kills", "study_outcome"]

NAME = "killed"
RESULTS = "kept"
PART = 0.25
"""Longest time to a kill, as a share of the undisturbed study."""
ROUNDS = 40
STUDY = """
name: {name}
base:
  name: tiny
  model: {{name: {model}, dtype: float32, system: ""}}
  adapter: {{rank: 2, alpha: 4, targets: [q_proj, v_proj]}}
  max_length: 400
  max_steps: 2
  batch_size: 4
  learning_rate: 0.01
  stages:
    align: {{data: {{safety: embedded, benign: embedded, safety_count: 4, benign_count: 4}}}}
    finetune: {{data: {{task: triage, task_count: 8}}}}
  evaluate: {{after: [finetune], max_new_tokens: 4, limit: 3, batch_size: 8, benign_nll: false}}
  trainer: {{accelerator: cpu, threads: 1, checkpoint_every_n_steps: 1}}
  tracking: {{wandb: "off"}}
grid:
  methods:
    Plain LoRA: {{}}
    AsFT: {{asft: {{weight: 10.0}}}}
  seeds: {seeds}
reference: Plain LoRA
"""
VARYING = ("cost", "tradeoff")
"""What time decides."""


@dataclass
class KilledStudy:
    """One study that was killed until it ended."""

    number: int
    kills: list[str] = field(default_factory=list)
    """Seconds after the start, and how many runs were finished then."""
    different: list[str] = field(default_factory=list)
    """Runs, or parts of the table, that are not those of the undisturbed study."""
    restarts: int = 0

    @property
    def is_identical(self) -> bool:
        """Whether everything is as without interruption."""
        return not self.different


def run_kills(
    folder: Path, *, kills: int, runs: int, seed: int, workers: int = 1
) -> tuple[list[KilledStudy], float, int]:
    """Return the killed studies, the seconds of the undisturbed one, and how many kills found a live process.

    Args:
        folder: for all that is written.
        kills: SIGKILLs in all.
        runs: of the study, even.
        seed: of the moments.
        workers: of the command.

    Raises:
        SeawallError: a study ended with an error, or did not end.
    """
    study = _write_study(folder, runs)
    started = time.monotonic()
    _finish(folder / "undisturbed", study, workers)
    seconds = time.monotonic() - started
    expected = study_outcome(folder / "undisturbed")
    draw, done, spent = random.Random(seed), list[KilledStudy](), 0
    while spent < kills:
        one = KilledStudy(len(done) + 1)
        home = folder / f"study-{one.number}"
        for _ in range(ROUNDS):
            if spent >= kills:
                break
            moment = draw.uniform(0, PART * seconds)
            if not _kill(home, study, workers, moment):
                break
            spent += 1
            one.kills.append(f"{moment:.2f} s ({len(_records(home))} finished)")
        one.restarts = len(one.kills)
        _finish(home, study, workers)
        found = study_outcome(home)
        one.different = sorted(key for key in {*expected, *found} if expected.get(key) != found.get(key))
        done.append(one)
        print(_row(one), file=sys.stderr, flush=True)
    return done, seconds, spent


def study_outcome(home: Path) -> dict[str, str]:
    """Return a hash of everything of a study that must not depend on interruptions, by run and part.

    Args:
        home: folder that holds ``runs/``, ``cache/`` and the kept records.
    """
    kept = home / RESULTS / NAME
    found = {}
    for path in _records(home):
        record = read_json(path)
        found[record["cell"]] = fingerprint(
            [outcome(home, f"{NAME}/{record['cell']}"), record["key"], record["outcomes"]]
        )
    table = read_json(kept / "table.json")
    found["table"] = fingerprint(_without_time(table["comparison"]))
    found["runs"] = fingerprint(sorted((run["cell"], run["status"]) for run in table["runs"]))
    found["failed"] = fingerprint([path.name for path in kept.glob("failed/*.json")])
    return found


def _without_time(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_time(item) for key, item in value.items() if key not in VARYING}
    return [_without_time(item) for item in value] if isinstance(value, list) else value


def _records(home: Path) -> list[Path]:
    reserved = {"study.json", "table.json", "owner.json"}
    return [path for path in sorted((home / RESULTS / NAME).glob("*.json")) if path.name not in reserved]


def _kill(home: Path, study: Path, workers: int, moment: float) -> bool:
    """Start the command and kill it after ``moment`` seconds; return whether it was still alive."""
    running = _start(home, study, workers)
    deadline = time.monotonic() + moment
    while running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    running.kill()
    code = running.wait()
    if code == -signal.SIGKILL:
        return True
    if code:
        raise SeawallError(f"Expected the study to go on, but it left with {code}:\n{_log(home)}")
    return False


def _finish(home: Path, study: Path, workers: int) -> None:
    code = _start(home, study, workers).wait()
    if code:
        raise SeawallError(f"Expected the study to end, but it left with {code}:\n{_log(home)}")


def _start(home: Path, study: Path, workers: int) -> Running:
    """Start the command line in a copy of this process, which has imported everything already."""
    home.mkdir(parents=True, exist_ok=True)
    pid = os.fork()
    if pid:
        return Running(pid)
    code = 1
    try:
        with (home / "log.txt").open("ab") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        os.chdir(home)
        os.environ["SEAWALL_CACHE"] = str(home / "cache")
        from experiments import cli

        code = cli.main(["compare", str(study), "--results", RESULTS, "--workers", str(workers)])
    finally:
        os._exit(code)


def _write_study(folder: Path, runs: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    model, study = folder / "model", folder / f"{NAME}.yaml"
    study.write_text(STUDY.format(name=NAME, model=model, seeds=json.dumps(list(range(runs // 2)))), encoding="utf-8")
    if pid := os.fork():
        os.waitpid(pid, 0)  # made in a copy: this process must not start threads before it copies itself
        return study
    from experiments.contract.tiny import make_model, make_tokenizer

    make_model().save_pretrained(model)
    make_tokenizer().save_pretrained(model)
    os._exit(0)


def _log(home: Path) -> str:
    return (home / "log.txt").read_text(encoding="utf-8", errors="replace")[-3000:]


def _row(one: KilledStudy) -> str:
    verdict = "yes" if one.is_identical else f"NO ({', '.join(one.different)})"
    return f"| {one.number} | {len(one.kills)} | {', '.join(one.kills)} | {verdict} |"


def kill_table(done: Sequence[KilledStudy], spent: int) -> str:
    """Return the studies as a markdown table."""
    head = "| study | kills | killed after | identical |\n| --- | --- | --- | --- |\n"
    same = sum(one.is_identical for one in done)
    text = head + "\n".join(_row(one) for one in done)
    return f"{text}\n\n{spent} kills; {same} of {len(done)} studies ended as the undisturbed one.\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0 when every study ended as the undisturbed one."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--runs", type=int, default=12, help="of the study, an even number")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="write <output>.json and <output>.md")
    given = parser.parse_args(arguments)
    _import_all()
    with tempfile.TemporaryDirectory(prefix="seawall-study-kills-") as folder:
        done, seconds, spent = run_kills(
            Path(folder), kills=given.kills, runs=given.runs, seed=given.seed, workers=given.workers
        )
    table = kill_table(done, spent)
    print(table)
    if given.output:
        record = {
            "python": platform.python_version(),
            "kills": spent,
            "runs": given.runs,
            "workers": given.workers,
            "seed": given.seed,
            "undisturbed_seconds": seconds,
            "studies": [{**asdict(one), "identical": one.is_identical} for one in done],
        }
        write_json(given.output.with_suffix(".json"), record)
        write_atomic(given.output.with_suffix(".md"), f"# Studies killed and started again\n\n{table}")
    return 0 if all(one.is_identical for one in done) else 1


def _import_all() -> None:
    """Import what a study imports, so that the copies need not."""
    import importlib

    for name in ("experiments.cli", "experiments.compare", "experiments.contract.tiny", "experiments.commands.compare"):
        importlib.import_module(name)


if __name__ == "__main__":
    sys.exit(main())
