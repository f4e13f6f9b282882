from __future__ import annotations

import pytest
import torch

from methods.nest import NeSTConfig
from methods.nest.clusters import cluster_profiles


def groups(*sizes, prompts=40, noise=0.1, seed=0):
    """Profiles around as many centres as there are sizes."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(len(sizes), prompts, generator=generator)
    labels = torch.tensor([label for label, size in enumerate(sizes) for _ in range(size)])
    return centres[labels] + noise * torch.randn(len(labels), prompts, generator=generator), labels


@pytest.mark.parametrize("sizes", [(5, 7), (4, 4, 6), (3, 9, 5, 4)])
@pytest.mark.parametrize("components", [None, 4])
def test_the_silhouette_finds_the_groups_that_are_there(sizes, components):
    profiles, labels = groups(*sizes)
    found = cluster_profiles(profiles, NeSTConfig(components=components))
    assert torch.equal(found, labels)


def test_the_same_profiles_give_the_same_clusters_twice_whatever_their_scale():
    profiles, _ = groups(6, 8, noise=1.5)
    first = cluster_profiles(profiles, NeSTConfig())
    assert torch.equal(first, cluster_profiles(profiles, NeSTConfig()))
    assert torch.equal(first, cluster_profiles(3.0 * profiles + 5.0, NeSTConfig()))


def test_few_rows_and_rows_without_structure_share_one_vector():
    assert cluster_profiles(torch.randn(2, 10), NeSTConfig()).tolist() == [0, 0]
    noise = torch.randn(30, 200, generator=torch.Generator().manual_seed(0))
    assert cluster_profiles(noise, NeSTConfig(components=None)).unique().tolist() == [0]


def test_fixed_and_untied_clusters():
    profiles, _ = groups(5, 5)
    assert cluster_profiles(profiles, NeSTConfig(clustering="fixed", clusters=1)).tolist() == [0] * 10
    assert len(cluster_profiles(profiles, NeSTConfig(clustering="fixed", clusters=4)).unique()) == 4
    assert cluster_profiles(profiles, NeSTConfig(clustering="untied")).tolist() == list(range(10))


def test_profiles_that_coincide_are_one_cluster():
    profile = torch.randn(1, 20).expand(6, 20)
    assert cluster_profiles(profile, NeSTConfig()).tolist() == [0] * 6
    assert cluster_profiles(profile, NeSTConfig(clustering="fixed", clusters=3)).tolist() == [0] * 6
