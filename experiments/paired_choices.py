"""Multiple choice, question by question: ``python -m experiments.paired_choices A=MODEL B=MODEL … --choices FILE``.

Two accuracies of like size hide how many questions changed sides. Every model answers the same questions; each
candidate is compared with the baseline by the paired bootstrap interval of the difference and the exact McNemar test.
The first model is the baseline; models are names or folders. Prints the table and writes it as JSON to ``--output``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.measure import choice_items
from experiments.statistics import compare_pair, holm
from framework.chat import ChatEncoder
from framework.errors import ConfigError, SeawallError
from framework.evaluation.likelihood import ChoiceItem, score_choices
from framework.files import to_plain, write_json
from framework.models import ModelSpec, find_model, load_model, model_fingerprint

__all__ = ["compare_choices", "right_answers"]

PAIRED = ("difference", "low", "high", "only_baseline", "only_candidate")
"""What is kept of a comparison; questions are asked once, so it says nothing of seeds."""


def right_answers(model: str, items: Sequence[ChoiceItem], *, system: str | None, batch_size: int = 16) -> list[int]:
    """Return 1 for every item the model gets right, else 0, in their order.

    Args:
        model: name or folder.
        items: at least one.
        system: system message; None keeps the template's own.
        batch_size: items computed together.

    Raises:
        ModelError: there is no such model.
        DataError: an item does not fit the model's context.
    """
    loaded = load_model(ModelSpec(model))
    encoder = ChatEncoder(loaded.tokenizer, system=system)
    found = score_choices(loaded.model, encoder, items, batch_size=batch_size)
    return [int(item.answer == guess) for item, guess in zip(items, found.predictions, strict=True)]


def compare_choices(outcomes: dict[str, list[int]], *, baseline: str) -> dict[str, Any]:
    """Return each model's rate and how it differs from the baseline.

    Args:
        outcomes: model to its right (1) and wrong (0) answers, all to the same questions.
        baseline: one of the models.

    Raises:
        ConfigError: fewer than two models.
        DataError: the models answered different numbers of questions.
    """
    _check_several(list(outcomes))
    pairs = {
        name: compare_pair(outcomes[baseline], right, with_hierarchical=False)
        for name, right in outcomes.items()
        if name != baseline
    }
    corrected = dict(zip(pairs, holm([pair.mcnemar_p for pair in pairs.values()]), strict=True))
    rows = []
    for name, right in outcomes.items():
        row: dict[str, Any] = {"model": name, "right": sum(right), "questions": len(right)}
        if name in pairs:
            row |= {key: getattr(pairs[name], key) for key in PAIRED} | {"p_holm": corrected[name]}
        rows.append(row)
    return {"baseline": baseline, "rows": rows}


def _check_several(labels: Sequence[str]) -> None:
    if len(labels) < 2:
        raise ConfigError(f"Expected a baseline and at least one other model, but got {', '.join(labels)}.")


def _line(row: dict[str, Any]) -> str:
    text = f"{row['model']}: {row['right']}/{row['questions']} ({row['right'] / row['questions']:.1%})"
    if "difference" in row:
        text += (
            f", {100 * row['difference']:+.1f} points ({100 * row['low']:+.1f} to {100 * row['high']:+.1f}), right "
            f"only there {row['only_candidate']}, only in the baseline {row['only_baseline']}, "
            f"p (Holm) {row['p_holm']:.3g}"
        )
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Score, compare, print and keep; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m experiments.paired_choices", description=__doc__)
    parser.add_argument("models", nargs="+", metavar="LABEL=MODEL", help="the first one is the baseline")
    parser.add_argument("--choices", required=True, help="file or folder in the layout of MMLU or BBH")
    parser.add_argument("--system", help="system message (default: the template's own)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the figures here")
    arguments = parser.parse_args(argv)
    named = [text.partition("=") if "=" in text else (text, "=", text) for text in arguments.models]
    try:
        if len({label for label, _, _ in named}) < len(named):
            raise ConfigError(f"Expected every model under a label of its own, but got {arguments.models}.")
        _check_several([label for label, _, _ in named])
        items = choice_items(arguments.choices)
        # All of them before the first is scored, which takes long.
        hashes = {label: model_fingerprint(find_model(ModelSpec(model)).folder) for label, _, model in named}
        outcomes = {label: right_answers(model, items, system=arguments.system) for label, _, model in named}
        asked = {"choices": arguments.choices, "system": arguments.system, "fingerprints": hashes}
        found = {**asked, **compare_choices(outcomes, baseline=named[0][0])}
    except SeawallError as error:
        print(f"seawall: {error}", file=sys.stderr)
        return error.exit_code
    print("\n".join(_line(row) for row in found["rows"]))
    if arguments.output:
        write_json(arguments.output, to_plain(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
