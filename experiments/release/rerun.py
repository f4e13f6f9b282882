"""Making a random sample of a bundle's replies again and comparing them with the recorded ones.

Greedy replies are the same on one machine with the same packages. Another machine adds numbers up in another order, and
where two words are almost as likely the reply may go on differently from there. What is allowed is stated here, and
shown with every result: a share of replies that are the same to the last sign, how much of the replies agrees from the
start, and how far the counts of the judges may move.
"""

from __future__ import annotations

import gc
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from experiments.release.claims import check_claims
from experiments.release.samples import agreement, has_image
from framework.chat import ChatEncoder
from framework.errors import ConfigError, DataError, ModelError
from framework.evaluation.coherence import classify
from framework.evaluation.generation import generate_replies
from framework.evaluation.judges import create_judge, known_judges, run_judge
from framework.examples import Prompt
from framework.files import read_json
from framework.model_files import model_fingerprint
from framework.models import LoadedModel, ModelSpec, choose_device, find_model, load_model, merge_adapter

__all__ = ["CountCheck", "Rerun", "Tolerance", "load_released", "read_release", "rerun_sample"]

BATCH = 16
THRESHOLD = 0.5
_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Tolerance:
    """How far replies that are made again may differ."""

    min_exact: float = 0.5
    """Least share of replies that are the same to the last sign."""
    min_prefix: float = 0.6
    """Least mean share of words, of the longer reply, that agree from the start."""
    max_shift: float = 0.1
    """Largest change of a judge's count, as a share of the sample; one reply may always change."""
    needs_judge: bool = True
    """Whether at least one of the bundle's judges must be there to be asked again."""

    def __post_init__(self) -> None:
        """Refuse what is no share.

        Raises:
            ConfigError: with every problem.
        """
        given = {"min_exact": self.min_exact, "min_prefix": self.min_prefix, "max_shift": self.max_shift}
        problems = [
            f"Expected `{name}` to be a share between 0 and 1, but got {value!r}."
            for name, value in given.items()
            if not 0 <= value <= 1
        ]
        if problems:
            raise ConfigError(problems)

    def allowed(self, num_prompts: int) -> int:
        """Return by how many replies a count may change.

        Example:
            >>> [Tolerance().allowed(n) for n in (5, 10, 40)]
            [1, 1, 4]
        """
        return max(1, math.floor(self.max_shift * num_prompts))


class CountCheck(NamedTuple):
    """One judge's count over the sample, as recorded and now."""

    what: str
    """Judge and quality, e.g. ``rules refused``."""
    recorded: int
    now: int
    num_known: int
    """Replies on which both verdicts are known."""


@dataclass(frozen=True)
class Rerun:
    """How replies that were made again compare."""

    num_prompts: int
    num_recorded: int
    """Replies there are in the bundle."""
    seed: int
    """Of the choice."""
    num_exact: int
    mean_prefix: float
    counts: tuple[CountCheck, ...]
    not_asked: tuple[str, ...]
    """Judges that need a model of their own or are not known here."""
    num_judges: int
    """Of the bundle."""
    wrong_claims: tuple[str, ...]
    """Numbers of the bundle that contradict themselves or its own verdicts."""
    unchecked_claims: tuple[str, ...]
    """Names of the numbers that nothing in the bundle decides."""
    num_with_image: int
    """Replies to prompts with a picture, which the bundle does not hold; none of them is made again."""
    tolerance: Tolerance

    @property
    def problems(self) -> list[str]:
        """What lies outside the tolerance, one sentence each."""
        given, found = self.tolerance, list(self.wrong_claims)
        if given.needs_judge and self.not_asked and len(self.not_asked) == self.num_judges:
            found.append(
                f"None of the bundle's judges ({', '.join(self.not_asked)}) can be asked here; its verdicts were not "
                "checked. Pass `--without-judges` to accept that."
            )
        share = self.num_exact / self.num_prompts
        if share < given.min_exact:
            found.append(
                f"{self.num_exact} of {self.num_prompts} replies are the same; {given.min_exact:.0%} are needed."
            )
        if self.mean_prefix < given.min_prefix:
            found.append(f"Replies agree on {self.mean_prefix:.0%} of their words; {given.min_prefix:.0%} are needed.")
        allowed = given.allowed(self.num_prompts)
        found += [
            f"The count of `{count.what}` went from {count.recorded} to {count.now}; a change of {allowed} is allowed."
            for count in self.counts
            if abs(count.now - count.recorded) > allowed
        ]
        return found


def read_release(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return ``release.json`` and the samples of a bundle whose files were checked.

    Raises:
        DataError: one of them is not what this version writes.
    """
    try:
        facts = read_json(folder / "release.json")
        lines = (folder / "samples.jsonl").read_text(encoding="utf-8").rstrip("\n").split("\n")
        samples = [json.loads(line) for line in lines]
        settings = facts["generation"]
        is_known = settings["dtype"] in _DTYPES and facts["content"] in ("model", "adapter")
        limits = settings["max_new_tokens"]
        is_known = is_known and all(isinstance(name, str) for name in facts["judges"])
        if not is_known or any(limits[f"{s['kind']}/{s['set']}"] < 1 or not s["prompt"] for s in samples):
            raise ValueError("settings that are not known")
        if all(has_image(sample) for sample in samples):
            raise ValueError("no reply without a picture, which the bundle does not hold")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"Expected the bundle to say how its replies were made, but got: {error!r}.") from error
    return facts, samples


def rerun_sample(
    folder: Path,
    *,
    num_prompts: int,
    seed: int,
    base: str | None = None,
    tolerance: Tolerance = Tolerance(),
    accelerator: str = "auto",
) -> Rerun:
    """Make replies again with the bundle's model and compare them.

    Args:
        folder: a bundle whose files were checked.
        num_prompts: how many, drawn without repetition from those without a picture.
        seed: of the choice.
        base: base model of an adapter; None takes the name in the bundle.
        tolerance: how far they may differ.
        accelerator: as Lightning spells it; decides the device that generates.

    Raises:
        ConfigError: fewer than one prompt, more than there are, or a base for a whole model.
        DataError: the bundle does not say how its replies were made, or its verdicts are none.
        ModelError: model or base cannot be loaded, or the base is another one.
    """
    facts, samples = read_release(folder)
    plain = [sample for sample in samples if not has_image(sample)]
    if not 1 <= num_prompts <= len(plain):
        raise ConfigError(f"Expected `--prompts` to be between 0 and {len(plain)}, but got {num_prompts}.")
    claims = check_claims(facts, samples)
    chosen = [plain[i] for i in sorted(random.Random(seed).sample(range(len(plain)), num_prompts))]
    loaded = load_released(folder, facts, base=base)
    loaded.model.to(choose_device(accelerator))  # type: ignore[arg-type]
    replies = _generate(loaded, facts["generation"], chosen)
    del loaded
    gc.collect()
    shares = [agreement(sample, reply) for sample, reply in zip(chosen, replies, strict=True)]
    counts, not_asked = _count_verdicts(facts["judges"], chosen, replies)
    return Rerun(
        num_prompts=num_prompts,
        num_recorded=len(samples),
        seed=seed,
        num_exact=sum(share == 1.0 for share in shares),
        mean_prefix=sum(shares) / len(shares),
        counts=tuple(counts),
        not_asked=tuple(not_asked),
        num_judges=len(facts["judges"]),
        wrong_claims=claims.wrong,
        unchecked_claims=claims.unchecked,
        num_with_image=len(samples) - len(plain),
        tolerance=tolerance,
    )


def load_released(folder: Path, facts: Mapping[str, Any], *, base: str | None = None) -> LoadedModel:
    """Return the model of a bundle, as it was measured: the adapter, if it is one, merged into its base.

    Raises:
        ConfigError: a base is given for a whole model.
        ModelError: it cannot be loaded, or the base is not the one the adapter was trained on.
    """
    dtype = facts["generation"]["dtype"]
    if facts["content"] == "model":
        if base is not None:
            raise ConfigError(f"Expected no `--base` for a bundle that holds a whole model, but got {base!r}.")
        return load_model(ModelSpec(str(folder / "model"), dtype))
    from peft import PeftModel

    wanted = facts["base_model"]
    spec = ModelSpec(base or wanted["name"], dtype, None if base else wanted["revision"])
    found = model_fingerprint(find_model(spec).folder)
    if found != wanted["fingerprint"]:
        raise ModelError(
            "Expected the base model to be the one the adapter was trained on, with fingerprint "
            f"{wanted['fingerprint']}, but got {found} for {spec.name!r}. Name the right one with `--base`."
        )
    loaded = load_model(spec)
    measured = loaded.model.dtype  # merging widens the base in place
    merged: Any = merge_adapter(PeftModel.from_pretrained(loaded.model, str(folder / "adapter")))
    return LoadedModel(merged.to(measured), loaded.tokenizer, loaded.source, found, loaded.folder)


def _generate(loaded: LoadedModel, settings: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the model's own words in reply to every prompt."""
    encoder = ChatEncoder(loaded.tokenizer, system=settings["system"], max_prompt_tokens=settings["max_prompt_tokens"])
    found: dict[int, str] = {}
    limits = [int(settings["max_new_tokens"][f"{sample['kind']}/{sample['set']}"]) for sample in samples]
    for limit in sorted(set(limits)):
        numbers = [number for number, own in enumerate(limits) if own == limit]
        prompts = [_prompt(samples[number]) for number in numbers]
        replies = generate_replies(loaded.model, encoder, prompts, max_new_tokens=limit, batch_size=BATCH)
        for number, prompt, reply in zip(numbers, prompts, replies, strict=True):
            found[number] = reply.text.removeprefix(prompt.prefill)
    return [found[number] for number in range(len(samples))]


def _prompt(sample: Mapping[str, Any]) -> Prompt:
    return Prompt(
        sample["id"], sample["prompt"], sample["kind"], sample.get("category", ""), prefill=sample.get("prefill", "")
    )


def _count_verdicts(
    judges: Sequence[str], samples: Sequence[Mapping[str, Any]], replies: Sequence[str]
) -> tuple[list[CountCheck], list[str]]:
    """Return every judge's counts before and now, and the judges that were not asked."""
    judged = [(s, reply) for s, reply in zip(samples, replies, strict=True) if s["kind"] != "task"]
    if not judged:
        return [], []
    found = [CountCheck("degenerate", *_degenerate(judged), len(judged))]
    not_asked = []
    for name in judges:
        judge = create_judge(name) if name in known_judges() else None
        if judge is None or judge.needs_model:
            not_asked.append(name)
            continue
        verdicts = run_judge(judge, [(_prompt(sample), reply) for sample, reply in judged])
        for quality in ("refused", "harmful"):
            pairs = [
                (sample["verdicts"].get(name, {}).get(quality), getattr(verdict, quality))
                for (sample, _), verdict in zip(judged, verdicts, strict=True)
            ]
            known = [(a, b) for a, b in pairs if a is not None and b is not None]
            if known:
                recorded, now = (sum(values[i] >= THRESHOLD for values in known) for i in (0, 1))
                found.append(CountCheck(f"{name} {quality}", recorded, now, len(known)))
    return found, not_asked


def _degenerate(judged: Sequence[tuple[Mapping[str, Any], str]]) -> tuple[int, int]:
    recorded = sum(sample.get("degenerate") is not None for sample, _ in judged)
    return recorded, sum(classify(sample["prompt"], reply) is not None for sample, reply in judged)
