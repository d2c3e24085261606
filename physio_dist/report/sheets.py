"""Held-out windows as an ECG reader knows them: leads stacked on one time axis, all in one scale."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from numpy.typing import NDArray

from physio_dist.report.drawing import INK, LEADWISE, SOFT, TEMPORAL, Image, embed, new_figure
from physio_dist.report.rundata import Examples

UV_PER_MV = 1000.0
# A lead gets the room its own waves need, within these multiples of the usual lead's: a flat lead stays visible and
# an artefact does not flatten the others.
LEAST_ROOM, MOST_ROOM = 0.35, 4.0
TICKS_INCHES = 0.25
HIDDEN_GREY = "#8a8a8a"
KINDS = (("intra", TEMPORAL), ("inter", LEADWISE))


def squared_errors(examples: Examples, kind: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
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
        style: dict[str, Any] = {"ha": "right", "va": "center", "fontsize": 10, "weight": "bold"}
        valid = bool(examples.valid[window, lead])
        colour = INK if valid else HIDDEN_GREY
        axes.text(-0.011 * seconds, bases[lead], examples.channels[lead], color=colour, **style)
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
    """Where this window's drawing cuts its highest waves off, in uV, or None where it shows all of them."""
    _, _, limit = _rooms(examples, window)
    shown = examples.valid[window]
    return limit if np.abs(examples.target[window][shown]).max(initial=0.0) > limit else None


def _rooms(examples: Examples, window: int) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """How far each lead reaches above and below its baseline, ``[channel]`` in uV, and the limit for all."""
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


def _baselines(high: NDArray[np.float64], low: NDArray[np.float64], gap: float) -> NDArray[np.float64]:
    below = np.concatenate([[0.0], np.cumsum(-low[:-1] + gap + high[1:])])
    return -below


def _runs(mask: NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
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
    made = np.clip(examples.reconstruction[window, lead], *rooms) + base
    masks = {kind: examples.hidden_samples(kind)[window, lead] for kind, _ in KINDS}
    hidden = masks["intra"] | masks["inter"]
    # One sample further on both sides, or the original would have holes at the borders.
    reach = hidden | np.roll(hidden, 1) | np.roll(hidden, -1)
    reach[[0, -1]] = hidden[[0, -1]]
    axes.plot(seconds, np.where(reach, target, np.nan), color=HIDDEN_GREY, lw=0.8, zorder=2)
    axes.plot(seconds, np.where(hidden, np.nan, target), color=INK, lw=0.8, zorder=3)
    for kind, colour in KINDS:
        if masks[kind].any():
            axes.plot(seconds, np.where(masks[kind], made, np.nan), color=colour, lw=1.15, zorder=4)


def _scale_bar(axes: Axes, seconds: float, top: float, bar: float) -> None:
    width = min(1.0, seconds / 4)
    right, left, floor = 0.998 * seconds, 0.998 * seconds - width, top - bar
    corner: dict[str, Any] = {"color": INK, "lw": 1.4, "solid_joinstyle": "miter", "clip_on": False}
    axes.plot([right, right, left], [top, floor, floor], **corner)
    volts = f"{bar / UV_PER_MV:g} mV" if bar >= 100 else f"{bar / UV_PER_MV:g} mV ({bar:g} µV)"
    where = (left - 0.008 * seconds, floor + bar / 2)
    axes.text(*where, f"{volts}, {width:g} s", ha="right", va="center", fontsize=9)


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
