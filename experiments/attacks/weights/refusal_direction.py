"""Refusal direction: find the one direction along which a model refuses, and take it out of the weights.

For every layer l and every token i that the chat template puts behind the request, ``r = mean(h | harmful) - mean(h |
harmless)`` of the stream before layer l. Chosen is the (l, i) of the lowest refusal score on harmful validation prompts
under ablation, subject to: KL of the next-token distributions on harmless ones at most ``kl_threshold``, refusal
induced on harmless ones by adding r at least 0, l < 0.8 L. Then ``W <- W - r r^T W`` with r of norm 1 for every matrix
that writes into the stream: embeddings, attention outputs, MLP outputs. Refusal score: log-odds that the reply begins
with a refusal's first token. The direction is found anew on every model.

Reference: Arditi et al., NeurIPS 2024, arXiv:2406.11717, sections 2.3, 2.4 and appendix C; code
andyrdt/refusal_direction (formulas and selection rule, re-derived).

Deviations: prompts are the embedded ones unless named, none of the test split; refusal tokens are the first tokens of
the embedded refusals, not chosen by hand for a model family; filtering prompts by the model's own refusal score gives
way, and says so, where fewer than ``least`` prompts of a class would be left; when no candidate keeps the rule the
lowest bypass score is taken and ``meets_rule`` is false; ``shortlist`` scores only the candidates of the largest
separation between the classes, which is ours. Position embeddings and biases are edited too. Where embedding and head
are tied the head changes with it, and norms behind a writer (as in Gemma 2) scale the stream afterwards: ``residue`` is
what is left of the direction in the stream of the edited model.

Cost: no query, no training step; three passes over the validation prompts a candidate.

Needs: nothing but the weights and prompts.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from datamodules.catalog import EMBEDDED, benign_examples, evaluation_prompts
from datamodules.embedded_sets import load_benign, load_harmful, load_refusals
from experiments.attacks.harmful_rows import Apart, leave_out_measured
from experiments.attacks.interface import AttackedModel, ModelAttack, ModelTarget, register_attack
from experiments.attacks.model_folders import Stopwatch, load_exact, passing_folder, save_exact
from experiments.attacks.refusal_search import (
    Found,
    PromptIds,
    find_direction,
    mean_kl,
    num_template_tokens,
    refusal_scores,
)
from experiments.attacks.residual_stream import last_logits, orthogonalise, states_before
from framework.chat import ChatEncoder
from framework.errors import DataError
from framework.evaluation.margin import REFUSAL_OPENINGS
from framework.examples import Turn
from framework.fields import COUNT, NOT_EMPTY, NOT_NEGATIVE, Rule, check_instance, setting
from framework.models import choose_device

__all__ = ["RefusalDirection", "RefusalDirectionConfig", "refusal_tokens"]

TWO = Rule("a whole number ≥ 2", lambda value: value >= 2)


@dataclass(frozen=True)
class RefusalDirectionConfig:
    """Settings of refusal-direction ablation."""

    harmful: str = setting(EMBEDDED, rule=NOT_EMPTY)
    """Harmful requests: ``embedded`` (all splits but the test), a registered set or a file."""
    harmless: str = setting(EMBEDDED, rule=NOT_EMPTY)
    """Ordinary requests: ``embedded``, a registered set of pairs or a file of them."""
    train: int = setting(128, rule=TWO)
    """Prompts of each class for the means."""
    validation: int = setting(32, rule=COUNT)
    """Prompts of each class for the choice."""
    filter: bool = True
    """Leave out harmful prompts the model does not refuse and harmless ones it refuses."""
    least: int = setting(8, rule=TWO)
    """Prompts of a class that must be left for the filter to hold."""
    shortlist: int | None = setting(None, rule=COUNT)
    """Candidates that are scored; null scores all, as the reference does."""
    kl_threshold: float = setting(0.1, rule=NOT_NEGATIVE)
    """Largest KL on harmless prompts, in nats."""
    batch_size: int = setting(16, rule=COUNT)
    """Prompts of one forward pass."""

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: lists every problem.
        """
        check_instance(self)


@register_attack("refusal_direction", config=RefusalDirectionConfig)
class RefusalDirection(ModelAttack):
    """The target without its refusal direction."""

    kind = "weights"
    unit = "edits"
    config: RefusalDirectionConfig

    def make(self, target: ModelTarget, folder: Path) -> Iterator[AttackedModel]:
        """Yield the one edited model.

        Raises:
            DataError: there are too few prompts.
            WiringError: the model's writers are not known, or its template puts nothing behind a request.
        """
        watch = Stopwatch()
        with passing_folder(folder / "ablated") as place:
            loaded = load_exact(target.folder)
            model: Any = loaded.model.to(choose_device(target.accelerator))  # type: ignore[arg-type]
            encoder = ChatEncoder(loaded.tokenizer, system=target.system)
            pad_id: Any = loaded.tokenizer.pad_token_id
            tokens = refusal_tokens(encoder)
            harmful = leave_out_measured(target, harmful_texts(self.config.harmful), text=str)
            texts = _draw(
                harmful, harmless_texts(self.config.harmless, seed=target.seed), self.config, seed=target.seed
            )
            prompts, kept = self._prompts(model, encoder, tokens, texts, pad_id=pad_id)
            found = find_direction(
                model,
                prompts,
                tokens=tokens,
                positions=num_template_tokens(encoder),
                shortlist=self.config.shortlist,
                kl_threshold=self.config.kl_threshold,
                pad_id=pad_id,
                batch_size=self.config.batch_size,
            )
            plain = last_logits(model, prompts.harmless_validation, pad_id=pad_id, batch_size=self.config.batch_size)
            writers = orthogonalise(model, found.direction)
            facts = {**_facts(found), "matrices": writers, "kept_prompts": kept}
            facts |= {"measured_rows_left_out": harmful.num_left_out} if target.requests else {}
            facts |= _after(model, prompts, found, tokens, plain, pad_id=pad_id)
            save_exact(loaded, place)
            del model, loaded
            yield AttackedModel(place, 0, {}, facts, {"seconds": watch.lap()})

    def _prompts(
        self,
        model: Any,
        encoder: ChatEncoder,
        tokens: Sequence[int],
        texts: Mapping[str, Sequence[str]],
        *,
        pad_id: int,
    ) -> tuple[PromptIds, dict[str, str]]:
        """Return the prompts, filtered by the model's own refusal score, and how many of each kind were kept."""
        given = self.config
        parts: dict[str, list[list[int]]] = {}
        kept = {}
        for name, listed in texts.items():
            ids = [encoder.encode_prompt((Turn("user", text),)) for text in listed]
            left = ids
            if given.filter:
                scores = refusal_scores(last_logits(model, ids, pad_id=pad_id, batch_size=given.batch_size), tokens)
                wanted = scores > 0 if name.startswith("harmful") else scores < 0
                left = [one for one, is_wanted in zip(ids, wanted.tolist(), strict=True) if is_wanted]
            parts[name] = left if len(left) >= min(given.least, len(ids)) else ids
            kept[name] = f"{len(left)} of {len(ids)}" + ("" if parts[name] is left else ", so all were taken")
        return PromptIds(**parts), kept


def harmful_texts(name: str) -> list[str]:
    """Return harmful requests; of the embedded ones all but the test split."""
    if name == EMBEDDED:
        return [prompt.text for split in ("align", "poison", "validation") for prompt in load_harmful(split)]
    return [prompt.text for prompt in evaluation_prompts(name, kind="safety")]


def harmless_texts(name: str, *, seed: int) -> list[str]:
    """Return ordinary requests."""
    if name == EMBEDDED:
        return [prompt.text for split in ("align", "validation") for prompt in load_benign(split)]
    return [example.prompt for example in benign_examples(name, seed=seed)]


def refusal_tokens(encoder: ChatEncoder) -> list[int]:
    """Return the first tokens of refusals, ascending: those of the embedded refusals and of the known openings."""
    texts = [*load_refusals(), *REFUSAL_OPENINGS]
    return sorted({encoder.encode_reply(text, is_complete=False)[0] for text in texts})


def _draw(
    harmful: Apart[str], harmless: Sequence[str], config: RefusalDirectionConfig, *, seed: int
) -> dict[str, list[str]]:
    """Return the prompts of both classes for the means and for the choice, drawn by the seed.

    Raises:
        DataError: a class has too few prompts.
    """
    drawn = {}
    for name, texts, num_left_out in (("harmful", harmful.kept, harmful.num_left_out), ("harmless", harmless, 0)):
        order = list(dict.fromkeys(texts))
        random.Random(f"refusal direction {seed} {name}").shuffle(order)
        if len(order) < config.train + config.validation:
            left_out = f" ({num_left_out} more are among the measured requests)" if num_left_out else ""
            raise DataError(
                f"Expected at least {config.train + config.validation} different {name} requests, but got "
                f"{len(order)}{left_out}. Name a larger set in `{name}`, or lower `train` or `validation`."
            )
        drawn[name] = order[: config.train]
        drawn[f"{name}_validation"] = order[config.train : config.train + config.validation]
    return drawn


def _facts(found: Found) -> dict[str, Any]:
    chosen = found.candidate
    return {
        "layer": chosen.layer,
        "position": chosen.position,
        "bypass": chosen.bypass,
        "induce": chosen.induce,
        "kl": chosen.kl,
        "meets_rule": found.meets_rule,
        "candidates": found.num_candidates,
        "refusal_before": found.refusal_before,
    }


def _after(
    model: Any, prompts: PromptIds, found: Found, tokens: Sequence[int], plain: torch.Tensor, *, pad_id: int
) -> dict[str, Any]:
    """Return what the edited model shows: its refusal score, the KL, and the share of the direction in its stream."""
    logits = last_logits(model, prompts.harmful_validation, pad_id=pad_id)
    states = states_before(model, prompts.harmful_validation[:4], positions=1, pad_id=pad_id).double()
    residue = (states @ found.direction).abs() / states.norm(dim=-1)
    return {
        "refusal_after": float(refusal_scores(logits, tokens).mean()),
        "kl_after": mean_kl(plain, last_logits(model, prompts.harmless_validation, pad_id=pad_id)),
        "residue": float(residue.max()),
    }
