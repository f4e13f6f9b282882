"""Batched evaluation against prompt-by-prompt generation, alternating in one process.

Run: ``python -m experiments.benchmarks.generation [--prompts 48] [--tokens 32] [--batch 48]``.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from datamodules.embedded_sets import load_harmful
from experiments.run import environment, set_threads
from framework.chat import ChatEncoder
from framework.evaluation.generation import generate_replies
from framework.files import write_json
from framework.models import ModelSpec, load_model


def main() -> None:
    """Print tokens per second of both ways and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    set_threads(None)
    loaded = load_model(ModelSpec())
    encoder = ChatEncoder(loaded.tokenizer, system="")
    prompts = load_harmful("test")[: arguments.prompts]
    seconds: dict[str, list[float]] = {"batched": [], "one by one": []}
    texts = {}
    for number in range(arguments.rounds):
        for name, batch in (("batched", arguments.batch), ("one by one", 1)):
            started = time.perf_counter()
            replies = generate_replies(
                loaded.model, encoder, prompts, max_new_tokens=arguments.tokens, batch_size=batch
            )
            seconds[name].append(time.perf_counter() - started)
            tokens = sum(reply.num_tokens for reply in replies)
            texts[name] = [reply.text for reply in replies]
            print(f"round {number + 1} {name}: {tokens / seconds[name][-1]:.1f} tokens/s ({seconds[name][-1]:.1f} s)")
    ratio = min(seconds["one by one"]) / min(seconds["batched"])
    same = sum(a == b for a, b in zip(texts["batched"], texts["one by one"], strict=True))
    print(f"ratio {ratio:.2f}; identical replies {same}/{len(prompts)}")
    if arguments.output:
        write_json(
            arguments.output,
            {"seconds": seconds, "ratio": ratio, "identical_replies": same, "environment": environment()},
        )


if __name__ == "__main__":
    main()
