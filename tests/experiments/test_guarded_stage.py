"""A guard on a stage of a run: what the stage leaves, and where its output is found again."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from experiments.fingerprints import guard_key
from experiments.launch import check_methods
from experiments.stages import StageChain, spread
from experiments.training_picture import training_panels
from framework.errors import ConfigError
from framework.examples import Prompt
from framework.files import ArtifactStore
from framework.guard_settings import GuardSettings
from tests.experiments.test_stages import QUIET, recipe, tiny_folder, weights

__all__ = ["tiny_folder"]

ALONE = ("stages.align=null", "stages.finetune.data.task_count=8")
STOP = ("trainer.guard.every_n_steps=2", "trainer.guard.max_kl=1e-9", "trainer.guard.prompts=4")


@pytest.fixture(scope="module")
def chained(tmp_path_factory, tiny_folder):
    """Runs with and without a guard that share a store, by name."""
    folder = tmp_path_factory.mktemp("guarded")
    store = ArtifactStore(folder / "store")

    def chain(*overrides, say=lambda text: None):
        watch = replace(QUIET, say=say)
        return StageChain(recipe(folder, tiny_folder, *ALONE, *overrides), store, watch).run()[-1]

    said = []

    return {
        "plain": chain(),
        "stopped": chain(*STOP),
        "watched": chain(*STOP, "trainer.guard.action=watch", say=said.append),
        "again": chain(*STOP, say=said.append),
        "said": said,
    }


def test_a_stopped_stage_keeps_what_it_has_and_says_why(chained):
    record, plain = chained["stopped"].record, chained["plain"]
    assert (record["steps"], plain.record["steps"]) == (2, 3)
    assert record["guard"]["stopped"].startswith("kl_to_start ")
    assert [d["decision"] for d in record["guard"]["decisions"]] == ["stop"]
    assert [step for step, _ in record["guard"]["history"]["kl_to_start"]] == [0, 2]
    assert record["guard"]["settings"]["max_kl"] == 1e-9
    ours, theirs = weights(chained["stopped"]), weights(plain)
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours)
    titles = [panel.title for panel in training_panels(record)]
    assert "KL to the start on harmful prompts, nats" in titles


def test_the_guard_is_part_of_the_key_only_where_it_acts(chained):
    assert "guard" not in chained["plain"].record
    assert chained["watched"].fingerprint == chained["plain"].fingerprint
    assert chained["watched"].is_reused
    assert chained["stopped"].fingerprint != chained["plain"].fingerprint
    assert chained["again"].is_reused
    assert chained["again"].fingerprint == chained["stopped"].fingerprint


def test_a_reused_stage_that_no_guard_measured_says_so(chained):
    assert len(chained["said"]) == 1
    assert chained["said"][0].startswith("stage finetune: it was trained without a guard and is reused")


def test_the_key_holds_what_decides_the_outcome():
    guard = GuardSettings(max_kl=1.0)
    assert guard_key(None, "finetune") == guard_key(guard, "align") == {}
    assert guard_key(GuardSettings(max_kl=1.0, action="watch"), "finetune") == {}
    assert guard_key(guard, "finetune") != guard_key(GuardSettings(max_kl=2.0), "finetune")
    assert guard_key(guard, "finetune") == guard_key(
        GuardSettings(max_kl=1.0, stages=["align", "finetune"]), "finetune"
    )


def test_prompts_are_spread_over_a_set():
    prompts = [Prompt(str(i), "text", "harmful") for i in range(10)]
    assert [p.id for p in spread(prompts, 4)] == ["0", "2", "5", "7"]
    with pytest.raises(ConfigError, match=r"`trainer\.guard\.prompts` to be at most 10, but got 11"):
        spread(prompts, 11)


def test_a_strategy_that_cuts_the_weights_is_refused_before_anything_is_loaded(tmp_path, tiny_folder):
    config = recipe(tmp_path, tiny_folder, *ALONE, *STOP, "trainer.strategy=model_parallel")
    with pytest.raises(ConfigError, match=r"`trainer\.guard` to be null under the strategy `fsdp2`"):
        check_methods(config)
