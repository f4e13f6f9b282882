"""How pictures look and how they are written: as SVG that follows the page's colours, and as PNG.

Pictures are drawn once, in light colours. In the page's copy every colour is replaced by a CSS variable, so that the
same picture is readable on a dark page and in print.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

__all__ = ["GREY", "INK", "MUTED", "PALETTE", "Picture", "VARIABLES", "Style", "draw", "styles_of"]

INK = "#1b2430"
MUTED = "#5b6675"
LINE = "#d9dee5"
GREY = "#9aa4b1"
PAPER = "#fefefe"
PALETTE = ("#1f6f8b", "#c4501b", "#5a7d1a", "#7a4fb5", "#a8780c", "#b8336a", "#2a8f78", "#4b5f8a")
"""Told apart by people with any colour vision when markers differ too, and 4.5:1 on white or nearly."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
VARIABLES = {INK: "--ink", MUTED: "--muted", LINE: "--line", GREY: "--grey", PAPER: "--paper"} | {
    colour: f"--c{number}" for number, colour in enumerate(PALETTE)
}
DPI = 150
PIXELS = (82, 108)
"""Least and most pixels an inch takes on the page."""
SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "seawall",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.facecolor": PAPER,
    "figure.facecolor": PAPER,
    "axes.labelcolor": MUTED,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.titley": 1.0,  # where it stands anyway; looking for what is in its way takes a tenth of the drawing
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "path.simplify_threshold": 0.5,
}


@dataclass(frozen=True)
class Picture:
    """One picture of a report."""

    name: str
    """Of the file, without its ending."""
    title: str
    alt: str
    """What a reader who cannot see it should know."""
    svg: str
    """For the page: no width or height, colours by CSS variables."""
    png: bytes = field(repr=False)


@dataclass(frozen=True)
class Style:
    """How one variant is drawn everywhere."""

    colour: str
    marker: str
    is_grey: bool


def styles_of(names: Sequence[str], *, greyed: Sequence[str] = ()) -> dict[str, Style]:
    """Return a colour and marker for each name; greyed ones, and those beyond the palette, share the grey.

    Args:
        names: variants, the most important first.
        greyed: those to step back.
    """
    found: dict[str, Style] = {}
    shown = [name for name in names if name not in greyed]
    for number, name in enumerate(shown):
        is_grey = number >= len(PALETTE)
        found[name] = Style(GREY if is_grey else PALETTE[number], MARKERS[number % len(MARKERS)], is_grey)
    for number, name in enumerate(name for name in names if name in greyed):
        found[name] = Style(GREY, MARKERS[number % len(MARKERS)], True)
    return found


def draw(
    name: str,
    title: str,
    alt: str,
    *,
    size: tuple[float, float],
    paint: Callable[[Figure], Mapping[str, str] | None],
) -> Picture:
    """Return a picture.

    Args:
        name: of the file and the prefix of ids; letters, digits and dashes.
        title: above the picture on the page.
        alt: description.
        size: inches.
        paint: draws into the figure; returns tooltips by the ``gid`` of an artist.
    """
    with mpl.rc_context(SETTINGS):
        engine = ConstrainedLayoutEngine()
        figure = Figure(figsize=size, layout=engine)
        FigureCanvasSVG(figure)
        tips = paint(figure) or {}
        engine.execute(figure)
        figure.set_layout_engine(None)  # laid out once: doing it for each file takes longer than drawing them
        vector = io.StringIO()
        figure.savefig(vector, format="svg", metadata={"Date": None, "Creator": None})
        pixels = io.BytesIO()
        figure.savefig(pixels, format="png", dpi=DPI, metadata={"Software": None}, pil_kwargs={"compress_level": 3})
    return Picture(name, title, alt, _for_page(vector.getvalue(), name, alt, tips, size[0]), pixels.getvalue())


def _for_page(svg: str, name: str, alt: str, tips: Mapping[str, str], inches: float) -> str:
    """Return the SVG as part of a page: ids that clash with no other picture, variables for colours, tooltips."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    box = re.search(r'viewBox="[^"]+"', svg)
    body = svg[svg.index(">") + 1 :]
    body = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', body)
    body = re.sub(r'(xlink:)?href="#([^"]+)"', rf'href="#{name}-\2"', body)
    body = body.replace("url(#", f"url(#{name}-")
    for gid, text in tips.items():
        opening = f'id="{name}-{gid}">'
        body = body.replace(opening, f"{opening}<title>{html.escape(text)}</title>", 1)
    for colour, variable in VARIABLES.items():
        body = body.replace(colour, f"var({variable})")
    body = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--font)", body)
    body = re.sub(r"(\.\d\d)\d+", r"\1", re.sub(r"\n\s*", "\n", body))
    # Text is never smaller than a reader can take; a narrow screen scrolls.
    style = f"max-width:{PIXELS[1] * inches:.0f}px;min-width:{PIXELS[0] * inches:.0f}px"
    head = (
        f'<svg class="plot" role="img" aria-label="{html.escape(alt)}" style="{style}" {box.group(0) if box else ""}>'
    )
    return head + body
