"""Tables and the picture of selected neurons: rows by layer and module, cluster sizes, probe accuracy."""

from __future__ import annotations

from collections import Counter
from typing import Any

from rich import box
from rich.table import Table

from methods.nest.patch import Patch
from methods.nest.selection import Neurons, Selection

__all__ = ["neuron_svg", "neuron_table", "patch_summary", "patch_table", "selection_summary"]

WIDTH, HEIGHT, LEFT, TOP, GAP = 260, 14, 44, 56, 40
KINDS = ("gate", "up")
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb", "#000000")
"""One a cluster; further clusters start again (Paul Tol's bright scheme)."""


def cluster_sizes(neurons: Neurons) -> list[int]:
    """Return how many rows each cluster of a site has, by the cluster's number."""
    counted = Counter(neurons.clusters)
    return [counted[label] for label in range(max(counted) + 1)] if counted else []


def selection_summary(selection: Selection) -> dict[str, Any]:
    """Return a selection as plain values, row numbers left out."""
    return {
        "rows": selection.num_rows,
        "vectors": sum(group.num_clusters for group in selection.groups),
        "parameters": selection.num_parameters,
        "prompts": selection.prompts,
        "held_out": selection.held_out,
        "accuracy_by_layer": {str(layer): value for layer, value in selection.accuracy_by_layer.items()},
        "sites": [
            {
                "module": one.site.module,
                "kind": one.site.kind,
                "layer": one.site.layer,
                "rows": len(one.rows),
                "clusters": cluster_sizes(one),
                "accuracy": one.accuracy,
                "is_convincing": one.is_convincing,
            }
            for one in selection.neurons
        ],
    }


def patch_summary(patch: Patch) -> dict[str, Any]:
    """Return what a patch holds as plain values."""
    return {
        "name": patch.name,
        "base": patch.base,
        "identity": patch.identity,
        "rows": patch.num_rows,
        "vectors": sum(len(vectors) for vectors in patch.vectors.values()),
        "parameters": patch.num_parameters,
        "has_originals": patch.has_originals,
        "modules": [
            {"part": key, "rows": part.rows.tolist(), "clusters": part.clusters.tolist(), "norms": _norms(patch, key)}
            for key, part in patch.parts.items()
        ],
    }


def patch_table(patch: Patch) -> Table:
    """Return a patch as a table, one row a module."""
    title = (
        f"Patch {patch.name} for the base {patch.base}: {patch.num_rows} rows, {patch.num_parameters} numbers, "
        f"originals {'stored' if patch.has_originals else 'not stored'}"
    )
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    for column in ("module", "rows", "clusters", "largest vector"):
        table.add_column(column, justify="left" if column == "module" else "right")
    for key, part in patch.parts.items():
        sizes = Counter(part.clusters.tolist())
        table.add_row(
            key,
            str(part.rows.numel()),
            " + ".join(str(sizes[label]) for label in sorted(sizes)),
            f"{max(_norms(patch, key)):.3g}",
        )
    return table


def neuron_table(selection: Selection) -> Table:
    """Return a selection as a table, one row a layer."""
    title = (
        f"{selection.num_rows} neurons, {selection.num_parameters} numbers to train; probes tested on "
        f"{selection.held_out} of {selection.prompts} prompts"
    )
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    for column in ("layer", "gate", "up", "clusters gate", "clusters up", "probe accuracy"):
        table.add_column(column, justify="right")
    for layer, accuracy in selection.accuracy_by_layer.items():
        found = [_sites_of(selection, layer, kind) for kind in KINDS]
        rows = [str(sum(len(one.rows) for one in sites)) if sites else "-" for sites in found]
        sizes = [" + ".join(str(size) for one in sites for size in cluster_sizes(one)) or "-" for sites in found]
        table.add_row(str(layer), *rows, *sizes, f"{accuracy:.1%}")
    return table


def neuron_svg(selection: Selection) -> str:
    """Return three panels as SVG, a row a layer: neurons of gate and of up by cluster, and probe accuracy."""
    layers = sorted({one.site.layer for one in selection.neurons})
    kinds = [kind for kind in KINDS if any(one.site.kind == kind for one in selection.neurons)]
    bars = {(kind, layer): _sites_of(selection, layer, kind) for kind in kinds for layer in layers}
    most = max(1, *(sum(len(one.rows) for one in sites) for sites in bars.values()))
    width = LEFT + (len(kinds) + 1) * (WIDTH + GAP)
    height = TOP + len(layers) * HEIGHT + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="10">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="4" y="16" font-size="12">{selection.num_rows} neurons, {selection.num_parameters} numbers to '
        "train; a bar is a layer, a colour a cluster that shares one vector</text>",
    ]
    for number, kind in enumerate(kinds):
        x = LEFT + number * (WIDTH + GAP)
        parts.append(f'<text x="{x}" y="{TOP - 8}" font-size="11">{kind}: selected neurons (most {most})</text>')
        parts += _layer_names(layers, x)
        for place, layer in enumerate(layers):
            parts += _bar(bars[kind, layer], x, TOP + place * HEIGHT, most)
    parts += _accuracies(selection, LEFT + len(kinds) * (WIDTH + GAP), layers)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _sites_of(selection: Selection, layer: int, kind: str) -> list[Neurons]:
    """Return the neurons of a layer by module: further targets may give it two modules of one kind."""
    return [one for one in selection.neurons if (one.site.layer, one.site.kind) == (layer, kind)]


def _layer_names(layers: list[int], x: float) -> list[str]:
    return [
        f'<text x="{x - 4}" y="{TOP + (place + 0.8) * HEIGHT:.1f}" text-anchor="end">{layer}</text>'
        for place, layer in enumerate(layers)
    ]


def _bar(sites: list[Neurons], x: float, y: float, most: int) -> list[str]:
    """Return the clusters of a layer's modules of one kind, one after the other."""
    parts = []
    colours: dict[str, int] = {}
    end = 0
    for one in sites:
        sizes = cluster_sizes(one)
        # A module of another group has vectors of its own, so its colours begin where those before it end.
        start = colours.setdefault(one.group, end)
        end = max(end, start + len(sizes))
        for label, size in enumerate(sizes):
            length = WIDTH * size / most
            parts.append(
                f'<rect x="{x:.1f}" y="{y}" width="{length:.1f}" height="{HEIGHT - 2}" '
                f'fill="{COLOURS[(start + label) % len(COLOURS)]}"><title>{one.site.module}, cluster {label}: {size} '
                f"of {len(one.rows)} neurons</title></rect>"
            )
            x += length
    return parts


def _accuracies(selection: Selection, x: float, layers: list[int]) -> list[str]:
    """Return the panel of held-out accuracy: a dot a module on a scale from one half to one."""
    parts = [
        f'<text x="{x}" y="{TOP - 8}" font-size="11">probe accuracy on {selection.held_out} held-out prompts</text>',
        *_layer_names(layers, x),
    ]
    bottom = TOP + len(layers) * HEIGHT
    for share in (0.5, 0.75, 1.0):
        at = x + WIDTH * (share - 0.5) * 2
        parts.append(f'<line x1="{at}" y1="{TOP}" x2="{at}" y2="{bottom}" stroke="#dddddd"/>')
        parts.append(f'<text x="{at}" y="{bottom + 12}" text-anchor="middle">{share:.0%}</text>')
    for one in selection.neurons:
        at = x + WIDTH * max(0.0, one.accuracy - 0.5) * 2
        y = TOP + (layers.index(one.site.layer) + 0.5) * HEIGHT
        fill = COLOURS[KINDS.index(one.site.kind)] if one.is_convincing else "white"
        parts.append(
            f'<circle cx="{at:.1f}" cy="{y:.1f}" r="3.5" fill="{fill}" stroke="#333333"><title>{one.site.module} '
            f"{one.site.kind}: {one.accuracy:.1%}</title></circle>"
        )
    return parts


def _norms(patch: Patch, key: str) -> list[float]:
    part = patch.parts[key]
    used = sorted(set(part.clusters.tolist()))
    return [float(patch.vectors[part.group][label].norm()) for label in used]
