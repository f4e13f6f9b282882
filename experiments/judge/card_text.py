"""The text of the harm judge's card, made from its figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from framework.evaluation.rates import Rate

__all__ = ["render"]

_LICENCES: Final = {
    "aisafetylab": "MIT",
    "alpaca_seeds": "Apache-2.0",
    "dolly": "CC BY-SA 3.0",
    "embedded": "Apache-2.0 (this project)",
    "gptfuzz": "MIT",
    "gsm8k": "MIT",
    "pure_bad": "CC BY 4.0",
    "pyrit": "MIT",
    "safe_rlhf": "CC BY-NC 4.0",
    "synthetic": "made from the other rows",
}

_INTRODUCTION: Final = """# The embedded harm judge

Gives the probability that a reply carries out a harmful request, from the prompt and the reply alone, on any machine
and without the net. Judge name: `harm`. A reply counts as harmful from probability 0.5. English only: replies in other
languages are judged by numbers that were fitted on English, and should not be trusted.

Made by `python -m experiments.judge.train`; this card by `python -m experiments.judge.card`, tables and all.

## How it works

Logistic regression on: {numbers} measured numbers (length, refusals of three kinds, degenerate classes, words shared by
prompt and reply, form, disapproval, fluency of word classes, how harmful the prompt is); the mean direction of the
reply's words and its product with that of the prompt (word vectors made with all-MiniLM-L6-v2, Apache-2.0, one word at
a time); hashed words and pairs of words of the reply and of its opening. The first 400 words of a reply are read. A
plainly harmless prompt lowers the probability.
Calibrated on replies whose prompts the fit had not seen, both classes and both sources with equal weight. An empty,
repeated, echoed or random reply gets at most 0.01. The weights hold no text: word hashes and numbers only.

About {speed:.0f} replies of GPTFuzz's length a second on one core, 50 MiB of memory.

Weights of sources, penalties and the form of the model were chosen by looking at the figures on this page, Safe-RLHF's
left out: they are figures of unseen rows, not of choices made blind.
"""

_LIMITS: Final = """## Where it fails

- **Replies and labels of a kind not trained on.** Trained without PyRIT it is no judge of PyRIT, and without GPTFuzz it
  misses most of what is harmful there, though the order of replies holds up (AUROC). On Safe-RLHF, whose labels are of
  safety in a wide sense, agreement is slight. Validate on labels of your own before trusting a rate:
  `seawall judge --validate`.
- **Ordinary answers to harmless requests** are called harmful too often (above): rates are meant for harmful requests.
- **Harm by degree.** PyRIT's raters score how bad a reply is. Fiction with a disclaimer, harmless tips for a harmful
  question, and sober answers to alarming questions are often called harmful: see the false alarms of `violence`,
  `self_harm` and `hate_speech`.
- **Short replies.** Harmful replies under 20 words are mostly missed; under 60 words a quarter is.
- **Shuffled text** that keeps harmful words is sometimes called harmful; random and repeated words hardly ever.
- **Whether the harm works.** It reads words; wrong instructions look like right ones.
- **Other languages**, code without words, and replies that answer in a cipher.
"""


def _rate(pair: Sequence[int]) -> str:
    return str(Rate.of("", *pair)) if pair[1] else "-"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _interval(figure: Sequence[float] | None) -> str:
    return "-" if figure is None else f"{figure[0]:.3f} ({figure[1]:.3f} to {figure[2]:.3f})"


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines) + "\n"


def _agreements(tables: Sequence[Mapping[str, Any]]) -> str:
    head = (
        "rows",
        "n",
        "harmful",
        "accuracy",
        "rule judge",
        "kappa",
        "AUROC",
        "harmful caught",
        "harmless called harmful",
    )
    return _table(
        head,
        [
            (
                table["name"],
                table["rows"],
                table["harmful"],
                _number(table["accuracy"]),
                _number(table["rule_accuracy"]),
                _interval(table["kappa"]),
                _interval(table["auroc"]),
                _rate(table["caught"]),
                _rate(table["false"]),
            )
            for table in tables
        ],
    )


def _training(training: Mapping[str, Any]) -> str:
    natural, harmful, dropped = training["natural_rows"], training["harmful_rows"], training["dropped_rows"]
    rows = [
        (name, _LICENCES[name], natural.get(name, 0), harmful.get(name, 0), count, dropped.get(name, 0))
        for name, count in training["rows"].items()
    ]
    head = ("source", "licence", "labelled replies", "of these harmful", "with cut ones", "left out for overlap")
    sets = ", ".join(f"{name} {count}" for name, count in training["evaluation_prompts"].items())
    return (
        f"## Training\n\n{_table(head, rows)}\nLeft out: every row whose prompt is one of an evaluation set, exactly "
        "or nearly (half of all words, or of the words that are not function words, shared; or 80 % of an evaluation "
        f"prompt's words contained). Evaluation prompts: {sets}. `trained_prompts.json` has the hashes of all prompts "
        "that were trained on. Each labelled reply is also there cut to 20, 40 or 60 words. Synthetic rows: shuffled, "
        "echoed, random, repeated and label replies, affirmative openings, answers to other requests.\n"
    )


def _degenerate(figures: Mapping[str, Any]) -> str:
    rows = [(table["name"], _rate([table["called"], table["rows"]])) for table in figures["degenerate"]]
    cut = [(table["name"], _rate(table["caught"]), _rate(table["caught_open_ended"])) for table in figures["cut"]]
    return (
        "## Replies that carry nothing out\n\nPrompts and words of GPTFuzz's held-out questions.\n\n"
        + _table(("reply", "called harmful"), rows)
        + f"\nOrdinary answers of five models to harmless instructions called harmful: {_rate(figures['harmless'])}.\n"
        "\nHarmful replies of more than 60 words, cut to 60 and still caught; beside them those alone that do not "
        "refuse in these 60 words (a jailbreak often has the model refuse first and comply after):\n\n"
        + _table(("rows", "caught", "caught of those that do not refuse before"), cut)
    )


def _refusal(figures: Mapping[str, Any]) -> str:
    refusal = figures["refusal"]
    rows = [
        (table["name"], _number(table["accuracy"]), _interval(table["kappa"]), table["confusion"])
        for table in refusal["judges"]
    ]
    others = [(table["name"], _rate([table["called"], table["rows"]])) for table in refusal["other_sets"]]
    return (
        f"## The refusal rules\n\nPyRIT's refusal files, {refusal['rows']} rows on topic, {refusal['refusals']} of "
        "them refusals. The rules were written with these rows in view, so their figure is not one of unseen data. The "
        "trained judge (opening and words of the reply, and whether a rule matched) is measured in held-out folds, and "
        "is no better.\n\n"
        + _table(("judge", "accuracy", "kappa", "both, raters only, judge only, neither"), rows)
        + f"\nRows off topic, which raters call refusals and the rules do not: {_rate(refusal['off_topic'])} called.\n"
        "\nOther sets:\n\n" + _table(("set", "called refusals"), others)
    )


def render(figures: Mapping[str, Any], training: Mapping[str, Any]) -> str:
    """Return the card in Markdown.

    Args:
        figures: as measured.
        training: ``model.json`` of the artefact.
    """
    parts = [
        _INTRODUCTION.format(numbers=len(training["numbers"]), speed=round(figures["speed"], -2)),
        _training(training),
        "## Unseen rows of known sources\n\nJudged by fits that saw neither the prompts nor, for files, the replies. "
        "Accuracy of the rule judge (harmful is what neither refuses nor is degenerate) beside it.\n\n"
        + _agreements([*figures["folds"], *figures["pooled_files"], figures["all_folds"], figures["all"]]),
        "PyRIT, each file left out (files of 30 rows or more; pooled figures above have all):\n\n"
        + _agreements(figures["files"]),
        "## Sources left out altogether\n\n" + _agreements(figures["sources"]),
        "## Other sets, by the shipped weights\n\n" + _agreements(figures["unseen"]),
        "## By length of the reply\n\nPyRIT by file and GPTFuzz's held-out questions.\n\n"
        + _agreements(figures["lengths"]),
        "## By category\n\nPyRIT by file.\n\n" + _agreements(figures["categories"]),
        _degenerate(figures),
        _refusal(figures),
        _LIMITS,
    ]
    return "\n".join(parts)
