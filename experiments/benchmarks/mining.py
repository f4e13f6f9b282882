"""Rollouts per second: the refilled batch against one ``generate`` call a prompt, and against one rollout at a time.

Run: ``python -m experiments.benchmarks.mining [--model NAME] [--prompts 8] [--rollouts 16] [--tokens 64]``. The three
ways take turns on the same prompts with the same model, K and limit, sampling at temperature 1. One rollout at a time
is slow, so it makes ``--single`` rollouts of each prompt; rates are rollouts a second of wall time, the best of the
rounds. Processor seconds stand beside them: on a shared machine they are the steadier of the two.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from datamodules.mining.engine import RolloutJob, RolloutLimits, make_rollouts
from datamodules.mining.pool import harmful_pool
from experiments.run import environment, set_threads
from framework.chat import ChatEncoder
from framework.files import write_json
from framework.models import ModelSpec, load_model

Prompts = Mapping[str, Sequence[int]]


def refilled(model: Any, prompts: Prompts, limits: RolloutLimits, rollouts: int) -> list[int]:
    """Return the lengths of the rollouts made by the engine."""
    jobs = [RolloutJob(name, number) for name in prompts for number in range(rollouts)][::-1]
    return [len(r.ids) for r in make_rollouts(model, prompts, lambda: jobs.pop() if jobs else None, limits)]


def generated(model: Any, prompts: Prompts, limits: RolloutLimits, rollouts: int) -> list[int]:
    """Return the lengths of the rollouts made by one ``generate`` call a prompt, with ``rollouts`` sequences each."""
    lengths = []
    for number, ids in enumerate(prompts.values()):
        torch.manual_seed(limits.seed + number)
        found = model.generate(
            torch.tensor([list(ids)], device=model.device),
            attention_mask=torch.ones((1, len(ids)), dtype=torch.long, device=model.device),
            do_sample=True,
            temperature=limits.temperature,
            top_k=0,
            top_p=1.0,
            num_return_sequences=rollouts,
            max_new_tokens=limits.max_new_tokens,
            eos_token_id=list(limits.stop_ids),
            pad_token_id=0,
        )
        for row in found[:, len(ids) :].tolist():
            ends = [place for place, token in enumerate(row) if token in limits.stop_ids]
            lengths.append(ends[0] + 1 if ends else len(row))
    return lengths


def one_by_one(model: Any, prompts: Prompts, limits: RolloutLimits, rollouts: int) -> list[int]:
    """Return the lengths of the rollouts made by one ``generate`` call each."""
    lengths: list[int] = []
    for turn in range(rollouts):
        lengths += generated(model, prompts, limits._replace(seed=limits.seed + 1000 * (turn + 1)), 1)
    return lengths


def main() -> None:
    """Print rollouts per second of the three ways and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=ModelSpec().name)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--rollouts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--single", type=int, default=2, help="rollouts a prompt, one at a time")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    set_threads(given.threads)
    loaded = load_model(ModelSpec(name=given.model))
    if torch.cuda.is_available():
        loaded.model.to("cuda")  # type: ignore[arg-type]
    encoder = ChatEncoder(loaded.tokenizer, system="")
    pool = harmful_pool(["embedded"], count=given.prompts, wrapped=1.0, seed=0)
    prompts = {prompt.id: encoder.encode_prompt(prompt.messages) for prompt in pool}
    limits = RolloutLimits(tuple(encoder.stop_ids), given.tokens, 1.0, 0, given.rows)
    ways: dict[str, tuple[Callable[[], list[int]], int]] = {
        "refilled batch": (lambda: refilled(loaded.model, prompts, limits, given.rollouts), given.rollouts),
        "generate per prompt": (lambda: generated(loaded.model, prompts, limits, given.rollouts), given.rollouts),
        "one at a time": (lambda: one_by_one(loaded.model, prompts, limits, given.single), given.single),
    }
    found = measure(ways, given.rounds)
    best = {name: max(one["rollouts_per_second"] for one in rounds) for name, rounds in found.items()}
    ours = best["refilled batch"]
    ratios = {name: ours / best[name] for name in ("generate per prompt", "one at a time")}
    for name, ratio in ratios.items():
        print(f"refilled batch against {name}: {ratio:.2f}x")
    if given.output:
        settings = {name: str(value) for name, value in vars(given).items()}
        write_json(
            given.output, {"settings": settings, "rounds": found, "ratios": ratios, "environment": environment()}
        )


def measure(ways: Mapping[str, tuple[Callable[[], list[int]], int]], rounds: int) -> dict[str, list[dict[str, float]]]:
    """Return the figures of every round, the ways taking turns."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for number in range(rounds):
        for name, (make, _) in ways.items():
            wall, cpu = time.perf_counter(), time.process_time()
            with torch.inference_mode():
                lengths = make()
            seconds, spent = time.perf_counter() - wall, time.process_time() - cpu
            figures = {
                "rollouts": float(len(lengths)),
                "mean_tokens": sum(lengths) / len(lengths),
                "seconds": seconds,
                "rollouts_per_second": len(lengths) / seconds,
                "rollouts_per_cpu_second": len(lengths) / spent,
            }
            found[name].append(figures)
            print(
                f"round {number + 1} {name}: {figures['rollouts_per_second']:.2f} rollouts/s "
                f"({figures['rollouts_per_cpu_second']:.2f} a processor second; {len(lengths)} of "
                f"{figures['mean_tokens']:.1f} tokens)",
                flush=True,
            )
    return found


if __name__ == "__main__":
    main()
