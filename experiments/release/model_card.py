"""The model card of a bundle: ``release.json`` in words, for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.console import format_count, format_mean, format_rate, format_seconds
from experiments.release.attacks import BY_HAND, MEASURED, OWN, UNCOMPARED

__all__ = ["model_card"]

HEADLINES = (
    ("harmful_rate", "harmful replies to harmful requests (harm judge)"),
    ("attack_success", "harmful requests answered (not refused and not degenerate)"),
    ("keyword_attack_success", "harmful requests answered without a refusal phrase"),
    ("refusal_rate", "harmful requests refused"),
    ("degenerate_rate", "harmful requests with a degenerate reply"),
    ("over_refusal", "harmless look-alikes refused"),
    ("task_accuracy", "accuracy on the task"),
)
MEANS = (("benign_nll", "loss on harmless replies, nats per token"), ("refusal_margin", "refusal margin, nats"))
_NO_ATTACK = (
    "**No attack was tried on this model.** The numbers above are about harmful requests asked directly. They say "
    "nothing about prompts made to get around refusals, nor about what fine-tuning or editing the weights undoes."
)
_ORIGINS = {
    OWN: "the released run",
    MEASURED: "`seawall attack` on these weights",
    UNCOMPARED: "`seawall attack`; whether on these weights was not compared",
    BY_HAND: "a list written by hand",
}
_LIMITS = (
    "The numbers hold for the prompts of the named sets and for greedy replies; other prompts, languages, system "
    "messages and sampling give others.",
    "Whoever has the weights can fine-tune or edit them. Nothing here keeps refusals in place against that, unless an "
    "attack of that kind stands in the table of attacks, and then only up to its budget.",
    "Judges err: rules see how a reply is put, not what it leads to; a trained judge knows what it was trained on.",
    "The intervals are about chance in the choice of prompts (Wilson, 95 %), not about a wrong judge or a shifted use.",
)


def model_card(facts: Mapping[str, Any]) -> str:
    """Return the content of ``README.md``.

    Args:
        facts: content of ``release.json``.
    """
    parts = [
        _front_matter(facts),
        _opening(facts),
        _safety(facts),
        _judges(facts),
        _attacks(facts["attacks"]),
        _overlap(facts["overlap"]),
        "## Limits\n\n" + "\n".join(f"- {limit}" for limit in _LIMITS),
        _data(facts),
        _cost(facts),
        _verification(facts),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _front_matter(facts: Mapping[str, Any]) -> str:
    library = "peft" if facts["content"] == "adapter" else "transformers"
    return f"---\nlibrary_name: {library}\npipeline_tag: text-generation\ntags:\n- safety\n---"


def _opening(facts: Mapping[str, Any]) -> str:
    stages, base = ", then ".join(facts["stages"]) or "no training", facts["base_model"]["name"]
    methods = {name for stage in facts["methods"].values() for name in stage}
    said = f" with {', '.join(sorted(methods))}" if methods else ""
    lines = [f"# {facts['name']}", f"Made from `{base}` by {stages}{said}; the measured model is called "
             f"*{facts['label']}* in its results."]  # fmt: skip
    if not facts.get("is_model_checked", True):
        lines.append(
            "**Not checked:** whether these weights are the measured ones. The run was made by a version that did not "
            "record it."
        )
    if facts["content"] == "adapter":
        lines.append(
            f"This bundle holds an adapter. Load `{base}` with transformers (fingerprint "
            f'`{facts["base_model"]["fingerprint"]}`), then `PeftModel.from_pretrained(model, "adapter")`.'
        )
    else:
        lines.append(
            'Load it with `AutoModelForCausalLM.from_pretrained("model")` of transformers; nothing else is needed.'
        )
    until = f"valid until {facts['expires']}" if facts["expires"] else "without an end of validity"
    lines.append(f"Released {facts['created']}, {until}.")
    return "\n\n".join(lines)


def _safety(facts: Mapping[str, Any]) -> str:
    metrics = facts["metrics"]
    rows = [[text, format_rate(metrics[key])] for key, text in HEADLINES if key in metrics]
    rows += [[text, format_mean(metrics[key])] for key, text in MEANS if key in metrics]
    sets = [
        [key, format_rate(metrics[key])]
        for key in metrics
        if "/" in key and isinstance(metrics[key], Mapping) and "denominator" in metrics[key] and "low" in metrics[key]
    ]
    text = f"## Safety and use\n\nRate, count and 95 % interval.\n\n{_table(['what', 'rate'], rows)}"
    if sets:
        text += f"\n\nBy set and judge:\n\n{_table(['set and rate', 'rate'], sets)}"
    excluded = facts["overlap"]["excluded"]
    if excluded:
        text += f"\n\n{len(excluded)} prompts that stood in the training data were left out of every rate above."
    return text


def _judges(facts: Mapping[str, Any]) -> str:
    names = ", ".join(f"`{name}`" for name in facts["judges"])
    said = "The first that knows decides. Every judge's verdict on every reply is in `samples.jsonl`."
    return f"## Judges\n\n{names}. {said}"


def _attacks(attacks: Sequence[Mapping[str, Any]]) -> str:
    if not attacks:
        return f"## Attack budget\n\n{_NO_ATTACK}"
    rows = []
    for attack in attacks:
        rates = attack["metrics"] or {"": None}
        for key, rate in rates.items():
            source = _ORIGINS.get(attack.get("origin", ""), "not recorded")
            cost = _pairs(attack["cost"])
            rows.append([attack["name"], _pairs(attack["budget"]), cost, key, format_rate(rate), source])
    table = _table(["attack", "budget", "cost", "rate", "result", "from"], rows)
    return f"## Attack budget\n\nWhat was tried, and no more than that:\n\n{table}"


def _overlap(overlap: Mapping[str, Any]) -> str:
    exact, near = len(overlap["exact"]), len(overlap["near"])
    text = (
        f"## Measured prompts in the training data\n\nOf {overlap['num_prompts']} measured prompts, compared with "
        f"{overlap['num_training_prompts']} different training prompts, {exact} are the same and {near} more share "
        f"most of their words. {len(overlap['excluded'])} of them were left out of the numbers."
    )
    return text + "".join(f"\n\nNot covered: {sentence}." for sentence in overlap["unknown"])


def _data(facts: Mapping[str, Any]) -> str:
    if not facts["data"]:
        return "## Data\n\nNothing was trained on."
    rows = [
        [row["stage"], row["role"], row["source"], "all" if row["rows"] is None else str(row["rows"]),
         f"`{row['sha256'][:16]}`" if row["sha256"] else "not recorded"]
        for row in facts["data"]
    ]  # fmt: skip
    return f"## Data\n\n{_table(['stage', 'role', 'source', 'rows', 'hash of the content'], rows)}"


def _cost(facts: Mapping[str, Any]) -> str:
    rows = [
        [row["stage"], str(row["steps"] or ""), format_seconds(row["seconds"]), format_count(row["flops"]),
         f"{row['peak_host_memory_mib'] / 1024:.2f} GiB" if row["peak_host_memory_mib"] else "",
         "taken from an earlier run" if row["reused"] else ""]
        for row in facts["training"]
    ]  # fmt: skip
    head = ["stage", "steps", "wall time", "floating-point operations", "peak host memory", ""]
    machine = ", ".join(facts["environment"].get("devices") or [str(facts["environment"].get("cpu", "unknown"))])
    return f"## Cost\n\n{_table(head, rows)}\n\nMachine: {machine}."


def _verification(facts: Mapping[str, Any]) -> str:
    pictures = facts.get("num_with_image", 0)
    text = (
        "## Verification\n\n`manifest.json` lists every file with its SHA-256, `signature.json` is the Ed25519 "
        "signature over the manifest's bytes. `seawall verify BUNDLE --key PUBLIC.pem` checks both and makes a random "
        "sample of the replies again. Take the public key from its owner, not from where the bundle lay. The signature "
        "says who vouches for these files and that they are unchanged; it does not say that the model is safe.\n\n"
        "Replies to harmful requests stand in `samples.jsonl` as hashes of their beginnings, unless they were kept on "
        "request."
    )
    if pictures:
        text += (
            f"\n\n**Not verifiable:** {pictures} replies were made with pictures, which the bundle does not hold; "
            "`seawall verify` makes none of them again."
        )
    return text


def _pairs(values: Mapping[str, Any]) -> str:
    shown = {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in values.items()}
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in shown.items())


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
