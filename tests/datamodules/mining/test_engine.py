from __future__ import annotations

import itertools
import random

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from datamodules.mining import engine
from datamodules.mining.engine import RolloutJob, RolloutLimits, make_rollouts, rollout_uniforms
from experiments.contract.tiny import TinyModel
from framework.errors import ConfigError, DataError
from framework.evaluation.generation import generate_ids
from tests.tiny_runs import make_lora

STOPS = tuple(range(1, 60, 4))
"""Many end tokens, so that a random model ends its rollouts at different lengths."""


def lively_model():
    """A model that does not say the same token for ever."""
    return TinyModel(shift=0.4).build()


def make_prompts(count, *, shared=0, seed=0):
    draw = random.Random(seed)
    start = [draw.randrange(60, 260) for _ in range(shared)]
    return {f"p{i}": start + [draw.randrange(60, 260) for _ in range(draw.randint(2, 12))] for i in range(count)}


def limits(**changes):
    given = {"stop_ids": STOPS, "max_new_tokens": 12, "temperature": 1.0, "seed": 3, "num_rows": 5}
    return RolloutLimits(**(given | changes))


def roll(model, prompts, jobs, **changes):
    waiting = list(jobs)
    found = make_rollouts(model, prompts, lambda: waiting.pop(0) if waiting else None, limits(**changes))
    return {rollout.job: rollout for rollout in found}


def all_jobs(prompts, count):
    return [RolloutJob(name, number) for name in prompts for number in range(count)]


@pytest.mark.parametrize("rows", [1, 4, 32])
@pytest.mark.parametrize("shared", [0, 20])
def test_greedy_rollouts_are_those_of_plain_generation(rows, shared):
    model, prompts = lively_model(), make_prompts(9, shared=shared)
    found = roll(model, prompts, all_jobs(prompts, 1), temperature=0.0, num_rows=rows)
    expected = generate_ids(model, list(prompts.values()), stop_ids=STOPS, max_new_tokens=12)
    assert [found[RolloutJob(name, 0)].ids for name in prompts] == expected
    assert {len(ids) for ids in expected} > {12}  # some ended, some were cut off


def test_greedy_rollouts_are_those_of_transformers():
    model, prompts = lively_model(), make_prompts(6)
    found = roll(model, prompts, all_jobs(prompts, 2), temperature=0.0)
    for name, ids in prompts.items():
        settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": list(STOPS)}
        plain = model.generate(torch.tensor([ids]), **settings)[0, len(ids) :].tolist()
        assert found[RolloutJob(name, 0)].ids == found[RolloutJob(name, 1)].ids == plain


def test_a_rollout_does_not_depend_on_its_company():
    model, prompts = lively_model(), make_prompts(8)
    jobs = all_jobs(prompts, 6)
    whole = roll(model, prompts, jobs, num_rows=16)
    backwards = roll(model, prompts, jobs[::-1], num_rows=3)
    alone = roll(model, prompts, jobs[7:8], num_rows=1)
    assert set(whole) == set(backwards) == set(jobs)
    assert whole == backwards
    assert alone[jobs[7]] == whole[jobs[7]]
    assert len({tuple(rollout.ids) for rollout in whole.values()}) > len(prompts)


def test_rollouts_follow_the_distribution_of_the_model():
    model, prompts = lively_model(), make_prompts(1)
    count = 4000
    found = roll(model, prompts, all_jobs(prompts, count), max_new_tokens=1, num_rows=64)
    with torch.no_grad():
        expected = model(torch.tensor([prompts["p0"]])).logits[0, -1].double().softmax(-1)
    seen = torch.bincount(torch.tensor([r.ids[0] for r in found.values()]), minlength=260).double() / count
    assert float((seen - expected).abs().sum()) / 2 < 0.12  # about 0.10 by chance for 260 tokens


def test_the_batch_stays_full_and_a_prompt_is_read_once(monkeypatch):
    model, prompts = lively_model(), make_prompts(4)
    widths, read = [], []
    forward = model.forward

    def counting(*args, **kwargs):
        (read if kwargs["input_ids"].shape[1] > 1 else widths).append(len(kwargs["input_ids"]))
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", counting)
    monkeypatch.setattr(engine, "has_position_argument", lambda model: True)
    monkeypatch.setattr("framework.evaluation.decoding.has_position_argument", lambda model: True)
    found = roll(model, prompts, all_jobs(prompts, 10), num_rows=4)
    assert len(found) == 40
    assert read == [1] * 4
    full = [width == 4 for width in widths]
    assert all(full[: full.index(False)])
    assert widths[full.index(False) :] == sorted(widths[full.index(False) :], reverse=True)
    assert full.index(False) >= len(widths) - 12


def test_an_adapter_is_no_obstacle():
    prompts = make_prompts(3)
    found = roll(make_lora(lively_model()), prompts, all_jobs(prompts, 2), temperature=0.0)
    expected = generate_ids(make_lora(lively_model()), list(prompts.values()), stop_ids=STOPS, max_new_tokens=12)
    assert [found[RolloutJob(name, 1)].ids for name in prompts] == expected


def test_a_sliding_window_goes_in_turns():
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MistralConfig(vocab_size=260, num_key_value_heads=2, sliding_window=6, **shape)
    model, prompts = MistralForCausalLM(config).eval(), make_prompts(5)
    found = roll(model, prompts, all_jobs(prompts, 1), temperature=0.0, num_rows=2)
    expected = [generate_ids(model, [ids], stop_ids=STOPS, max_new_tokens=12)[0] for ids in prompts.values()]
    assert [found[RolloutJob(name, 0)].ids for name in prompts] == expected
    sampled = roll(model, prompts, all_jobs(prompts, 2), num_rows=4)
    assert len(sampled) == 10


def test_new_jobs_may_come_while_others_run():
    model, prompts = lively_model(), make_prompts(2)
    ready, made = [RolloutJob("p0", 0)], []
    for rollout in make_rollouts(model, prompts, lambda: ready.pop() if ready else None, limits()):
        made.append(rollout.job)
        if rollout.job.prompt == "p0":
            ready.append(RolloutJob("p1", 0))
    assert made == [RolloutJob("p0", 0), RolloutJob("p1", 0)]


def test_the_model_is_left_as_it_was():
    model, prompts = lively_model().train(), make_prompts(2)
    rollouts = make_rollouts(
        model, prompts, itertools.chain(all_jobs(prompts, 1), itertools.repeat(None)).__next__, limits()
    )
    next(rollouts)
    assert model.training
    assert not torch.is_inference_mode_enabled()


def test_random_numbers_depend_on_seed_prompt_and_number():
    first = rollout_uniforms(0, RolloutJob("a", 1), 8)
    assert torch.equal(first, rollout_uniforms(0, RolloutJob("a", 1), 8))
    for seed, name, number in ((1, "a", 1), (0, "b", 1), (0, "a", 2)):
        assert not torch.equal(first, rollout_uniforms(seed, RolloutJob(name, number), 8))


def test_what_cannot_be_decoded_is_refused():
    model, prompts = lively_model(), make_prompts(1)
    with pytest.raises(ConfigError, match=r"Expected `temperature` to be a number ≥ 0, but got -1"):
        roll(model, prompts, [], temperature=-1)
    with pytest.raises(DataError, match=r"Expected every prompt and its reply to fit the model's context of 512"):
        roll(model, {"long": [70] * 505}, [])
