from __future__ import annotations

import pytest

from framework.errors import ConfigError
from methods.nest import NeSTConfig


def test_one_name_is_a_list_of_one():
    assert NeSTConfig(safety="embedded").safety == ("embedded",)
    assert NeSTConfig(benign=["a", "b"]).benign == ("a", "b")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": "delta"}, "`train` to be one of .* but got 'delta'. Did you mean 'deltas'"),
        ({"score": "x"}, "`score` to be one of"),
        ({"projections": "down"}, "`projections` to be one of"),
        ({"clustering": "x"}, "`clustering` to be one of"),
        ({"random_rows": 1}, "`random_rows` to be true or false, but got 1"),
        ({"safety": ()}, r"`safety` to be a name or a list of names, but got \(\)"),
        ({"targets": [1]}, "`targets` to be a name or a list of names"),
        ({"count": 9}, "`count` to be a whole number >= 10 or null, but got 9"),
        ({"clusters": 0}, "`clusters` to be a whole number >= 1, but got 0"),
        ({"max_clusters": 1}, "`max_clusters` to be a whole number >= 2"),
        ({"min_rows": -1}, "`min_rows` to be a whole number >= 0"),
        ({"seed": True}, "`seed` to be a whole number >= 0, but got True"),
        ({"threshold": 0}, "`threshold` to be a number > 0, but got 0"),
        ({"probe_decay": float("nan")}, "`probe_decay` to be a number > 0"),
        ({"held_out": 1.0}, "`held_out` to be a share between 0 and 1"),
        ({"min_silhouette": 2}, "`min_silhouette` to be a number from -1 to 1"),
        ({"max_rows": 1}, "`max_rows` to be at least `min_rows` 2, but got 1"),
        ({"train": "all_but_neurons", "store_originals": True}, "`store_originals` to be false"),
        (
            {"train": "deltas+adapter", "store_originals": True},
            r"`store_originals` to be false with `train: deltas",
        ),
        ({"clusters": 4}, "`clustering` to be fixed where `clusters` is given, but got .silhouette. with 4 clusters"),
        (
            {"clusters": 2, "clustering": "untied"},
            "`clustering` to be fixed where `clusters` is given, but got .unt",
        ),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        NeSTConfig(**settings)


def test_all_problems_are_listed_at_once():
    with pytest.raises(ConfigError) as caught:
        NeSTConfig(train="x", count=0, threshold=-1)
    assert len(caught.value.problems) == 3
