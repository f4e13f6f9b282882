from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from experiments.training_picture import has_telemetry, training_panels, training_svg

RECORD = {
    "telemetry": {"refusal_probability": [[0, 0.5], [10, 0.25]], "refusal_margin": [[0, 2.0], [10, 1.0]]},
    "curves": {
        "step": [10, 20],
        "learning_rate": [1e-3, 1e-4],
        "gradient_norm": [1.0, 2.0],
        "train/loss": [3.0, 2.0],
        "train/pact/kl": [0.1, None],
        "train/pact/mass": [0.5, 0.4],
        "train/pact/mass_reference": [0.5, 0.5],
        "train/pact/gate/0": [0.6, 0.7],
        "train/pact/gate/16": [0.2, 0.1],
        "train/pact/gate/2": [0.4, 0.4],
        "train/pact/gate/32": [None, None],
    },
}


def test_probes_method_quantities_and_loss_have_a_panel_each():
    panels = {panel.title: panel.curves for panel in training_panels(RECORD)}
    assert list(panels) == [
        "probability of refusal openings", "refusal margin, nats per token", "pact: gate by place in the reply",
        "pact: kl", "pact: mass", "loss",
    ]  # fmt: skip
    assert panels["probability of refusal openings"][0].points == [(0, 0.5), (10, 0.25)]
    assert [curve.label for curve in panels["pact: gate by place in the reply"]] == ["0", "2", "16"]
    assert panels["pact: gate by place in the reply"][1].points == [(10, 0.4), (20, 0.4)]
    assert [curve.label for curve in panels["pact: mass"]] == ["model", "reference"]
    assert panels["pact: kl"][0].points == [(10, 0.1)]


def test_the_picture_is_well_formed_and_draws_every_curve():
    root = ElementTree.fromstring(training_svg(RECORD))
    lines = list(root.iter("{http://www.w3.org/2000/svg}polyline"))
    assert len(lines) == sum(len(panel.curves) for panel in training_panels(RECORD)) == 9
    assert "nan" not in training_svg(RECORD)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (RECORD, True),
        ({"curves": {"step": [1], "train/loss": [1.0]}}, False),
        ({"curves": {"step": [1], "train/pact/kl": [None]}}, False),
        ({}, False),
    ],
)
def test_plain_training_has_nothing_more_to_show(record, expected):
    assert has_telemetry(record) is expected
