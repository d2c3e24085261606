"""Panels over the steps of a run: losses against predictors, and small multiples of one quantity each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from physio_dist.report.drawing import INK, SOFT, Image, embed, new_figure, number
from physio_dist.report.rundata import Floats

# Values that span less than this factor read better on a linear axis.
LOG_FROM_FACTOR = 4.0
# Below this many values a mean would hide more than it shows.
SMOOTH_FROM_ROWS = 40
PANEL_INCHES = (4.7, 2.9)
# Room at the right for the names of the curves, in inches.
LABEL_INCHES = 1.12


@dataclass(frozen=True)
class Series:
    """One curve: ``x`` steps and ``y`` values, both float64 ``[row]``, NaN where there is none."""

    label: str
    x: Floats
    y: Floats
    colour: str
    kind: str = "raw"  # raw (faint, under a smoothed line), exact (as it is), marked (points), reference (dashed)
    dash: str = "--"

    def end(self) -> float:
        """The last finite value as drawn: of the smoothed line where there is one."""
        window = smoothing_window(self.y.size) if self.kind == "raw" else 1
        shown = smooth(self.y, window) if window > 1 else self.y
        return float(shown[np.isfinite(shown)][-1])


def smoothing_window(rows: int) -> int:
    """Logged steps that a smoothed curve averages over; 1 where nothing is smoothed. Always odd."""
    return 1 if rows < SMOOTH_FROM_ROWS else 2 * (max(5, rows // 40) // 2) + 1


def smooth(values: Floats, window: int) -> Floats:
    """Centred mean over ``window`` rows, finite values only; near the ends over the rows that exist."""
    finite = np.isfinite(values)
    kernel = np.ones(window)
    half = window // 2
    total = np.convolve(np.where(finite, values, 0.0), kernel)[half : half + values.size]
    count = np.convolve(finite.astype(float), kernel)[half : half + values.size]
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = total / np.round(count)
    return np.where(finite, mean, np.nan)


def loss_panel(title: str, series: Sequence[Series], restarts: Sequence[float], alt: str) -> Image:
    """Curves named at their right ends with their last values, logarithmic where they span a wide range."""
    figure, axes = _panel(title, label_inches=LABEL_INCHES)
    for one in series:
        _draw(axes, one)
    _scale(axes, np.concatenate([one.y for one in series]), from_zero=False)
    _steps(axes, np.concatenate([one.x for one in series]), restarts)
    _name_curves(axes, series)
    return embed(figure, alt)


def small_panel(
    title: str,
    series: Series,
    restarts: Sequence[float],
    alt: str,
    *,
    from_zero: bool,
    unit: str = "",
) -> Image:
    """One quantity over the steps; ``unit`` is appended to the axis' numbers (``%`` takes fractions)."""
    figure, axes = _panel(title, label_inches=0.12)
    _draw(axes, series)
    _scale(axes, series.y, from_zero=from_zero)
    if unit == "%":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    _steps(axes, series.x, restarts)
    return embed(figure, alt)


def _panel(title: str, label_inches: float) -> tuple[Figure, Axes]:
    width, height = PANEL_INCHES
    figure = new_figure(width, height)
    # Fixed margins: panels side by side keep their axes aligned.
    left, bottom = 0.72 / width, 0.46 / height
    axes = figure.add_axes((left, bottom, 1 - left - label_inches / width, 1 - bottom - 0.34 / height))
    axes.set_title(title, pad=7, x=-0.72 / (axes.get_position().width * width) + 0.01)
    return figure, axes


def _draw(axes: Axes, one: Series) -> None:
    # Few points vanish as a line, and a single one is no line at all.
    dot = "o" if np.isfinite(one.y).sum() <= 12 else ""
    if one.kind == "reference":
        seen = np.isfinite(one.y)
        axes.plot(one.x[seen], one.y[seen], one.dash, color=one.colour, lw=1.1, marker=dot, ms=2)
    elif one.kind == "marked":
        seen = np.isfinite(one.y)
        axes.plot(one.x[seen], one.y[seen], "-", color=one.colour, lw=1.0, zorder=4)
        face: dict[str, Any] = {"mfc": "white", "mec": one.colour, "mew": 1.3}
        axes.plot(one.x[seen], one.y[seen], "o", ms=4, markevery=max(1, int(seen.sum()) // 30), zorder=5, **face)
    else:
        window = smoothing_window(one.y.size) if one.kind == "raw" else 1
        faint = 0.3 if window > 1 else 0.9
        axes.plot(one.x, one.y, "-", color=one.colour, lw=0.7 if window > 1 else 1.0, alpha=faint, marker=dot, ms=3)
        if window > 1:
            axes.plot(one.x, smooth(one.y, window), "-", color=one.colour, lw=1.3, zorder=3)


def _scale(axes: Axes, values: Floats, from_zero: bool) -> None:
    finite = values[np.isfinite(values)]
    low, high = float(finite.min()), float(finite.max())
    if not from_zero and low > 0 and high / low >= LOG_FROM_FACTOR:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.12, high * 1.12)
        wide = high / low
        subs = (1.0, 2.0, 3.0, 5.0, 7.0) if wide < 10 else (1.0, 2.0, 5.0) if wide < 300 else (1.0,)
        axes.yaxis.set_major_locator(LogLocator(subs=subs))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        room = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
        axes.set_ylim(0.0 if from_zero else low - room, high + room)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))


def _tick(value: float) -> str:
    if 0 < abs(value) < 1e-3:
        mantissa, exponent = f"{value:.3e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:,g}" if abs(value) < 1e6 else f"{value:g}"


def _steps(axes: Axes, steps: Floats, restarts: Sequence[float]) -> None:
    first, last = float(np.nanmin(steps)), float(np.nanmax(steps))
    room = 0.02 * (last - first) or 0.5
    axes.set_xlim(first - room, last + room)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True) if last > first else FixedLocator([first]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel("step", loc="right", labelpad=1)
    for step in restarts:
        axes.axvline(step, color=SOFT, lw=0.8, ls=(0, (1, 2)), zorder=1)
        axes.plot([step], [1.0], "v", color=SOFT, ms=4, transform=axes.get_xaxis_transform(), clip_on=False)


def _name_curves(axes: Axes, series: Sequence[Series]) -> None:
    """Names and last values beside the curves' ends, moved apart where they would collide."""
    last = [one.end() for one in series]
    where = axes.transAxes.inverted()
    ends = [float(where.transform(axes.transData.transform((0.0, value)))[1]) for value in last]
    inches = PANEL_INCHES[1] * axes.get_position().height
    for one, value, end, place in zip(series, last, ends, spread(ends, 0.33 / inches), strict=True):
        colour = INK if one.kind == "reference" else one.colour
        weight = "bold" if one.kind == "marked" else "normal"
        text: dict[str, Any] = {
            "transform": axes.transAxes,
            "fontsize": 8.5,
            "linespacing": 1.05,
            "va": "center",
        }
        axes.text(1.065, place, f"{one.label}\n{number(value)}", color=colour, weight=weight, **text)
        axes.plot(
            [1.005, 1.05],
            [end, place],
            lw=0.6,
            color=colour,
            alpha=0.6,
            transform=axes.transAxes,
            clip_on=False,
        )


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Positions in 0..1 moved as little as a simple sweep can so that neighbours are ``gap`` apart."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    result = list(places)
    for below, here in pairwise(order):
        result[here] = max(result[here], result[below] + gap)
    # Pushed up beyond the top, they come down again, and push the lower ones down.
    ceiling = 1.0
    for here in reversed(order):
        result[here] = min(result[here], ceiling)
        ceiling = result[here] - gap
    return result
