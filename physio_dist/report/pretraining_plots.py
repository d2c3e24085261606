"""Drawings of a pretraining run: panels over the steps, and windows with their leads on one time axis."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from physio_dist.report.components import INK, LEADWISE, SOFT, TEMPORAL, Image, embed, new_figure, number, style
from physio_dist.report.run_data import Examples
from physio_dist.runtime.arrays import BoolArray, Float32Array, Float64Array

# Values that span less than this factor read better on a linear axis.
LOG_FROM_FACTOR = 4.0
# Below this many values a mean would hide more than it shows.
SMOOTH_FROM_ROWS = 40
PANEL_INCHES = (4.7, 2.9)
# Room at the right for the names of the curves, in inches.
LABEL_INCHES = 1.12
UV_PER_MV = 1000.0
# A lead gets the room its own waves need, within these multiples of the usual lead's: a flat lead stays visible and
# an artefact does not flatten the others.
LEAST_ROOM, MOST_ROOM = 0.35, 4.0
TICKS_INCHES = 0.25
HIDDEN_GREY = "#8a8a8a"
KINDS = (("intra", TEMPORAL), ("inter", LEADWISE))


@dataclass(frozen=True)
class Series:
    """One curve: ``x`` steps and ``y`` values, both float64 ``[row]``, NaN where there is none."""

    label: str
    x: Float64Array
    y: Float64Array
    colour: str
    kind: str = "raw"  # raw (faint, under a smoothed line), exact (as it is), marked (points), reference (dashed)
    dash: str = "--"

    def end(self) -> float:
        """The last finite value as drawn: of the smoothed line where there is one."""
        window = smoothing_window(self.y.size) if self.kind == "raw" else 1
        values = smooth(self.y, window) if window > 1 else self.y
        return float(values[np.isfinite(values)][-1])


def smoothing_window(rows: int) -> int:
    """Logged steps that a smoothed curve averages over; 1 where nothing is smoothed. Always odd."""
    return 1 if rows < SMOOTH_FROM_ROWS else 2 * (max(5, rows // 40) // 2) + 1


def smooth(values: Float64Array, window: int) -> Float64Array:
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
    for curve in series:
        _draw(axes, curve)
    _scale(axes, np.concatenate([curve.y for curve in series]), from_zero=False)
    _steps(axes, np.concatenate([curve.x for curve in series]), restarts)
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


def _draw(axes: Axes, series: Series) -> None:
    # Few points vanish as a line, and a single one is no line at all.
    dot = "o" if np.isfinite(series.y).sum() <= 12 else ""
    if series.kind == "reference":
        finite = np.isfinite(series.y)
        axes.plot(series.x[finite], series.y[finite], series.dash, color=series.colour, lw=1.1, marker=dot, ms=2)
    elif series.kind == "marked":
        finite = np.isfinite(series.y)
        axes.plot(series.x[finite], series.y[finite], "-", color=series.colour, lw=1.0, zorder=4)
        face: dict[str, Any] = {"mfc": "white", "mec": series.colour, "mew": 1.3}
        axes.plot(
            series.x[finite], series.y[finite], "o", ms=4, markevery=max(1, int(finite.sum()) // 30), zorder=5, **face
        )
    else:
        window = smoothing_window(series.y.size) if series.kind == "raw" else 1
        faint = 0.3 if window > 1 else 0.9
        axes.plot(
            series.x, series.y, "-", color=series.colour, lw=0.7 if window > 1 else 1.0, alpha=faint, marker=dot, ms=3
        )
        if window > 1:
            axes.plot(series.x, smooth(series.y, window), "-", color=series.colour, lw=1.3, zorder=3)


def _scale(axes: Axes, values: Float64Array, from_zero: bool) -> None:
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


def _steps(axes: Axes, steps: Float64Array, restarts: Sequence[float]) -> None:
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
    last = [curve.end() for curve in series]
    to_axes = axes.transAxes.inverted()
    ends = [float(to_axes.transform(axes.transData.transform((0.0, value)))[1]) for value in last]
    inches = PANEL_INCHES[1] * axes.get_position().height
    for curve, value, end, height in zip(series, last, ends, spread(ends, 0.33 / inches), strict=True):
        colour = INK if curve.kind == "reference" else curve.colour
        weight = "bold" if curve.kind == "marked" else "normal"
        text: dict[str, Any] = {
            "transform": axes.transAxes,
            "fontsize": 8.5,
            "linespacing": 1.05,
            "va": "center",
        }
        axes.text(1.065, height, f"{curve.label}\n{number(value)}", color=colour, weight=weight, **text)
        axes.plot(
            [1.005, 1.05],
            [end, height],
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


def squared_errors(examples: Examples, kind: str) -> tuple[Float64Array, Float64Array]:
    """Sums of squares in uV^2 over the samples hidden as ``kind``, both ``[n, channel]``: model's, and zero's."""
    hidden = examples.hidden_samples(kind)
    target = examples.target.astype(np.float64)
    wrong = np.where(hidden, examples.reconstruction.astype(np.float64) - target, 0.0)
    return (wrong**2).sum(axis=2), (np.where(hidden, target, 0.0) ** 2).sum(axis=2)


def sheet(examples: Examples, window: int, alt: str) -> Image:
    """Window number ``window`` (from 0): original, hidden parts and reconstruction of every lead."""
    _, channels, samples = examples.target.shape
    seconds = samples / examples.rate
    high, low, limit = _rooms(examples, window)
    gap = 0.12 * float(np.median(high - low))
    bases = _baselines(high, low, gap)
    bar = scale_bar_uv(limit / MOST_ROOM)
    bottom, roof = float(bases[-1] + low[-1] - gap / 2), float(bases[0] + high[0] + gap / 2)

    leads_inches = float(np.clip(0.53 * channels, 1.3, 12.0))
    uv_per_inch = (roof - bottom) / leads_inches
    # Below the leads: the seconds, then one strip for the legend and the scale bar.
    strip = max(0.3, bar / uv_per_inch + 0.05)
    height = leads_inches + TICKS_INCHES + strip + 0.08
    figure = new_figure(9.2, height)
    axes = figure.add_axes((0.075, (TICKS_INCHES + strip) / height, 0.915, leads_inches / height))
    axes.set_xlim(0, seconds)
    axes.set_ylim(bottom, roof)
    _grid(axes, examples, seconds)
    for lead in range(channels):
        # A little less than the lead's room, so that shades of neighbours stay apart.
        top, floor = bases[lead] + high[lead] + 0.35 * gap, bases[lead] + low[lead] - 0.35 * gap
        font: dict[str, Any] = {"ha": "right", "va": "center", "fontsize": 10, "weight": "bold"}
        valid = bool(examples.valid[window, lead])
        colour = INK if valid else HIDDEN_GREY
        axes.text(-0.011 * seconds, bases[lead], examples.channels[lead], color=colour, **font)
        if not valid:
            axes.add_patch(Rectangle((0, floor), seconds, top - floor, color="#f4f4f4", lw=0, zorder=0))
            label = "not valid in this recording: neither seen nor scored"
            axes.text(0.01 * seconds, bases[lead], label, color=SOFT, va="center", fontsize=9, style="italic")
            continue
        _shade(axes, examples, window, lead, floor, top)
        _traces(axes, examples, window, lead, float(bases[lead]), (float(low[lead]), float(high[lead])))
    _scale_bar(axes, seconds, bottom - TICKS_INCHES * uv_per_inch, bar)
    _legend(axes, -(TICKS_INCHES + strip / 2) / leads_inches)
    return embed(figure, alt)


def scale_bar_uv(usual_uv: float) -> float:
    """A round number of uV for the scale bar, near the usual lead's amplitude."""
    sizes = np.array([10, 20, 50, 100, 200, 500, 1000, 2000, 5000], dtype=np.float64)
    return float(sizes[np.argmin(np.abs(np.log(sizes / max(usual_uv, 1.0))))])


def cut_off_uv(examples: Examples, window: int) -> float | None:
    """Amplitude in uV at which this window's drawing is cut off, or None where it shows all of it."""
    _, _, limit = _rooms(examples, window)
    valid = examples.valid[window]
    return limit if np.abs(examples.target[window][valid]).max(initial=0.0) > limit else None


def _rooms(examples: Examples, window: int) -> tuple[Float64Array, Float64Array, float]:
    """Reach of each lead above and below its baseline, ``[channel]`` in uV, and the limit for all."""
    target = np.nan_to_num(examples.target[window].astype(np.float64))
    valid = examples.valid[window]
    hidden = (examples.hidden_samples("intra") | examples.hidden_samples("inter"))[window]
    reach = np.percentile(np.abs(target), 99.5, axis=1)
    usual = max(float(np.median(reach[valid])) if valid.any() else 0.0, 1.0)
    limit = MOST_ROOM * usual
    both = np.stack([target, np.where(hidden, examples.reconstruction[window], target)])
    both = np.nan_to_num(both)  # a model that diverged draws nothing, and must not stop the page
    high = np.where(valid, np.clip(both.max(axis=(0, 2)), LEAST_ROOM * usual, limit), LEAST_ROOM * usual)
    low = np.where(valid, np.clip(both.min(axis=(0, 2)), -limit, -LEAST_ROOM * usual), -LEAST_ROOM * usual)
    return high, low, limit


def _baselines(high: Float64Array, low: Float64Array, gap: float) -> Float64Array:
    below = np.concatenate([[0.0], np.cumsum(-low[:-1] + gap + high[1:])])
    return -below


def _runs(mask: BoolArray) -> Iterator[tuple[int, int]]:
    """Start and end of every stretch of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)


def _grid(axes: Axes, examples: Examples, seconds: float) -> None:
    patch = examples.patch_samples / examples.rate
    for border in np.arange(0, examples.intra.shape[2] + 1) * patch:
        axes.axvline(border, color="#c9c9c9", lw=0.6, zorder=1)
    axes.grid(False)
    axes.set_yticks([])
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="x", length=0, pad=2)
    # One second is the rhythm of a patch; a longer window keeps its numbers apart.
    every = max(1, round(seconds / 15))
    axes.set_xticks(np.arange(0, seconds + 1e-6, every))
    axes.set_xticklabels([f"{t:g} s" if not i else f"{t:g}" for i, t in enumerate(axes.get_xticks())])


def _shade(axes: Axes, examples: Examples, window: int, lead: int, floor: float, top: float) -> None:
    patch = examples.patch_samples / examples.rate
    for kind, colour in KINDS:
        for start, end in _runs(getattr(examples, kind)[window, lead]):
            corner, width = (start * patch, floor), (end - start) * patch
            axes.add_patch(Rectangle(corner, width, top - floor, color=colour, alpha=0.13, lw=0, zorder=0))


def _traces(axes: Axes, examples: Examples, window: int, lead: int, base: float, rooms: tuple[float, float]) -> None:
    seconds = np.arange(examples.target.shape[2]) / examples.rate
    target = np.clip(examples.target[window, lead], *rooms) + base
    reconstruction = np.clip(examples.reconstruction[window, lead], *rooms) + base
    masks = {kind: examples.hidden_samples(kind)[window, lead] for kind, _ in KINDS}
    hidden = masks["intra"] | masks["inter"]
    # One sample further on both sides, or the original would have holes at the borders.
    reach = hidden | np.roll(hidden, 1) | np.roll(hidden, -1)
    reach[[0, -1]] = hidden[[0, -1]]
    axes.plot(seconds, np.where(reach, target, np.nan), color=HIDDEN_GREY, lw=0.8, zorder=2)
    axes.plot(seconds, np.where(hidden, np.nan, target), color=INK, lw=0.8, zorder=3)
    for kind, colour in KINDS:
        if masks[kind].any():
            axes.plot(seconds, np.where(masks[kind], reconstruction, np.nan), color=colour, lw=1.15, zorder=4)


def _scale_bar(axes: Axes, seconds: float, top: float, bar: float) -> None:
    width = min(1.0, seconds / 4)
    right, left, floor = 0.998 * seconds, 0.998 * seconds - width, top - bar
    corner: dict[str, Any] = {"color": INK, "lw": 1.4, "solid_joinstyle": "miter", "clip_on": False}
    axes.plot([right, right, left], [top, floor, floor], **corner)
    volts = f"{bar / UV_PER_MV:g} mV" if bar >= 100 else f"{bar / UV_PER_MV:g} mV ({bar:g} µV)"
    position = (left - 0.008 * seconds, floor + bar / 2)
    axes.text(*position, f"{volts}, {width:g} s", ha="right", va="center", fontsize=9)


def _legend(axes: Axes, place: float) -> None:
    entries = [
        Line2D([], [], color=INK, lw=1.4, label="seen"),
        Line2D([], [], color=HIDDEN_GREY, lw=1.4, label="hidden"),
        Patch(facecolor=TEMPORAL, alpha=0.16, label="hidden patch"),
        Line2D([], [], color=TEMPORAL, lw=1.6, label="reconstructed"),
        Patch(facecolor=LEADWISE, alpha=0.16, label="hidden lead"),
        Line2D([], [], color=LEADWISE, lw=1.6, label="reconstructed"),
    ]
    axes.legend(
        handles=entries,
        loc="center left",
        bbox_to_anchor=(-0.01, place),
        ncols=len(entries),
        frameon=False,
        fontsize=9,
        handlelength=1.4,
        columnspacing=1.1,
        borderaxespad=0.1,
        handletextpad=0.5,
    )


def draw_windows(
    signal: Float32Array,
    valid: BoolArray,
    channels: Sequence[str],
    rate: float,
    titles: Sequence[str],
    headline: str,
) -> bytes:
    """A PNG with one panel a window, its leads stacked in one scale.

    Args:
        signal: ``[window, channel, time]`` in microvolts.
        valid: ``[window, channel]``; an invalid lead is named and left empty.
        channels: lead names.
        rate: Hz.
        titles: one a window.
        headline: above all of them.
    """
    windows, leads, samples = signal.shape
    height = 0.32 * leads + 0.7
    with style():
        figure = new_figure(10.0, height * windows + 0.5)
        time = np.arange(samples) / rate
        for w in range(windows):
            top = 1 - (0.45 + w * height) / (height * windows + 0.5)
            share = (height - 0.65) / (height * windows + 0.5)
            axes: Any = figure.add_axes((0.07, top - share - 0.02, 0.91, share))
            magnitude = np.abs(signal[w][valid[w]]) if valid[w].any() else np.ones((1, 1))
            step = 2.2 * float(np.percentile(magnitude, 99.5)) or 1.0
            for lead in range(leads):
                base = -lead * step
                is_valid = bool(valid[w, lead])
                axes.text(-0.01 * samples / rate, base, channels[lead], ha="right", va="center",
                          fontsize=8, color=INK if is_valid else SOFT)  # fmt: skip
                if is_valid:
                    axes.plot(time, base + np.clip(signal[w, lead], -step, step), color=INK, lw=0.6)
                else:
                    axes.text(0.1, base, "not valid", va="center", fontsize=7, style="italic", color=SOFT)
            axes.set_xlim(0, samples / rate)
            axes.set_ylim(-(leads - 0.3) * step, 0.7 * step)
            axes.set_yticks([])
            axes.grid(axis="x", lw=0.3)
            axes.tick_params(labelsize=7)
            axes.set_title(f"{titles[w]}   (spacing of the leads {step / 1000:.2g} mV)", fontsize=8, loc="left")
        figure.text(0.07, 1 - 0.2 / (height * windows + 0.5), headline, fontsize=10, weight="bold")
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=110)
    return out.getvalue()
