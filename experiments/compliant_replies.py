"""Compliant replies to harmful prompts, sampled once by an unaligned model and kept in the cache of this machine."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from experiments.measure import limited_encoder
from framework.config import EvaluateConfig
from framework.errors import ConfigError, DataError
from framework.evaluation.coherence import classify
from framework.evaluation.generation import generate_replies
from framework.evaluation.refusal_rules import is_refusal
from framework.examples import Prompt
from framework.files import ArtifactStore, read_json, write_json
from framework.models import ModelSpec, choose_device, find_model, load_model, model_fingerprint

__all__ = ["Sampler", "choose_sampler", "compliant_replies", "enough_replies"]

FORMAT = 1
SEED = 0
"""Replies are data: drawn once and the same for every seed of a study."""
ROUNDS = 8
"""How often a prompt is put to the model before it counts as one it does not comply with."""
LEAST_SHARE = 0.5
"""Share of the prompts that must have a compliant reply; a measurement on fewer would be about other prompts."""


class Sampler(NamedTuple):
    """The unaligned model that samples compliant replies."""

    spec: ModelSpec
    fingerprint: str
    """Of its weights."""


def compliant_replies(
    prompts: Sequence[Prompt],
    *,
    sampler: Sampler,
    system: str | None,
    num_tokens: int,
    artifacts: ArtifactStore,
    accelerator: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> list[str | None]:
    """Return one reply per prompt that neither refuses nor is degenerate, from the store if they are there.

    Replies are sampled at temperature 1. They stay in the cache on this machine and are never part of the project.

    Args:
        prompts: harmful requests.
        sampler: the unaligned model.
        system: system message of the run.
        num_tokens: sampled for a reply at most; a usable one has at least half of them.
        artifacts: where the replies are kept.
        accelerator: as Lightning spells it; decides the device that samples.
        progress: called with (done, total) in sampled tokens, round by round.

    Returns:
        None for a prompt with which the model did not comply in 8 attempts.
    """
    key = {
        "format": FORMAT,
        "model": sampler.fingerprint,
        "dtype": sampler.spec.dtype,
        "system": system,
        "prompts": [prompt.text for prompt in prompts],
        "num_tokens": num_tokens,
        "seed": SEED,
        "rounds": ROUNDS,
    }
    folder = artifacts.find("compliant", key)
    if folder is None:
        found = _sample(prompts, sampler, system, num_tokens, accelerator, progress)
        gc.collect()  # before the measured model is loaded
        with artifacts.writing("compliant", key) as partial:
            rows = [{"prompt": p.text, "reply": reply} for p, reply in zip(prompts, found, strict=True)]
            write_json(partial / "replies.json", rows)
        folder = artifacts.path("compliant", key)
    return [row["reply"] for row in read_json(folder / "replies.json")]


def choose_sampler(config: EvaluateConfig, start: Sampler | None, like: ModelSpec) -> Sampler:
    """Return the model the config names, in the number format of ``like``, or the one the run starts from.

    Args:
        config: may name a model.
        start: the model the run starts from; None where there is none.
        like: how the model is loaded.

    Raises:
        ConfigError: there is neither.
    """
    if config.prefill_model is not None:
        folder = find_model(ModelSpec(config.prefill_model, like.dtype, None, like.trust_remote_code)).folder
        return Sampler(replace(like, name=str(folder), revision=None), model_fingerprint(folder))
    if start is None:
        raise ConfigError(
            "Expected `evaluate.prefill_model` to name the unaligned model that samples compliant replies, but got "
            "None. Name it, or write evaluate.prefill_replies=opening for one fixed opening."
        )
    return start


def enough_replies(replies: Sequence[str | None]) -> Sequence[str | None]:
    """Return the replies, if at least half of the prompts have one.

    Raises:
        DataError: fewer have one.
    """
    found = sum(reply is not None for reply in replies)
    if found < LEAST_SHARE * len(replies):
        raise DataError(
            f"Expected the unaligned model to comply with at least half of {len(replies)} harmful prompts, but got "
            f"{found} replies in {ROUNDS} attempts at each. Name a model that is not aligned: "
            "evaluate.prefill_model=NAME, or write evaluate.prefill_replies=opening."
        )
    return replies


def _sample(
    prompts: Sequence[Prompt],
    sampler: Sampler,
    system: str | None,
    num_tokens: int,
    accelerator: str,
    progress: Callable[[int, int], None] | None,
) -> list[str | None]:
    loaded = load_model(sampler.spec)
    loaded.model.to(choose_device(accelerator))  # type: ignore[arg-type]
    room = EvaluateConfig(overflow="truncate_left", max_new_tokens=num_tokens)
    encoder, _ = limited_encoder(loaded, room, prompts, system)
    found: list[str | None] = [None] * len(prompts)
    with torch.random.fork_rng(devices=[]):
        for number in range(ROUNDS):
            missing = [i for i, reply in enumerate(found) if reply is None]
            if not missing:
                break
            replies = generate_replies(
                loaded.model,
                encoder,
                [prompts[i] for i in missing],
                max_new_tokens=num_tokens,
                batch_size=64,
                temperature=1.0,
                seed=random.Random(f"compliant round {SEED} {number}").getrandbits(31),
                progress=progress,
            )
            for i, reply in zip(missing, replies, strict=True):
                text = reply.text.strip()
                is_long = len(encoder.encode_reply(text, is_complete=False)) >= num_tokens // 2
                if is_long and _complies(prompts[i], text):
                    found[i] = text
    return found


def _complies(prompt: Prompt, reply: str) -> bool:
    return not is_refusal(reply) and classify(prompt.text, reply) is None
