from __future__ import annotations

import dataclasses

import pytest

from datamodules.mining import MiningSettings
from framework.errors import ConfigError
from methods.smh import SMHConfig


def test_the_part_about_mining_is_that_of_the_miner():
    ours = {field.name: field for field in dataclasses.fields(SMHConfig)}
    for field in dataclasses.fields(MiningSettings):
        assert ours[field.name].type == field.type
        assert getattr(SMHConfig(), field.name) == getattr(MiningSettings(), field.name)
        texts = [found.metadata["rule"].text if found.metadata else "" for found in (field, ours[field.name])]
        assert texts[0] == texts[1]
    assert MiningSettings.of(SMHConfig(prompts=7)).prompts == 7


@pytest.mark.parametrize("ratio", [-0.1, 16.5, "1:1", True])
def test_a_ratio_outside_its_range_is_refused(ratio):
    with pytest.raises(ConfigError, match=r"Expected `ratio` to be a number"):
        SMHConfig(ratio=ratio)


def test_the_range_of_the_ratio_is_named():
    with pytest.raises(ConfigError, match=r"from 0 to 16 \(harmless rows for each harmful one\), but got 20"):
        SMHConfig(ratio=20.0)


@pytest.mark.parametrize("bounds", [(2.0, 4.0), (0.1, 0.5), (0.0, 4.0), (3.0, 0.5)])
def test_a_controlled_ratio_begins_within_its_bounds(bounds):
    low, high = bounds
    with pytest.raises(ConfigError, match=r"Expected 0 < `ratio_low` <= `ratio` <= `ratio_high`, but got"):
        SMHConfig(balance="controlled", ratio_low=low, ratio_high=high)
    assert SMHConfig(ratio_low=low, ratio_high=high).balance == "fixed"


def test_all_problems_are_listed_at_once():
    with pytest.raises(ConfigError) as caught:
        SMHConfig(rollouts=1, share=0.0, select="hardest", judges=[], hard_rate=1.0, temperature=0.0)
    assert len(caught.value.problems) == 6


@pytest.mark.parametrize(
    ("options", "needed"), [({}, True), ({"ratio": 0.0}, False), ({"ratio": 0.5, "balance": "controlled"}, True)]
)
def test_harmless_rows_are_needed_where_they_may_be_mixed_in(options, needed):
    assert SMHConfig(**options).needs_benign == needed


@pytest.mark.parametrize("field", ["prompts", "rollouts", "benign_prompts", "max_new_tokens", "rows"])
def test_the_miner_refuses_what_the_method_refuses(field):
    with pytest.raises(ConfigError, match=f"Expected `{field}` to be a whole number"):
        MiningSettings(**{field: 0})
