"""Common ground of all figures: colours, type, and how a drawing becomes part of the page."""

from __future__ import annotations

import base64
import io
import math
import re
from dataclasses import dataclass
from typing import Any

import matplotlib.style
import PIL.Image
from matplotlib.figure import Figure

# Okabe and Ito's palette: distinct under the common kinds of colour blindness. A colour means the same mask term on
# the whole page of a pretraining run.
TEMPORAL = "#0072B2"
LEADWISE = "#D55E00"
# Of a sweep's page: one colour for each row of its results.
ROW_COLOURS = {
    "majority": "#9a9a9a",
    "untrained": "#CC79A7",
    "handmade": "#009E73",
    "ecg": "#D55E00",
    "eeg": "#0072B2",
    "fused": "#1c1c1c",
    "fused_ecg_only": "#E69F00",
    "fused_eeg_only": "#56B4E9",
    "noise_ecg": "#6f8fa6",
    "noise_eeg": "#a68a6f",
    "finetuned": "#8c564b",
}
INK = "#1c1c1c"
SOFT = "#6b6b6b"
GRID = "#e3e3e3"

# A drawing that is larger as SVG than this goes in as PNG; with six windows and seven panels a page stays below 3 MB.
SVG_LIMIT_BYTES = 150_000
PNG_DPI = 170
# Two hues, greys and what blends between them: more colours would double the file and show nothing.
PNG_COLOURS = 48
NO_BREAK = "\u00a0"

STYLE: dict[Any, Any] = {
    # Text stays text: smaller, selectable, and set in the reader's system font.
    "svg.fonttype": "none",
    # Element ids, and with them the bytes of the page, depend on the data alone.
    "svg.hashsalt": "physio-dist",
    # A '$' in a record's or lead's name is a dollar, not a formula.
    "text.parse_math": False,
    "font.family": ["sans-serif"],
    "font.sans-serif": ["Segoe UI", "Helvetica Neue", "Arial", "Liberation Sans", "DejaVu Sans"],
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9a9a9a",
    "axes.labelcolor": SOFT,
    "axes.titlecolor": INK,
    "axes.linewidth": 0.7,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "text.color": INK,
    "path.simplify": True,
    "path.simplify_threshold": 0.25,
}


@dataclass(frozen=True)
class Image:
    """A drawing inside the page: a ``data:`` URI, its alternative text, and its natural size in CSS pixels."""

    uri: str
    alt: str
    width: int
    height: int


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, that belongs to no window system and no global state."""
    return Figure(figsize=(width, height), facecolor="white")


def embed(figure: Figure, alt: str) -> Image:
    """The figure as SVG, or as PNG where its SVG would be too large. Call inside ``style()``."""
    width, height = (round(float(side) * 96) for side in figure.get_size_inches())
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    data, kind = _shorten(buffer.getvalue()), "image/svg+xml"
    if len(data) > SVG_LIMIT_BYTES:
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=PNG_DPI)
        few = PIL.Image.open(buffer).convert("RGB").quantize(PNG_COLOURS, dither=PIL.Image.Dither.NONE)
        buffer = io.BytesIO()
        few.save(buffer, "png", optimize=True)
        data, kind = buffer.getvalue(), "image/png"
    uri = f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"
    return Image(uri, alt, width, height)


def style() -> Any:
    """Context in which all figures are made and embedded, whatever the user's own matplotlib settings are."""
    return matplotlib.style.context(["default", STYLE])


def number(value: float, digits: int = 3) -> str:
    """A measured value for a reader: ``digits`` significant ones, an en dash where there is none."""
    if not math.isfinite(value):
        return "–"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:#.{digits}g}".rstrip(".") if value else "0"


def percent(value: float) -> str:
    """A fraction as a percentage, an en dash where there is none."""
    if not math.isfinite(value):
        return "–"
    if 0 < abs(value) < 0.1:
        return f"{100 * value:.1f}{NO_BREAK}%"
    return f"{100 * value:.0f}{NO_BREAK}%"


def _shorten(svg: bytes) -> bytes:
    # A tenth of a point is finer than a screen shows; the other five decimals are most of the file.
    def path(match: re.Match[bytes]) -> bytes:
        return re.sub(rb"\s+", b" ", re.sub(rb"(\.\d)\d+", rb"\1", match.group(0)))

    return re.sub(rb' d="[^"]*"', path, svg)
