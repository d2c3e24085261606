"""Components of a page: what its sections are made of, style and embedding of drawings, and values in words."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib.style
import PIL.Image
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from physio_dist.report.run_data import RunInfo, without_credentials

# Okabe and Ito's palette: distinct under the common kinds of colour blindness. A colour means the same mask term on
# the whole page of a pretraining run.
TEMPORAL = "#0072B2"
LEADWISE = "#D55E00"
INK = "#1c1c1c"
SOFT = "#6b6b6b"
GRID = "#e3e3e3"
SHADE = "#08518c"
# Width of a drawing over the whole column, and of one of two side by side.
WIDE_INCHES, PANEL_INCHES = 9.2, 4.7

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


@dataclass(frozen=True)
class Figure:
    """One or more drawings under one caption; ``wide`` ones take the whole column, others stand side by side."""

    images: list[Image]
    caption: str
    wide: bool = False
    title: str = ""


@dataclass(frozen=True)
class Cell:
    """A table cell; ``bar`` (0..1) draws a bar of that share beside the text, ``warn`` marks a bad value.

    ``more`` stands small below the text.
    """

    text: str
    bar: float | None = None
    colour: str = ""
    warn: bool = False
    more: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of cells under a head; ``numeric`` right-aligns all columns but the first."""

    head: list[str]
    rows: list[list[Cell]]
    caption: str = ""
    numeric: bool = True


@dataclass(frozen=True)
class Section:
    """A part of the page on its own. ``missing`` says in one line what the run lacks for it, and replaces the rest."""

    title: str
    anchor: str
    missing: str = ""
    text: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    details: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Fact:
    """One entry of the summary: what it is, its value, and what puts the value into proportion."""

    label: str
    value: str
    more: str = ""


@dataclass(frozen=True)
class Summary:
    """Head of a run's part of the page: name, badge (empty for recorded signals), findings, facts, and a table."""

    name: str
    badge: str
    badge_text: str
    verdicts: list[str]
    facts: list[Fact]
    table: Table | None
    kicker: str = "pretraining run"


def new_figure(width: float, height: float) -> Canvas:
    """An empty figure, in inches, that belongs to no window system and no global state."""
    return Canvas(figsize=(width, height), facecolor="white")


def embed(figure: Canvas, alt: str) -> Image:
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


def axes_at(figure: Canvas, left: float, bottom: float, width: float, height: float) -> Axes:
    """Axes at a place given in inches from the lower left corner."""
    w, h = figure.get_size_inches()
    return figure.add_axes((left / w, bottom / h, width / w, height / h))


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


def metric(value: float) -> str:
    """A score between 0 and 1, an en dash where there is none."""
    return f"{value:.3f}" if math.isfinite(value) else "–"


def span(interval: tuple[float, float] | None) -> str:
    """An interval of scores, empty where there is none."""
    return "" if interval is None else f"{metric(interval[0])}–{metric(interval[1])}"


def signed(value: float) -> str:
    """A difference of scores with its sign, an en dash where there is none."""
    return f"{value:+.3f}".replace("-", "\u2212") if math.isfinite(value) else "–"


def p_word(p: float) -> str:
    """A p value with two significant digits."""
    return f"{p:.2g}" if p >= 1e-4 else f"{p:.0e}"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds as a person says them."""
    hours, remainder = divmod(round(seconds), 3600)
    minutes, seconds_left = divmod(remainder, 60)
    if hours:
        return f"{hours:,} h {minutes:02d} min"
    return f"{minutes} min {seconds_left:02d} s" if minutes else f"{seconds_left} s"


def badge_of(flags: list[bool]) -> tuple[str, str]:
    """Badge and sentence on where the signals come from, given every statement the run makes on it."""
    if not flags:
        return "", "The run does not tell whether its signals are recorded or simulated."
    if not any(flags):
        return "", ""
    if all(flags):
        why = "The signals come from a generator, not from people: these numbers say nothing about patients."
        return "SIMULATED", why
    share = f"{sum(flags)} of {len(flags)} data sets come from a generator, not from people."
    return "PARTLY SIMULATED", share


def dataset(run: RunInfo) -> Section:
    """The shard sets the run read."""
    if not run.indexes:
        return Section("Data", "data", missing="The run holds no data.json, so its data set is not described.")
    tables = []
    for index in run.indexes:
        origin = {True: "SIMULATED", False: "recorded", None: None}[index.simulated]
        rows = {
            "Index": without_credentials(index.url) or "–",
            "Fingerprint": index.fingerprint,
            "Windows": ", ".join(f"{name} {count:,}" for name, count in index.splits.items()),
            "People": index.people,
            "Rate": f"{index.rate:g} Hz" if math.isfinite(index.rate) else None,
            "Channels": index.signals or index.channels,
            "Sources": index.sources,
            "Signals": origin,
        }
        cells = [[Cell(label), Cell(plain(value))] for label, value in rows.items() if value not in (None, "", [])]
        tables.append(Table([], cells, numeric=False))
    return Section("Data", "data", tables=tables)


def configuration_section(run: RunInfo, options: Sequence[str]) -> Section:
    """The ``options`` a reader asks for first, and the whole resolved file folded away."""
    if run.config_text is None:
        return Section("Configuration", "configuration", missing="The run holds no config.yaml.")
    rows = [[Cell(path), Cell(plain(run.option(path)))] for path in options if run.option(path) is not None]
    tables = [Table([], rows, numeric=False)] if rows else []
    details = [("config.yaml, everything resolved", run.config_text)]
    return Section("Configuration", "configuration", tables=tables, details=details)


def plain(value: Any) -> str:
    """A JSON value as a person writes it."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list):
        return ", ".join(plain(entry) for entry in value)
    if isinstance(value, dict):
        return "; ".join(f"{name}: {plain(entry)}" for name, entry in value.items())
    return str(value)


def _shorten(svg: bytes) -> bytes:
    # A tenth of a point is finer than a screen shows; the other five decimals are most of the file.
    def path(match: re.Match[bytes]) -> bytes:
        return re.sub(rb"\s+", b" ", re.sub(rb"(\.\d)\d+", rb"\1", match.group(0)))

    return re.sub(rb' d="[^"]*"', path, svg)
