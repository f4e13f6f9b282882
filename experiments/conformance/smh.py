"""Self-Mined Hardness derived again: the majority, which prompts are chosen in which order, and the strict mixture.

The reference judges each rollout by three judges, drops prompts that never or always broke the model, sorts the others
by their harmful rate, trains on the first half one after the other, and alternates harmful and harmless rows. Every arm
teaches a prompt the same reply, drawn once.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from datamodules.finetune import FineTuneDataModule
from datamodules.mining.judging import judge_rollouts
from experiments.conformance_table import Deviation
from experiments.contract.tiny import TinyModel, make_tokenizer, task_examples
from framework.chat import ChatEncoder
from framework.evaluation.judges import Judge, Verdict
from framework.examples import Example, Prompt
from framework.files import ArtifactStore
from framework.method import MethodStore
from framework.quiet import quiet_bars
from methods.smh import SMH, SMHConfig

__all__ = ["chosen_order", "deviations", "mixture"]

PAPER = "arXiv:2605.03226; code prakharg55/jailbreak-ICML"
ROLLOUTS = 64
PROMPTS = 41
BATCH, STEPS = 4, 15
SEEDS = (0, 1, 7)
RATIOS = ((1, 1), (1, 0), (2, 1), (1, 3))
"""Harmful to harmless rows."""


class Line(NamedTuple):
    """A prompt as the derivation sees it."""

    name: str
    harmful: int


def chosen_order(lines: Sequence[Line]) -> list[str]:
    """Return the first half of the prompts that broke the model sometimes, by falling harmful rate."""
    eligible = [line for line in lines if 0 < line.harmful < ROLLOUTS]
    return [line.name for line in sorted(eligible, key=lambda line: line.harmful, reverse=True)][
        : (len(eligible) + 1) // 2
    ]


def mixture(num_harmful: int, *, harmful: int, benign: int) -> str:
    """Return the kinds of one pass by counting: a harmless row stands where the harmless ones would fall behind.

    Args:
        num_harmful: harmful rows of the pass.
        harmful: parts of the ratio.
        benign: parts of the ratio.
    """
    num_benign = round(num_harmful * benign / harmful)
    total, kinds = num_harmful + num_benign, ""
    for place in range(1, total + 1):
        # Whole numbers: after `place` rows the harmless ones are place * num_benign / total, rounded down.
        kinds += "b" if kinds.count("b") < place * num_benign // total else "h"
    return kinds


def deviations(folder: Path) -> Iterator[Deviation]:
    """Yield mismatches in the majority, the choice and its order, the mixture, the targets, and the steps."""
    draw = random.Random(5)
    counts = [0, ROLLOUTS, *draw.sample(range(1, ROLLOUTS), PROMPTS - 2)]
    draw.shuffle(counts)
    lines = [Line(f"harmful-{i}", count) for i, count in enumerate(counts)]
    path = folder / "mined.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in _file_lines(lines)), encoding="utf-8")
    with quiet_bars():
        TinyModel().build().save_pretrained(folder / "start")
    store = MethodStore(ArtifactStore(folder / "store"), models={"start": folder / "start"})
    wrong_choice = wrong_mixture = wrong_targets = wrong_steps = 0
    cases = [(parts, seed) for parts in RATIOS for seed in SEEDS]
    for (harmful, benign), seed in cases:
        arms = [_rows(path, store, seed, ratio=benign / harmful, select=arm) for arm in ("hard", "random")]
        (rows, data), (others, _) = arms
        order = [row.id.removeprefix("smh-safety-") for row in rows if row.kind == "safety"]
        expected = chosen_order(lines)
        wrong_choice += _mismatches(order, expected)
        kinds = "".join("h" if row.kind == "safety" else "b" for row in rows)
        wrong_mixture += _mismatches(kinds, mixture(len(expected), harmful=harmful, benign=benign))
        taught = {row.id: (row.reply, row.is_complete) for row in others if row.kind == "safety"}
        wrong_targets += sum(
            taught.get(row.id, (row.reply, row.is_complete)) != (row.reply, row.is_complete) for row in rows
        )
        served = [batch.example_ids.tolist() for batch in data.train_dataloader()]
        stream = [place % len(rows) for place in range(BATCH * STEPS)]
        wrong_steps += _mismatches(served, [stream[i : i + BATCH] for i in range(0, len(stream), BATCH)])
    yield Deviation("harmful by at least 2 of 3 judges", PAPER, _majority_mismatches(), 0, 8)
    yield Deviation("hard half of the eligible prompts, in order", PAPER, wrong_choice, 0, len(cases))
    yield Deviation("strict mixture of harmful and harmless rows", PAPER, wrong_mixture, 0, len(cases))
    yield Deviation("one target a prompt for every arm", PAPER, wrong_targets, 0, len(cases))
    yield Deviation("rows of every optimizer step, in order", PAPER, wrong_steps, 0, len(cases))


def _file_lines(lines: Sequence[Line]) -> Iterator[dict[str, Any]]:
    for line in lines:
        safe = ROLLOUTS - line.harmful
        targets = [[i, f"No, {i}, not {line.name}.", i % 3 > 0] for i in range(min(safe, 5))]
        counts = [line.harmful, safe, ROLLOUTS]
        yield {"id": line.name, "kind": "harmful", "prompt": line.name, "counts": counts, "targets": targets}
    for i in range(3 * PROMPTS):
        yield {
            "id": f"benign-{i}",
            "kind": "benign",
            "prompt": f"benign {i}",
            "counts": [0, 4, 4],
            "targets": [[0, f"Yes, {i}.", True]],
        }


def _rows(
    path: Path, store: MethodStore, seed: int, *, ratio: float, select: Any
) -> tuple[list[Example], FineTuneDataModule]:
    encoder = ChatEncoder(make_tokenizer())
    data = FineTuneDataModule(encoder, batch_size=BATCH, total_steps=STEPS, max_length=200, seed=seed)
    data.add_source("task", task_examples(4))
    method = SMH(SMHConfig(mined=str(path), select=select, ratio=ratio, other_rows="leave_out"))
    method.prepare(TinyModel().build(), data, store)
    method.configure_data(data)
    return data.rows, data


class _Fixed(Judge):
    """Says the same of everything."""

    def __init__(self, name: str, *, is_harmful: bool) -> None:
        self.name = name  # type: ignore[misc]
        self.verdict = Verdict(harmful=float(is_harmful))

    def judge(self, pairs: Sequence[tuple[Prompt, str]]) -> list[Verdict]:
        return [self.verdict for _ in pairs]


def _majority_mismatches() -> int:
    wrong = 0
    for votes in itertools.product((True, False), repeat=3):
        judges = [_Fixed(f"judge {i}", is_harmful=vote) for i, vote in enumerate(votes)]
        (found,) = judge_rollouts(judges, [(Prompt("p", "request", "harmful"), "reply")])
        wrong += found.harmful is not (sum(votes) >= 2)
    return wrong


def _mismatches(found: Sequence[object], expected: Sequence[object]) -> int:
    return abs(len(found) - len(expected)) + sum(a != b for a, b in zip(found, expected, strict=False))
