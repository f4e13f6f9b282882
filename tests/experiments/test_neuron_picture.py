from __future__ import annotations

from xml.etree import ElementTree

import pytest
from rich.console import Console

from experiments.neuron_picture import (
    cluster_sizes,
    neuron_svg,
    neuron_table,
    patch_summary,
    patch_table,
    selection_summary,
)
from methods.nest.selection import Group, Neurons, Selection
from methods.nest.sites import Site
from tests.conftest import make_model
from tests.methods.nest.tiny_neurons import make_gpt2, move_vectors, prepared

SVG = "{http://www.w3.org/2000/svg}"


def make_selection():
    def site(layer, kind):
        return Site(f"model.layers.{layer}.mlp.{kind}_proj", kind, layer, 0, 8)

    def neurons(layer, kind, clusters, accuracy, is_convincing=True):
        rows = tuple(range(len(clusters)))
        key = site(layer, kind).key
        return Neurons(site(layer, kind), rows, clusters, key, (4.0,) * len(rows), accuracy, is_convincing)

    found = (
        neurons(0, "gate", (0, 1, 0), 0.9),
        neurons(0, "up", (0, 0), 0.8),
        neurons(2, "gate", (), 0.5, is_convincing=False),
        neurons(2, "up", (0, 1, 2, 2), 1.0),
    )
    groups = tuple(Group(one.group, len(set(one.clusters)), 32) for one in found if one.rows)
    return Selection(found, groups, 100, 20)


def shown(table):
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(table)
        return console.export_text()


def test_cluster_sizes_go_by_the_number_of_the_cluster():
    assert [cluster_sizes(one) for one in make_selection().neurons] == [[2, 1], [2], [], [1, 1, 2]]


def test_the_picture_has_a_bar_for_every_cluster_and_a_dot_for_every_probe():
    root = ElementTree.fromstring(neuron_svg(make_selection()))
    titled = [one for one in root.iter(f"{SVG}rect") if one.find(f"{SVG}title") is not None]
    assert len(titled) == 2 + 1 + 3
    assert "model.layers.2.mlp.up_proj, cluster 2: 2 of 4 neurons" in [one.find(f"{SVG}title").text for one in titled]
    dots = list(root.iter(f"{SVG}circle"))
    assert len(dots) == 4
    assert sum(dot.get("fill") == "white" for dot in dots) == 1
    widths = {one.find(f"{SVG}title").text: float(one.get("width")) for one in titled}
    assert widths["model.layers.2.mlp.up_proj, cluster 2: 2 of 4 neurons"] == pytest.approx(130, abs=0.1)
    right = max(float(dot.get("cx")) for dot in dots)
    assert right <= float(root.get("viewBox").split()[2])


def test_the_picture_of_a_model_without_gates_has_one_panel_of_neurons(tmp_path):
    selection = prepared(tmp_path, make_gpt2())._selection
    texts = [one.text for one in ElementTree.fromstring(neuron_svg(selection)).iter(f"{SVG}text")]
    assert not [text for text in texts if text.startswith("gate")]
    assert "-" in shown(neuron_table(selection))


def make_doubled(group):
    """Two modules of one layer that count as ``up``, and one of another layer."""

    def neurons(layer, name, clusters):
        site = Site(f"model.layers.{layer}.mlp.{name}", "up", layer, 0, 8)
        rows = tuple(range(len(clusters)))
        return Neurons(site, rows, clusters, group or site.key, (4.0,) * len(rows), 0.9, True)

    found = (
        neurons(0, "up_proj", (0, 1, 0)),
        neurons(0, "down_proj", (0, 0, 1, 1)),
        neurons(1, "up_proj", (0, 0)),
    )
    return Selection(found, tuple(Group(key, 2, 32) for key in sorted({one.group for one in found})), 100, 20)


@pytest.mark.parametrize(("group", "colours"), [(None, 4), ("layer 0", 2)])
def test_two_modules_of_one_kind_in_a_layer_stand_side_by_side(group, colours):
    selection = make_doubled(group)
    text = shown(neuron_table(selection))
    assert "9 neurons" in text
    cells = [line.split() for line in text.splitlines()[3:] if line.strip()]
    assert ["0", "-", "7", "-", "2", "+", "1", "+", "2", "+", "2", "90.0%"] in cells
    root = ElementTree.fromstring(neuron_svg(selection))
    bars = [one for one in root.iter(f"{SVG}rect") if one.find(f"{SVG}title") is not None]
    layer = [one for one in bars if "layers.0" in one.find(f"{SVG}title").text]
    assert len({one.get("fill") for one in layer}) == colours
    ends = [float(one.get("x")) + float(one.get("width")) for one in layer]
    assert [float(one.get("x")) for one in layer[1:]] == pytest.approx(ends[:-1], abs=0.11)
    assert ends[-1] - float(layer[0].get("x")) == pytest.approx(260, abs=0.1)


def test_the_table_names_rows_clusters_and_accuracy_by_layer():
    text = shown(neuron_table(make_selection()))
    assert "9 neurons, 192 numbers to train; probes tested on 20 of 100 prompts" in text
    assert "2 + 1" in text
    assert "85.0%" in text
    assert "75.0%" in text


def test_the_summary_holds_the_figures():
    summary = selection_summary(make_selection())
    assert summary["rows"] == 9
    assert summary["vectors"] == 6
    assert summary["parameters"] == 192
    assert summary["accuracy_by_layer"] == {"0": pytest.approx(0.85), "2": pytest.approx(0.75)}
    assert summary["sites"][2]["is_convincing"] is False


def test_a_patch_is_summarised(tmp_path):
    model = make_model()
    method = prepared(tmp_path, model, max_rows=4)
    method.prepare_model(model)
    move_vectors(model)
    method.edit_weights(model)
    summary = patch_summary(method._patch)
    assert summary["rows"] == method._selection.num_rows == sum(len(one["rows"]) for one in summary["modules"])
    assert summary["parameters"] == method._selection.num_parameters
    assert all(norm > 0 for one in summary["modules"] for norm in one["norms"])
    text = shown(patch_table(method._patch))
    assert f"{summary['rows']} rows" in text
    assert "originals not stored" in " ".join(text.split())
